"""deepinv (0.5): our solvers in its deep-equilibrium reconstructions, and these handed to `fit_solver`.

`FixedPointMap` is the f(z, x) of a model such as `deepinv.optim.PGD(…, DEQ=True)`, and `install` puts a solver of ours in
the place of its loop. deepinv itself is imported when one of them is used.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import Tensor, nn

from metabroyden.deq import DEQ
from metabroyden.foreign import required
from metabroyden.gradients import Implicit
from metabroyden.gradients.base import GradientMode
from metabroyden.meta.target import ADAPTERS
from metabroyden.solvers.anderson import Anderson


class FixedPointMap:
    """f(z, x) of a deep-equilibrium reconstruction: one iteration of its algorithm at the image z (B, C, H, W).

    x is y, the measurements with the samples first; where some parameters of the physics differ from sample to sample, such
    as blur filters, x is (y, *parameters), each with the samples first. Solves drop the samples that are done, so that such
    parameters must come in this way: what stands in the physics is for all samples. More tensors may follow, such as the
    images themselves for a metric; they are not looked at.

    Args:
        model: a deepinv algorithm with `DEQ`, of one image: PGD, HQS or GD.
        physics: that made the measurements; copied where there are parameters, which change with the samples at hand.
        parameters: names of the physics' parameters that come with x, as `physics.update` takes them.

    Raises:
        ImportError: deepinv is not installed.
        TypeError: no deepinv algorithm, or measurements of several tensors.
        ValueError: an algorithm without `DEQ`, or fewer parameters than names.
    """

    layout = "image"

    def __init__(self, model: Any, physics: Any, *parameters: str) -> None:
        self._model = _checked(model)
        self.physics = _copied(physics) if parameters else physics
        self.parameters = parameters
        self._given: list[tuple[Tensor, int]] = []  # parameters that are in the physics, and their versions
        last = model.max_iter - 1
        self._parts = model.update_data_fidelity_fn(last), model.update_prior_fn(last)

    def __call__(self, z: Tensor, x: Any) -> Tensor:
        """One iteration, (B, C, H, W)."""
        y = self._update(x)
        current = self._model.update_params_fn(self._model.max_iter - 1)
        iterator = self._model.fixed_point.iterator
        return iterator({"est": (z,)}, *self._parts, current, y, self.physics)["est"][0]

    def initial_state(self, x: Any) -> Tensor:
        """Where the algorithm starts: its own choice, or the adjoint of the measurements."""
        y = self._update(x)
        return self._model.init_iterate_fn(y, self.physics)["est"][0].detach()

    def _update(self, x: Any) -> Tensor:
        """The measurements; the parameters that come with them are put into the physics."""
        y, *given = x if isinstance(x, tuple) else (x,)
        if not isinstance(y, Tensor):
            raise TypeError(f"measurements must be one tensor with the samples first, got {type(y).__name__}")
        if len(given) < len(self.parameters):
            raise ValueError(
                f"x must be the measurements and {len(self.parameters)} parameters of the physics "
                f"({', '.join(self.parameters) or 'none'}), got {len(given)}"
            )
        given = given[: len(self.parameters)]
        seen = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in given]
        known = [tensor is other and n == m for (tensor, n), (other, m) in zip(seen, self._given, strict=False)]
        if len(known) < len(seen) or not all(known):
            self.physics.update(**dict(zip(self.parameters, given, strict=True)))
            self._given = seen
        return y


def install(
    model: Any,
    solver: Any,
    *parameters: str,
    rtol: float = 1e-3,
    max_nfe: int = 50,
    backward: GradientMode | None = None,
) -> DEQ:
    """Solve a deepinv model's equilibria, and its adjoint systems, by ours: `model(y, physics)` is called as before.

    Its parameters, those that train included, and its `state_dict` stay as they are.

    Args:
        model: a deepinv algorithm with `DEQ`, changed in place.
        solver: any of ours, such as one that `fit_solver` made for its `FixedPointMap`.
        parameters: names of the physics' parameters that differ from sample to sample, as for `FixedPointMap`.
        rtol: relative residual at which a sample is done.
        max_nfe: iterations at most.
        backward: gradient mode; default: implicit, by Anderson's method.

    Returns:
        The layer that solves: `last_solution` and `last_backward_solution` say what a call cost, `solver` may be reassigned.

    Raises:
        ImportError: deepinv is not installed.
        TypeError: no deepinv algorithm; or as of `DEQ`.
        ValueError: an algorithm without `DEQ`; or as of `DEQ`.
    """
    engine = _Engine(_checked(model), parameters)
    mode = Implicit(solver=Anderson(), rtol=rtol) if backward is None else backward
    engine.layer = DEQ(engine.step, solver=solver, rtol=rtol, max_nfe=max_nfe, backward=mode)
    model.fixed_point = engine
    model.DEQ_additional_step = engine.solve
    return engine.layer


class _Engine(nn.Module):
    """In the place of a model's `FixedPoint`: it gives the start, and the model's own last step is the solve."""

    layer: DEQ

    def __init__(self, model: Any, parameters: tuple[str, ...]) -> None:
        super().__init__()
        self.iterator = model.fixed_point.iterator
        self._owner = [model]  # whose part this is
        self._parameters_of_physics = parameters
        self._map: FixedPointMap | None = None

    def forward(self, y: Any, physics: Any, *, init: Any = None, compute_metrics: bool = False, **ignored: Any) -> Any:
        """(the first iterate, None): the solve itself is `solve`."""
        if compute_metrics:
            raise ValueError(
                "compute_metrics=True is of deepinv's own loop, in whose place a solver of metabroyden's is"
            )
        return self._owner[0].init_iterate_fn(y, physics, init), None

    def step(self, z: Tensor, x: Any) -> Tensor:
        """f(z, x) with the physics of this call."""
        assert self._map is not None
        return self._map(z, x)

    def solve(self, X: dict[str, Any], y: Any, physics: Any, **ignored: Any) -> Tensor:
        """The equilibrium with its gradients, from the first iterate."""
        names = self._parameters_of_physics
        self._map = FixedPointMap(self._owner[0], physics, *names)
        return self.layer((y, *(getattr(physics, name) for name in names)) if names else y, X["est"][0].detach())


def _copied(physics: Any) -> Any:
    """A copy of a physics whose parameters may be changed; those that need gradients are the very same tensors."""
    memo = {id(tensor): tensor for tensor in _tensors(physics) if tensor.requires_grad}
    return copy.deepcopy(physics, memo)


def _tensors(physics: Any) -> list[Tensor]:
    return [*physics.parameters(), *physics.buffers()] if isinstance(physics, nn.Module) else []


def library() -> Any:
    """deepinv, beside any build of torch; ImportError that says what to install where it is missing."""
    return required("deepinv", "deepinv==0.5.0")


def _checked(model: Any) -> Any:
    """The model, if it is a deepinv algorithm with `DEQ`."""
    if not isinstance(model, library().optim.BaseOptim):
        raise TypeError(f"model must be a deepinv algorithm such as deepinv.optim.PGD, got {type(model).__name__}")
    if not model.DEQ:
        name = type(model).__name__
        raise ValueError(f"{name} has no equilibrium: make it with DEQ=True or DEQ=deepinv.optim.DEQConfig(…)")
    return model


def _refused(f: Any) -> None:
    """ValueError for a deepinv model that comes without its physics."""
    loaded = sys.modules.get("deepinv")
    if loaded is not None and isinstance(f, getattr(loaded.optim, "BaseOptim", ())):
        raise ValueError(
            f"{type(f).__name__} of deepinv needs its physics: hand over "
            "metabroyden.integrations.deepinv.FixedPointMap(model, physics) and the measurements"
        )


ADAPTERS.append(lambda f: _refused(f))
