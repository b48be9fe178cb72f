"""Models that come with the package, each with its learned solver in place."""

from __future__ import annotations

from typing import Any

from metabroyden.checkpoint import SHIPPED, list_pretrained, load_solver
from metabroyden.folder import CONFIG
from metabroyden.zoo.models.fit import load_model

PLACE = "deq"
"""The model's folder in that of its solver."""


def load_pretrained(name: str, **deq_options: Any) -> Any:
    """A shipped classifier of handwritten digits, with the shipped solver that was trained for it.

    Args:
        name: one of `metabroyden.list_pretrained()`, such as "conv-digits", but for "universal".
        deq_options: options of its `DEQ`, in place of `solver=load_solver(name), rtol=1e-2, max_nfe=60`.

    Returns:
        The model, in evaluation mode, on the CPU: images (B, 1, 8, 8) with values from 0 to 1 → logits (B, 10).

    Raises:
        ValueError: no model of this name is shipped.

    Examples:
        >>> import torch
        >>> model, image = load_pretrained("conv-digits"), torch.zeros(1, 1, 8, 8)
        >>> image[..., 1:7, 3:5] = 1  # a drawn 1
        >>> int(model(image).argmax()), int(model.deq.last_solution.nfe) <= 12
        (1, True)
    """
    names = [known for known in list_pretrained() if (SHIPPED / known / PLACE / CONFIG).is_file()]
    if name not in names:
        raise ValueError(f"no model named {name!r} is shipped, only {', '.join(names)}")
    options = {"solver": load_solver(name), "rtol": 1e-2, "max_nfe": 60} | deq_options
    return load_model(SHIPPED / name / PLACE, **options)
