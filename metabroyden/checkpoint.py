"""Self-describing checkpoints: tensors in safetensors, everything else as JSON in its header. No pickle.

Any of our files is a safetensors file whose metadata has a key "metabroyden", with a JSON object: schema, kind, and what
the kind needs; and a key "blake2b", the checksum of that text and of the tensors (files of earlier versions have none).
A folder (`folder`) is such a file named model.safetensors with a copy of its JSON object in config.json.
`write`, `write_pretrained` and `read` do any kind; `save_solver`, `save_pretrained` and `load_solver` do solvers.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from metabroyden.deprecated import PRETRAINED, current, from_schema_1
from metabroyden.described import MISFITS, CheckpointError, Limits, check, damaged
from metabroyden.folder import CONFIG, WEIGHTS, agree, described_by, model_card, write_folder
from metabroyden.learned.safeguard import Safeguard
from metabroyden.solvers.registry import get_solver, name_of, solver_types
from metabroyden.storage import atomic_write

SCHEMA = 2
LARGEST = 5_000_000  # bytes of weights above which a file that a repository is to keep holds them in half precision
PRECISIONS = (torch.float32, torch.float64)  # of a solver's weights: those of the states that it can work on
SHIPPED = Path(__file__).with_name("pretrained")
"""A folder of each solver that comes with the package; the model that it belongs to is in the folder deq/ there."""
_KEY, _CHECKSUM = "metabroyden", "blake2b"
_CPU = torch.device("cpu")
_SHAPE = tuple[int, ...] | tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _LearnedHeader:
    config: dict[str, Any]
    fingerprint: str | None
    summary: dict[str, Any]


def write(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write a checkpoint, atomically and with a checksum; returns the path.

    `kind` is what it holds, as "solver/universal"; `header` what else there is to say, as JSON takes it.
    """
    return atomic_write(path, _packed(tensors, _description(kind, header)))


def write_pretrained(
    folder: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any], card: str
) -> Path:
    """Write a checkpoint as a folder with this model card (`write_folder`), without weights where there are none."""
    described = _description(kind, header)
    return write_folder(folder, described, _packed(tensors, described) if tensors else None, card)


def _description(kind: str, header: dict[str, Any]) -> str:
    return json.dumps({"schema": SCHEMA, "kind": kind, **header}, sort_keys=True)


def _packed(tensors: dict[str, Tensor], described: str) -> bytes:
    """The content of a safetensors file."""
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {_KEY: described, _CHECKSUM: _checksum(flat, described)}
    return _in_order(safetensors.torch.save(flat, metadata=metadata))


def read(path: str | Path, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of a checkpoint, a file or a folder, on the CPU.

    Raises FileNotFoundError where there is neither, `CheckpointError` for a truncated, foreign, altered or newer-schema
    one, or one of another kind (`kind` is a prefix, such as "solver").
    """
    path = Path(path)
    if path.is_dir():
        tensors, metadata = _of_folder(path)
    elif path.is_file():
        tensors, metadata = _parsed(path.read_bytes(), path)
    else:
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        header = json.loads(metadata[_KEY])
        schema, found = header["schema"], header["kind"]
    except MISFITS as error:
        raise CheckpointError(f"{path} is a safetensors file, but not one that metabroyden wrote") from error
    if type(schema) is int and schema > SCHEMA:
        raise CheckpointError(f"{path} has schema {schema}, newer than {SCHEMA}: update metabroyden to read it")
    if metadata.get(_CHECKSUM) not in (None, _checksum(tensors, metadata[_KEY])):
        raise CheckpointError(f"{path} is not as it was written: its checksum does not match its content")
    if type(schema) is not int or schema < 1 or not isinstance(found, str) or found.count("/") != 1:
        raise damaged(path, f"schema {schema!r}, kind {found!r}")
    if kind is not None and found.split("/")[0] != kind:
        raise CheckpointError(f"{path} holds a {found!r}, wanted a {kind!r}")
    return from_schema_1(tensors, header) if schema == 1 else (tensors, header)


def _of_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a folder, whose two files must say the same; no tensors where it has no weights."""
    described = described_by(path)
    if not (path / WEIGHTS).is_file():
        return {}, {_KEY: described}
    tensors, metadata = _parsed((path / WEIGHTS).read_bytes(), path / WEIGHTS)
    if not agree(metadata.get(_KEY, ""), described):
        raise CheckpointError(f"{path}: {CONFIG} is not the description of {WEIGHTS}: save the folder again")
    return tensors, metadata


def _parsed(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file."""
    try:
        with _CPU:
            tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        return tensors, json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, *MISFITS) as error:
        raise CheckpointError(f"{path} is no readable safetensors file (truncated or foreign): {error}") from error


def _in_order(data: bytes) -> bytes:
    """A safetensors file whose metadata stands in the order of its keys: equal content makes equal files."""
    length = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + length])
    described["__metadata__"] = dict(sorted(described["__metadata__"].items()))
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _checksum(tensors: dict[str, Tensor], described: str) -> str:
    """Of a file's description and of its tensors' names, dtypes, shapes and bytes."""
    found = hashlib.blake2b(described.encode("utf-8", "surrogatepass"), digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        plain = torch.view_as_real(value) if value.is_complex() else value
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def to_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are or, above `LARGEST` bytes of them, those of float32 in half precision where they fit."""
    if sum(value.nbytes for value in tensors.values()) <= LARGEST:
        return tensors
    return {name: _rounded(value) for name, value in tensors.items()}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was `to_half`, in float32 again."""
    return {name: value.float() if value.dtype == torch.half else value for name, value in tensors.items()}


def _rounded(value: Tensor) -> Tensor:
    fits = value.dtype == torch.float32 and bool((value.half().isfinite() | ~value.isfinite()).all())
    return value.half() if fits else value


def load_weights(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Load tensors into a module; `CheckpointError` when names or shapes differ."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise misfit(path, error) from error


def misfit(path: str | Path, why: object) -> CheckpointError:
    """The error for weights of another module."""
    return CheckpointError(f"{path}: the weights do not fit the described model: {why}")


def built(
    build: Callable[[], nn.Module],
    tensors: dict[str, Tensor],
    path: str | Path,
    precisions: tuple[torch.dtype, ...] = PRECISIONS,
    *,
    make: Callable[[], nn.Module] | None = None,
) -> Any:
    """The module that `build` makes, with these weights in their precision, on the CPU whatever the default device.

    Args:
        build: makes a module as the file describes it.
        tensors: its state.
        path: the file, for messages.
        precisions: dtypes that the weights may have, all of them the same one.
        make: makes the module that is returned, where that is not `build`; its errors are not the file's.

    Raises:
        CheckpointError: `build` refuses the description, or the weights do not fit it. That is found without memory for
            the sizes described.
    """
    if not tensors:
        raise CheckpointError(f"{path} holds no weights: a folder needs {WEIGHTS} beside {CONFIG}")
    floating = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if len(floating) != 1 or not floating <= set(precisions):
        wanted = " or ".join(map(str, precisions))
        raise misfit(path, f"wanted floating weights, all of them {wanted}, got {sorted(map(str, floating))}")
    precision = floating.pop()
    try:
        with warnings.catch_warnings(), Limits.like(tensors), _CPU:
            warnings.simplefilter("ignore")  # PyTorch's, of sizes that make no sense: they are about to be refused
            module = build().to(precision)
    except CheckpointError:
        raise
    except MISFITS as error:
        raise damaged(path, f"{error!r:.400}") from error
    compare(module.state_dict(), tensors, path)
    if make is not None:
        with _CPU:
            module = make().to(precision)
    load_weights(module, tensors, path)
    return module


def compare(wanted: dict[str, Tensor], tensors: dict[str, Tensor], path: str | Path) -> None:
    """`CheckpointError` unless both have the same names, shapes and dtypes."""
    for name in sorted(wanted.keys() | tensors.keys()):
        one, other = (_kind(values.get(name)) for values in (wanted, tensors))
        if one != other:
            raise misfit(path, f"{name} is {other}, wanted {one}")


def _kind(value: Tensor | None) -> str:
    return "missing" if value is None else f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_solver(solver: Any, path: str | Path) -> Path:
    """Write a solver, learned or classical, to one file: kind, config, expected state layout, meta-training summary, schema.

    TypeError for what is no solver of ours, or a Broyden with an operator inside (save the learned solver it is of);
    IsADirectoryError where there is a folder of that name.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, wanted the name of a file: save_pretrained writes folders")
    return write(path, *_contents(solver))


def save_pretrained(solver: Any, folder: str | Path) -> Path:
    """Write a solver, learned or classical, as a folder in Hugging Face's convention, which `hf upload` takes as it is.

    config.json describes it, model.safetensors holds the weights (a classical solver has none), and README.md is a model
    card made of its summary. `load_solver` reads the folder.

    Args:
        solver: as for `save_solver`.
        folder: is made where it is missing. A README.md that you wrote stays.

    Returns:
        The folder.

    Raises:
        TypeError: as for `save_solver`.

    Examples:
        >>> import tempfile, metabroyden as mb
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mb.load_solver(mb.save_pretrained(mb.Anderson(memory=3), folder)).memory
        3
    """
    kind, tensors, header = _contents(solver)
    name, intent = type(solver).__name__, "A root finder for deep equilibrium models z = f(z, x), saved by metabroyden."
    facts = _facts(tensors, header["config"], header["summary"]) if tensors else header["config"]
    code = f'import metabroyden as mb\n\nsolver = mb.load_solver("path/to/this/folder")  # {name}'
    return write_pretrained(folder, kind, tensors, header, model_card(name, intent, facts, code))


def _facts(tensors: dict[str, Tensor], config: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """What a model card tells of a learned solver."""
    measured = summary.get("held_out")
    return {
        "weights": sum(value.numel() for value in tensors.values()),
        "states": f"{config['layout']} {tuple(config['shape'])}",
        "steps of meta-training": summary.get("steps"),
        "seconds of meta-training": summary.get("seconds"),
        **(measured if isinstance(measured, dict) else {}),
    }


def _contents(solver: Any) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Kind, weights and description of a solver."""
    name = name_of(solver)
    if name is not None and solver.is_learned:
        return f"solver/{name}", solver.state_dict(), solver.describe()
    if name is None or not is_dataclass(solver) or getattr(solver, "initial", None) is not None:
        raise TypeError(f"save_solver takes a learned solver or a plain classical one, got {solver!r}")
    return f"solver/{name}", {}, {"config": asdict(solver)}  # type: ignore[arg-type]


def load_solver(path_or_name: str | Path) -> Any:
    """The solver in a file or folder, or the shipped one of that name (see `list_pretrained`).

    It is in evaluation mode, on the CPU.

    Raises FileNotFoundError for what is none of these, `CheckpointError` for a file or folder that cannot be used.
    """
    path = _resolve(path_or_name)
    tensors, header = read(path, "solver")
    name = header["kind"].split("/")[1]
    if name in solver_types(learned=False):
        return _classical(name, header, path)
    known = solver_types(learned=True)
    if name not in known:
        raise CheckpointError(f"{path} holds a solver of unknown kind {name!r}; known: {sorted(known)}")
    check(header, _LearnedHeader, path)
    check(header["config"], known[name].config_type, path, shape=_SHAPE, safeguard=Safeguard | None)
    _check_sizes(header["config"].get("shape", []), path)
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise damaged(path, f"{key} is not finite")
    solver = built(lambda: known[name].from_config(header["config"]), tensors, path)
    solver.fingerprint, solver.summary = header["fingerprint"], header["summary"]
    return solver.eval().requires_grad_(False)


def _classical(name: str, header: dict[str, Any], path: Path) -> Any:
    check(header.get("config"), solver_types(learned=False)[name], path)
    try:
        return get_solver(name, **header["config"])
    except MISFITS as error:
        raise damaged(path, error) from error


def _check_sizes(shape: Any, path: Path) -> None:
    sizes = [size for part in shape for size in (part if isinstance(part, list) else [part])]
    if not sizes or min(sizes) < 1:
        raise damaged(path, f"shape is {shape!r:.80}, wanted sizes of at least 1")


def list_pretrained() -> tuple[str, ...]:
    """Names of the trained solvers shipped with the package, for `load_solver`.

    All but "universal" belong to a model that is shipped too: `metabroyden.zoo.models.load_pretrained`.

    Examples:
        >>> "conv-digits" in list_pretrained()
        True
    """
    return tuple(sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}")))


def _resolve(path_or_name: str | Path) -> Path:
    path, name = Path(path_or_name), str(path_or_name)
    if path.is_file() or (path / CONFIG).is_file():
        return path
    if name in PRETRAINED or name in list_pretrained():
        return SHIPPED / current(name, PRETRAINED)
    if path.is_dir():
        return path  # which is refused with a sentence
    shipped = ", ".join(list_pretrained()) or "none"
    raise FileNotFoundError(f"{path_or_name} is neither a file or folder nor the name of a shipped solver ({shipped})")
