"""Self-describing checkpoints: tensors in safetensors, everything else as JSON in its header. No pickle.

Any of our files is a safetensors file whose metadata has one key, "metabroyden", with a JSON object: schema, kind, and
what the kind needs. `write` and `read` do files of any kind; `save_solver` and `load_solver` do solvers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from metabroyden.learned.base import ADJOINT, LEARNED, LEARNED_SPLITTING
from metabroyden.solvers.registry import SOLVERS, SPLITTING, make_solver, name_of
from metabroyden.storage import atomic_write

SCHEMA = 1
LARGEST = 5_000_000
"""Bytes of weights above which a file that a repository is to keep holds them in half precision."""
_KEY = "metabroyden"


class CheckpointError(ValueError):
    """A file that cannot be used; the message says which and why."""


def write(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write a checkpoint of this kind, atomically. The header must be JSON."""
    described = json.dumps({"schema": SCHEMA, "kind": kind, **header}, sort_keys=True)
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return atomic_write(path, safetensors.torch.save(flat, metadata={_KEY: described}))


def read(path: str | Path, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of a checkpoint.

    Raises FileNotFoundError where there is no file, `CheckpointError` for a truncated, foreign or newer-schema file, or
    one of another kind (`kind` is a prefix, such as "solver").
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file (truncated or foreign): {error}") from error
    try:
        header = json.loads(metadata[_KEY])
        schema, found = header["schema"], header["kind"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a safetensors file, but not one that metabroyden wrote") from error
    if not isinstance(schema, int) or not isinstance(found, str) or found.count("/") != 1:
        raise CheckpointError(f"{path}: its description is damaged: schema {schema!r}, kind {found!r}")
    if schema > SCHEMA:
        raise CheckpointError(f"{path} has schema {schema}, newer than {SCHEMA}: update metabroyden to read it")
    if kind is not None and found.split("/")[0] != kind:
        raise CheckpointError(f"{path} holds a {found!r}, wanted a {kind!r}")
    return tensors, header


def slimmed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are or, above `LARGEST` bytes of them, those of float32 in half precision where they fit."""
    if sum(value.nbytes for value in tensors.values()) <= LARGEST:
        return tensors
    return {name: _rounded(value) for name, value in tensors.items()}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was `slimmed`, in float32 again."""
    return {name: value.float() if value.dtype == torch.half else value for name, value in tensors.items()}


def _rounded(value: Tensor) -> Tensor:
    fits = value.dtype == torch.float32 and bool((value.half().isfinite() | ~value.isfinite()).all())
    return value.half() if fits else value


def load_weights(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Load tensors into a module; `CheckpointError` when names or shapes differ."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit the described model: {error}") from error


def training_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """What a training run must remember to go on bit for bit: weights, moments, random generator if any."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    names = [name for name, _ in module.named_parameters()]
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{key}.{names[number]}": torch.as_tensor(value) for key, value in state.items()}
    if generator is not None:
        tensors["generator"] = generator.get_state()
    return tensors


def restore_training(
    tensors: dict[str, Tensor],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: str | Path,
    generator: torch.Generator | None = None,
) -> None:
    """The inverse of `training_tensors`; `CheckpointError` when the weights do not fit."""
    load_weights(module, under(tensors, "module."), path)
    numbers = {name: number for number, (name, _) in enumerate(module.named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in under(tensors, "adam.").items():
        moment, name = key.split(".", 1)
        if name in numbers:
            state.setdefault(numbers[name], {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if generator is not None:
        generator.set_state(tensors["generator"])


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_solver(solver: Any, path: str | Path) -> Path:
    """Write a solver, learned or classical: kind, config, expected state layout, meta-training summary, schema.

    TypeError for what is no solver of ours, or a Broyden with an operator inside (save the learned solver it is of).
    """
    kind = getattr(solver, "kind", None)
    if type(solver) in (LEARNED | LEARNED_SPLITTING | ADJOINT).values():
        return write(path, f"solver/{kind}", solver.state_dict(), solver.describe())
    name = name_of(solver)
    if name is None or not is_dataclass(solver) or getattr(solver, "initial", None) is not None:
        raise TypeError(f"save_solver takes a learned solver or a plain classical one, got {solver!r}")
    return write(path, f"solver/{name}", {}, {"config": asdict(solver)})  # type: ignore[arg-type]


def load_solver(path_or_name: str | Path) -> Any:
    """The solver in a file, or the shipped one of that name (see `pretrained`); in evaluation mode, on the CPU.

    Raises FileNotFoundError for what is neither, `CheckpointError` for a file that cannot be used.
    """
    path = _resolve(path_or_name)
    tensors, header = read(path, "solver")
    name = header["kind"].split("/")[1]
    try:
        if name in SOLVERS | SPLITTING:
            return make_solver(name, **header["config"])
        known = LEARNED | LEARNED_SPLITTING | ADJOINT
        if name not in known:
            raise CheckpointError(f"{path} holds a solver of unknown kind {name!r}; known: {sorted(known)}")
        solver = known[name].from_config(header["config"])
        solver.fingerprint, solver.summary = header["fingerprint"], header["summary"]
        solver.to(next(iter(tensors.values())).dtype)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}") from error
    load_weights(solver, tensors, path)
    return solver.eval().requires_grad_(False)


def pretrained() -> tuple[str, ...]:
    """Names of the trained solvers shipped with the package, for `load_solver`."""
    folder = resources.files("metabroyden") / "pretrained"
    return tuple(sorted(item.name.removesuffix(".safetensors") for item in folder.iterdir() if _is_shipped(item.name)))


def _is_shipped(name: str) -> bool:
    return name.endswith(".safetensors")


def _resolve(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    if str(path_or_name) in pretrained():
        return Path(str(resources.files("metabroyden") / "pretrained" / f"{path_or_name}.safetensors"))
    shipped = ", ".join(pretrained()) or "none"
    raise FileNotFoundError(f"{path_or_name} is neither a file nor the name of a shipped solver ({shipped})")
