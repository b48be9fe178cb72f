"""Files describe themselves, are written whole, and refused with a sentence when they cannot be used."""

from __future__ import annotations

import json
import math
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import metabroyden as mb
from metabroyden import checkpoint, deprecated
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.zoo import models as zoo
from tests.helpers import refused, same_parameters

PYRAMID = Layout("pyramid", ((2, 4, 4), (3, 2, 2)))
SOLVERS = mb.list_solvers(learned=True)
ROOT = Path(__file__).parents[1]


def some_solver(name: str = "grouped", layout: Layout | None = None, **options: Any):
    solver = make_learned(name, Layout("image", (4, 3, 3)) if layout is None else layout, **options)
    for parameter in solver.parameters():
        parameter.data.normal_()
    solver.fingerprint, solver.summary = "abc", {"seconds": 1.5}
    return solver


def small_solver() -> Any:
    return some_solver("universal", Layout("vector", (1,)), hidden=4)


def small_model() -> Any:
    return zoo.DenseClassifier(zoo.DenseClassifierConfig(n=6, side=3, classes=3))


def same(one: Any, other: Any) -> bool:
    """Whether two modules are configured alike and have the same weights."""
    return one.config == other.config and same_parameters(one, other)


@pytest.mark.parametrize("name", [*SOLVERS, "pyramid"])
def test_a_learned_solver_comes_back_as_it_was(tmp_path, name):
    solver = some_solver("meta-broyden", PYRAMID).double() if name == "pyramid" else some_solver(name)
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "deep" / "s.safetensors"))
    assert type(loaded) is type(solver)
    assert same(loaded, solver)
    assert (loaded.fingerprint, loaded.summary) == ("abc", {"seconds": 1.5})
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("name", mb.list_solvers(learned=False))
def test_a_classical_solver_comes_back_as_it_was(tmp_path, name):
    options = {"substitution": {}, "forward-backward": {"alpha": 0.3}, "peaceman-rachford": {"alpha": 0.3}}
    solver = mb.get_solver(name, **options.get(name, {"damping": 0.7}))
    assert mb.load_solver(mb.save_solver(solver, tmp_path / "s.safetensors")) == solver


def test_a_large_model_is_stored_in_half_precision_and_comes_back_in_float32(tmp_path, monkeypatch):
    model, path = zoo.ConvClassifier(), tmp_path / "m.safetensors"
    whole = zoo.save_model(model, path).stat().st_size
    monkeypatch.setattr("metabroyden.checkpoint.LARGEST", 100)
    assert zoo.save_model(model, path).stat().st_size == whole, "only where it was asked for"
    with torch.no_grad():
        model.head.bias[0] = 1e6  # more than half precision holds
    assert zoo.save_model(model, path, slim=True).stat().st_size < 0.6 * whole
    for key, value in zoo.load_model(path).state_dict().items():
        wanted = model.state_dict()[key]
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted if key == "head.bias" else wanted.half().float())
    for dtype in (torch.float64, torch.half, torch.bfloat16):
        for slim in (False, True):
            again = zoo.load_model(zoo.save_model(model.to(dtype), path, slim=slim))
            assert again.head.weight.dtype == dtype
            assert torch.equal(again.head.weight, model.head.weight)


def test_what_is_saved_twice_is_the_same_file(tmp_path):
    solver = mb.load_solver("universal")
    files = {mb.save_solver(solver, tmp_path / f"{number}.safetensors").read_bytes() for number in range(12)}
    assert len(files) == 1
    assert len(next(iter(files))) % 4 == 0


@pytest.mark.parametrize("way", ["context", "default"])
@pytest.mark.parametrize("name", [*mb.list_pretrained(), *SOLVERS, "model"])
def test_what_is_loaded_comes_to_the_cpu_whatever_the_default_device(tmp_path, name, way):
    path = name
    if name == "model":
        path = zoo.save_model(small_model(), tmp_path / "m")
    elif name in SOLVERS:
        path = mb.save_solver(some_solver(name), tmp_path / "s")
    loads = (
        [mb.load_solver] if name != "model" else [zoo.load_model, lambda path: zoo.load_model(path, solver=mb.Picard())]
    )
    try:
        if way == "default":
            torch.set_default_device("meta")
        with torch.device("meta"):
            found = [load(path) for load in loads]
    finally:
        torch.set_default_device(None)
    for module in found:
        assert {value.device.type for value in module.state_dict().values()} == {"cpu"}


# --- old files


def test_every_solver_among_the_results_and_of_the_package_loads():
    digits = [path for path in ROOT.glob("results/digits/seed*/*.safetensors") if path.stem != "model"]
    paths = [*digits, *ROOT.glob("results/generalise/*.safetensors")]
    paths += [*ROOT.glob("results/*/*/*/solver.safetensors"), *mb.list_pretrained()]
    assert len(paths) > 17
    for path in paths:
        assert mb.load_solver(path).layout.channels > 0, path


OLD = {
    "tests/old/coordinatewise-schema1": (25, 21, 24),
    "tests/old/grouped-schema1": (40, 41, 58),
    "results/generalise/universal": (4, 4, 4),
    "results/meta/conv-digits/meta-broyden-seed0/solver": (33, 29, 35),
    "results/meta/mlp-fashion/meta-broyden-seed0/solver": (8, 12, 17),
    "results/meta/multiscale-digits/meta-broyden-seed0/solver": (30, 29, 34),
    "results/meta/trellisnet-shakespeare/meta-broyden-seed0/solver": (26, 27, 33),
}
"""Files of schema 1, with evaluations on the problem of the test: of the version that wrote them, but for a MetaBroyden of
several axes, whose samples are handed over with their secant pairs since."""


@pytest.mark.parametrize(("name", "nfe"), OLD.items())
def test_a_file_of_schema_1_solves_as_it_did(name, nfe):
    path = ROOT / f"{name}.safetensors"
    assert described(path.read_bytes())["schema"] == 1
    solver, generator = mb.load_solver(path), torch.Generator().manual_seed(0)
    layout, several = solver.layout, not isinstance(solver.layout.shape[0], int)
    parts = layout.shape if several else (layout.shape,)
    x = tuple(torch.randn(3, *part, generator=generator) for part in parts)
    seen = torch.randn(3, solver.context_channels, *layout.extents(layout.shape), generator=generator)

    def f(z, context):
        _, x, rate = context
        z = z if several else (z,)
        rates = [rate.view(-1, *[1] * (part.dim() - 1)) for part in z]
        shifts = [0.6 * part.roll(1, 1) - 0.5 * part.roll(2, 1) for part in z]
        found = tuple(torch.tanh(r * m + b) for r, m, b in zip(rates, shifts, x, strict=True))
        return found if several else found[0]

    z0, context = tuple(map(torch.zeros_like, x)), (seen, x, torch.linspace(0.3, 0.95, 3))
    safeguard = replace(solver.config.safeguard, resume_below=100.0)  # as it was then
    solver.config = replace(solver.config, safeguard=safeguard)
    found = mb.solve(f, z0 if several else z0[0], context, solver=solver, rtol=1e-5, max_nfe=60, throw=False)
    assert (found.nfe - torch.tensor(nfe)).abs().max() <= 2, "roundings of another machine aside"


@pytest.mark.parametrize(("name", "weights"), [("meta-broyden", "lstm"), ("coordinatewise", "scaled")])
def test_what_a_file_of_schema_1_leaves_out_means_what_it_meant_then(tmp_path, name, weights):
    option = "coefficients" if name == "meta-broyden" else "preprocessing"
    solver = some_solver(name, conditioning="input", **{option: weights})
    old = {new: old for old, new in deprecated.OPTIONS.items()}
    left_out = {option, "dilations", "initializer_kernels"}
    config = {old.get(key, key): value for key, value in asdict(solver.config).items() if key not in left_out}
    config |= {"layout": "nchw", "context": "native"}
    path = mb.save_solver(solver, tmp_path / "s.safetensors")
    path.write_bytes(with_header(path.read_bytes(), lambda header: header.update(schema=1, config=config)))
    assert mb.load_solver(path).config == solver.config


# --- damaged files


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def described(data: bytes) -> dict:
    return json.loads(header_of(data)[0]["__metadata__"]["metabroyden"])


def with_text(data: bytes, text: str) -> bytes:
    """The file with another text in the description's place, and without a checksum, as there was none once."""
    header, rest = header_of(data)
    header["__metadata__"] = {"metabroyden": text}
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + rest


def with_header(data: bytes, change: Callable[[dict], Any]) -> bytes:
    ours = described(data)
    change(ours)
    return with_text(data, json.dumps(ours))


def altered(header: dict, changes: dict) -> None:
    """Put these values into a description; `...` for none."""
    for key, value in changes.items():
        if value is ...:
            del header[key]
        elif isinstance(value, dict) and isinstance(header.get(key), dict):
            altered(header[key], value)
        else:
            header[key] = value


FILES: dict[str, tuple[Callable, Callable, Callable]] = {
    "solver": (small_solver, mb.save_solver, mb.load_solver),
    "model": (small_model, zoo.save_model, zoo.load_model),
    "layered": (lambda: zoo.MLPClassifier(zoo.MLPClassifierConfig(hidden=4, depth=2)), zoo.save_model, zoo.load_model),
    **{name: (lambda name=name: some_solver(name), mb.save_solver, mb.load_solver) for name in SOLVERS},
}
every_file = pytest.mark.parametrize("name", ["solver", "model"])
REFUSED: list[tuple[str, Any, str | None]] = [
    ("grouped", lambda data: data[: len(data) // 2], "truncated or foreign"),
    ("grouped", lambda data: data[:5], "truncated or foreign"),
    ("grouped", lambda data: b"", "truncated or foreign"),
    ("grouped", lambda data: b"PK\x03\x04" + data, "truncated or foreign"),
    ("grouped", lambda data: safetensors.torch.save({"a": torch.ones(2)}), "not one that metabroyden wrote"),
    ("grouped", {"schema": 99}, "schema 99, newer than 2: update metabroyden"),
    ("grouped", {"schema": checkpoint.SCHEMA + 1}, "newer than"),
    ("grouped", {"schema": 0}, "damaged: schema 0"),
    ("grouped", {"schema": True}, "damaged: schema True"),
    ("grouped", {"schema": "1"}, "damaged: schema '1'"),
    ("grouped", {"kind": 5}, "damaged: schema 2, kind 5"),
    ("grouped", {"kind": "solver/quantum"}, "unknown kind 'quantum'"),
    ("grouped", {"kind": "model/conv"}, "holds a 'model/conv', wanted a 'solver'"),
    ("grouped", {"fingerprint": ...}, "description is damaged"),
    ("grouped", {"config": {"hidden": 7}}, "weights do not fit"),
    ("grouped", {"config": {"shape": [-3, 3, 3]}}, "damaged: "),
    ("grouped", {"config": {"safeguard": {"memory": 0}}}, "memory must be an integer"),
    ("grouped", {"config": {"depth": 7}}, "unknown config fields"),
    ("grouped", {"config": {"hidden": 10**9}}, None),
    ("grouped", {"config": {"shape": [10**6, 10**6, 10**6]}}, None),
    ("meta-broyden", {"config": {"learned_steps": 10**12}}, None),
    ("meta-broyden", {"config": {"rank": 10**5, "initializer_width": 10**5}}, None),
    ("meta-broyden", {"config": {"dilations": []}}, None),
    ("meta-broyden", {"config": {"dilations": [1, -1]}}, None),
    ("meta-broyden", {"config": {"dilations": "11"}}, None),
    ("universal", {"config": {"hidden": 60_000}}, None),
    ("universal", {"config": {"shape": []}}, None),
    ("universal", {"config": {"hidden": 8.0}}, None),
    ("universal", {"config": {"hidden": "8"}}, None),
    ("universal", {"config": {"safeguard": {"horizon": "20"}}}, None),
    ("started", {"config": {"classical": {"name": "broyden", "options": [1]}}}, None),
    ("started", {"config": {"classical": {"name": ["broyden"]}}}, None),
    ("model", {"config": {"classes": -1}}, "classes is -1"),
    ("model", {"config": {"side": 10**6}}, "many times what the file holds"),
    ("model", {"config": {"n": 10**9}}, "n is 1000000000, wanted from 0"),
    ("model", {"config": {"n": 10.0}}, "n is 10.0, wanted int"),
    ("model", {"config": [1]}, "config is"),
    ("model", {"twin": {"kind": "explicit", "depth": 10**9}}, "many times what the file holds"),
    ("model", {"twin": {"kind": "unrolled", "depth": "3"}}, "depth must be an integer"),
    ("model", {"twin": {"kind": ["unrolled"]}}, "damaged"),
    ("model", {"twin": "unrolled"}, "twin is 'unrolled'"),
    ("model", {"to_half": "yes"}, "to_half is 'yes'"),
    ("layered", {"config": {"depth": 10**5}}, None),
    ("layered", {"config": {"depth": 10**12}}, None),
    *(
        ("solver", lambda data, text=text: with_text(data, text), None)
        for text in ("[" * 100_000, '{"schema": 1, "kind": ' + "[" * 100_000, '{"a":' * 100_000, "9" * 100_000)
    ),
    ("solver", lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5, None),
]
"""What is done to a file, by a function of its content or to its description, and what its refusal says where known."""


@contextmanager
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more < (300_000_000 if sys.platform == "darwin" else 300_000), (
        "bytes, elsewhere kilobytes, for files of a few"
    )


REFUSED_IDS = [f"{name}-{'bytes' if callable(damage) else str(damage):.60}" for name, damage, _ in REFUSED]


@pytest.mark.parametrize(("name", "damage", "words"), REFUSED, ids=REFUSED_IDS)
def test_a_file_that_cannot_be_used_is_refused_with_a_sentence_before_it_takes_memory(tmp_path, name, damage, words):
    build, save, load = FILES[name]
    path = save(build(), tmp_path / "s.safetensors")
    data = path.read_bytes()
    path.write_bytes(damage(data) if callable(damage) else with_header(data, lambda header: altered(header, damage)))
    with little_memory(), pytest.raises(mb.CheckpointError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_what_is_not_there_or_no_solver_is_refused(tmp_path):
    words = r"neither a file or folder nor the name of a shipped solver \("
    refused(words, lambda: mb.load_solver("conv-digits-typo"), FileNotFoundError)
    refused("save_solver takes", lambda: mb.save_solver(torch.nn.Linear(2, 2), tmp_path / "s"), TypeError)
    refused("save_model takes", lambda: zoo.save_model(torch.nn.Linear(2, 2), tmp_path / "x"), TypeError)
    assert not list(tmp_path.iterdir())


def outcome(load: Callable, path: Path, data: bytes, whole: Any) -> str:
    """What comes of a damaged file: anything but a refusal or the same module is an error of ours."""
    path.write_bytes(data)
    try:
        found = load(path)
    except mb.CheckpointError as error:
        return "refused" if str(path) in str(error) else f"refused without the file's name: {error}"
    return "same" if same(whole, found) else "other weights"


@every_file
def test_a_flipped_bit_is_refused_or_changes_nothing_and_a_truncated_file_is_refused(tmp_path, name):
    build, save, load = FILES[name]
    data, drawn, path = save(build(), tmp_path / "whole").read_bytes(), random.Random(0), tmp_path / "damaged"
    whole, found = load(tmp_path / "whole"), Counter()
    for bit in drawn.sample(range(8 * len(data)), 500):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        found[outcome(load, path, bytes(flipped), whole)] += 1
    assert found["refused"] + found["same"] == 500, found
    assert found["same"] < 10, "in the name of the checksum alone a flip does no harm"
    length = int.from_bytes(data[:8], "little")
    ends = {*range(20), *range(8 + length - 9, 8 + length + 9), *range(0, len(data), 31), len(data) - 1}
    for end in sorted(ends):
        assert outcome(load, path, data[:end], None) == "refused", end
    assert outcome(load, path, data + b"0", None) == "refused"


def leaves(value: Any, way: tuple = ()) -> list[tuple]:
    """The ways to all values in a JSON value, those of objects and lists included."""
    found = [way] if way else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += leaves(item, (*way, key))
    return found


def put(value: Any, way: tuple, new: Any) -> None:
    """Replace the value at the end of a way; leave it out where the new one is `...`."""
    for key in way[:-1]:
        value = value[key]
    if new is ...:
        del value[way[-1]]
    else:
        value[way[-1]] = new


FOREIGN: list[Any] = [
    *(..., None, True, False, "", "x", [], [1], [-2, 0], [[1]], {}, {"a": None}),
    *(-3, -1, 0, 1, 2, 9, 10**6, 10**9, 10**12, 2**63, 10**40, math.nan, math.inf, -0.5, 1.5),
]
"""What may stand in a description in the place of anything; `...` for nothing at all."""


def test_a_hand_damaged_description_is_refused_or_serves(tmp_path):
    path, cases = tmp_path / "damaged", []
    twin = (lambda: zoo.unrolled_twin(small_model(), 3), zoo.save_model, zoo.load_model)
    classical = [
        (lambda name=name: mb.get_solver(name), mb.save_solver, mb.load_solver)
        for name in mb.list_solvers(learned=False)
    ]
    for build, save, load in [*FILES.values(), twin, *classical, (zoo.ConvClassifier, zoo.save_model, zoo.load_model)]:
        data = save(build(), path).read_bytes()
        cases += [(load, data, way, new) for way in leaves(described(data)) for new in FOREIGN]
    with little_memory():
        for load, data, way, new in random.Random(0).sample(cases, 300):
            path.write_bytes(with_header(data, lambda header, way=way, new=new: put(header, way, new)))
            with suppress(mb.CheckpointError):
                load(path)


COMPLEX = torch.complex64


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [("solver", (COMPLEX, torch.float16, torch.bfloat16, torch.int32)), ("model", (COMPLEX, torch.float64))],
)
def test_weights_that_no_state_can_have_or_of_several_precisions_are_refused(tmp_path, name, dtypes):
    build, _, load = FILES[name]
    module, path = build(), tmp_path / "file"
    header = module.describe() if name == "solver" else {"config": module.describe()}
    kind = "solver/universal" if name == "solver" else f"model/{module.kind}"
    for dtype in dtypes:
        for count in {1: 1, len(module.state_dict()): 2}:
            tensors = {n: v.to(dtype) if k < count else v for k, (n, v) in enumerate(module.state_dict().items())}
            if (dtype, count) == (torch.float64, len(tensors)):
                continue  # a model may be in double precision
            checkpoint.write(path, kind, tensors, header)
            refused("the weights do not fit", lambda: load(path), mb.CheckpointError)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_solver_whose_weights_are_not_finite_is_refused(tmp_path, value):
    solver = mb.load_solver("universal")
    with torch.no_grad():
        next(solver.parameters()).view(-1)[0] = value
    path = mb.save_solver(solver, tmp_path / "solver.safetensors")
    refused("is not finite", lambda: mb.load_solver(path), mb.CheckpointError)


@every_file
def test_a_file_without_a_checksum_still_loads(tmp_path, name):
    build, save, load = FILES[name]
    path = save(build(), tmp_path / "f")
    whole = load(path)
    path.write_bytes(with_header(path.read_bytes(), lambda header: None))
    assert same(load(path), whole)


def test_the_file_describes_itself_and_its_checksum_is_of_tensors_names_and_description(tmp_path):
    data = mb.save_solver(some_solver(), tmp_path / "s").read_bytes()
    tensors, _ = checkpoint.read(tmp_path / "s")
    kept, text = (header_of(data)[0]["__metadata__"][name] for name in ("blake2b", "metabroyden"))
    ours = json.loads(text)
    assert (ours["kind"], ours["schema"], ours["summary"]) == ("solver/grouped", checkpoint.SCHEMA, {"seconds": 1.5})
    assert (ours["config"]["layout"], ours["config"]["shape"]) == ("image", [4, 3, 3])
    one, two = sorted(name for name in tensors if tensors[name].numel() > 1)[:2]
    assert checkpoint._checksum(tensors, text) == kept
    for other in (
        {one: tensors[one] + 1},
        {one: tensors[one].reshape(-1, 1)},
        {one: tensors[one].view(torch.int32)},
        {one: tensors[two], two: tensors[one]},
    ):
        assert checkpoint._checksum(tensors | other, text) != kept
    assert checkpoint._checksum(tensors, text + " ") != kept
