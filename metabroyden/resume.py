"""Files of a training under way: what they must hold, checked before anything of the run is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden import checkpoint
from metabroyden.described import check, damaged

_ADAM = {"step", "exp_avg", "exp_avg_sq"}
_MOMENTUM = {"step", "momentum"}


@dataclass(frozen=True)
class _Moments:
    moments: list[str] | None = None


def pack(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    header: dict[str, Any],
    *,
    generator: torch.Generator | None = None,
    best: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of all that a training needs to go on bit for bit, for `checkpoint.write`; not a copy.

    Kept are the module's weights, the moments of the optimizer (of all of its parameters, in their order), the generator's
    state, the best weights so far, and a header of what else the trainer must know, as JSON.
    """
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in (best or {}).items()}
    names = [name for name, _ in module.named_parameters()]
    moments = {
        f"adam.{key}.{names[number]}": torch.as_tensor(value, device="cpu")
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    if generator is not None:
        tensors["generator"] = generator.get_state()
    return tensors | moments, {**header, "moments": sorted(moments)}


def restore(
    tensors: dict[str, Tensor],
    header: dict[str, Any],
    path: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    taken: int,
    generator: torch.Generator | None = None,
    best: bool = False,
) -> dict[str, Tensor]:
    """Give a module, its optimizer and a generator what `pack` gave; returns the best weights ({} where none are kept).

    Tensors and header are what `pack` gave, of a file by `checkpoint.read`; the path is for messages. The optimizer has made
    `taken` updates at least, since it was last cleared; `best` says whether best weights are kept.

    Raises:
        CheckpointError: something is missing, of another shape or dtype, not finite, or too much. Nothing was changed.
    """
    kept = ("module", "best") if best else ("module",)
    parts = {name: checkpoint.under(tensors, f"{name}.") for name in (*kept, "adam")}
    known = sum(map(len, parts.values())) + (generator is not None and "generator" in tensors)
    if known != len(tensors):
        names = sorted(name for name in tensors if name.split(".")[0] not in parts)
        raise damaged(path, f"it holds tensors that are not of such a training: {names}")
    for name in kept:
        checkpoint.compare(module.state_dict(), parts[name], path)
        for key, value in parts[name].items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise damaged(path, f"{key} is not finite")
    state = _moments(parts["adam"], header, path, module, optimizer)
    made = max((int(mine["step"]) for mine in state.values()), default=0)
    if made < taken:
        raise damaged(path, f"{taken} updates were made, but the optimizer's moments are of {made}")
    if generator is not None:
        try:
            generator.set_state(tensors.get("generator"))  # type: ignore[arg-type]
        except (RuntimeError, TypeError) as error:
            raise damaged(path, f"no state of a random generator: {error}") from error
    checkpoint.load_weights(module, parts["module"], path)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return parts.get("best", {})


def _moments(
    found: dict[str, Tensor], header: dict[str, Any], path: str | Path, module: nn.Module, optimizer: Any
) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state by number of a parameter, checked; none where the parameter never had a gradient."""
    check(header, _Moments, path)
    kept = header.get("moments")
    if kept is not None and sorted(f"adam.{name}" for name in found) != kept:
        raise damaged(path, "the optimizer's moments are not those that were written")
    matrices = {id(matrix) for matrix in getattr(optimizer, "matrices", ())}
    state: dict[int, dict[str, Tensor]] = {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        mine = {key: found[f"{key}.{name}"] for key in _ADAM | _MOMENTUM if f"{key}.{name}" in found}
        if not mine:
            continue
        wanted = _MOMENTUM if id(parameter) in matrices else _ADAM
        if set(mine) != wanted:
            raise damaged(path, f"the moments of {name} are {sorted(mine)}, wanted {sorted(wanted)}")
        for key in sorted(wanted):
            why = _fault(key, mine[key], parameter)
            if why:
                raise damaged(path, f"{key} of {name} is {why}")
        state[number] = mine
    if sum(map(len, state.values())) != len(found):
        raise damaged(path, f"it holds moments of other parameters: {sorted(found)[:5]}")
    return state


def _fault(key: str, value: Tensor, parameter: Tensor) -> str:
    """What is wrong with a moment of a parameter; "" where nothing is."""
    shape, dtype = (torch.Size(), torch.float32) if key == "step" else (parameter.shape, parameter.dtype)
    if value.shape != shape or value.dtype != dtype:
        return f"{value.dtype} {tuple(value.shape)}, wanted {dtype} {tuple(shape)}"
    if not bool(value.isfinite().all()):
        return "not finite"
    return "negative" if key in ("step", "exp_avg_sq") and bool((value < 0).any()) else ""
