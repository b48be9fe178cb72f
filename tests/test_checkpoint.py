"""Files describe themselves, are written whole, and refused with a sentence when they cannot be used."""

from __future__ import annotations

import json
import math
import random
import resource
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import metabroyden as mb
from metabroyden import checkpoint, deprecated
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.solvers.registry import list_solvers
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import (
    ConvClassifier,
    DenseClassifier,
    DenseClassifierConfig,
    MLPClassifier,
    MLPClassifierConfig,
    load_model,
    save_model,
    unrolled_twin,
)

PYRAMID = Layout("pyramid", ((2, 4, 4), (3, 2, 2)))


def some_solver(name: str = "grouped", layout: Layout | None = None):
    solver = make_learned(name, Layout("image", (4, 3, 3)) if layout is None else layout)
    for parameter in solver.parameters():
        parameter.data.normal_()
    solver.fingerprint, solver.summary = "abc", {"seconds": 1.5}
    return solver


CASES = [
    *[(name, None, torch.float32) for name in list_solvers(learned=True)],
    ("meta-broyden", PYRAMID, torch.float64),
]


@pytest.mark.parametrize(("name", "layout", "dtype"), CASES)
def test_a_learned_solver_comes_back_as_it_was(tmp_path, name, layout, dtype):
    solver = some_solver(name, layout).to(dtype)
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "deep" / "s.safetensors"))
    assert type(loaded) is type(solver)
    assert loaded.config == solver.config
    assert (loaded.fingerprint, loaded.summary) == ("abc", {"seconds": 1.5})
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for key, value in solver.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


@pytest.mark.parametrize("name", list_solvers(learned=False, splitting=False))
def test_a_classical_solver_comes_back_as_it_was(tmp_path, name):
    solver = mb.get_solver(name, **({} if name == "substitution" else {"damping": 0.7}))
    assert mb.load_solver(mb.save_solver(solver, tmp_path / "s.safetensors")) == solver


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(data: bytes, change) -> bytes:
    """The file with another description, and without a checksum, as there was none once."""
    header, rest = header_of(data)
    del header["__metadata__"]["blake2b"]
    ours = json.loads(header["__metadata__"]["metabroyden"])
    change(ours)
    header["__metadata__"]["metabroyden"] = json.dumps(ours)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def test_the_file_describes_itself_without_pickle(tmp_path):
    data = mb.save_solver(some_solver(), tmp_path / "s.safetensors").read_bytes()
    ours = json.loads(header_of(data)[0]["__metadata__"]["metabroyden"])
    assert ours["kind"] == "solver/grouped"
    assert ours["schema"] == checkpoint.SCHEMA
    assert ours["config"]["layout"] == "image"
    assert ours["config"]["shape"] == [4, 3, 3]
    assert ours["summary"] == {"seconds": 1.5}


DAMAGE = [
    (lambda data: data[: len(data) // 2], "truncated or foreign"),
    (lambda data: data[:5], "truncated or foreign"),
    (lambda data: b"", "truncated or foreign"),
    (lambda data: b"PK\x03\x04" + data, "truncated or foreign"),
    (lambda data: safetensors.torch.save({"a": torch.ones(2)}), "not one that metabroyden wrote"),
    (lambda data: with_header(data, lambda h: h.update(schema=99)), "schema 99, newer than 2: update metabroyden"),
    (lambda data: with_header(data, lambda h: h.update(schema=checkpoint.SCHEMA + 1)), "newer than"),
    (lambda data: with_header(data, lambda h: h.update(schema=0)), "damaged: schema 0"),
    (lambda data: with_header(data, lambda h: h.update(schema=True)), "damaged: schema True"),
    (lambda data: with_header(data, lambda h: h.update(kind="solver/quantum")), "unknown kind 'quantum'"),
    (lambda data: with_header(data, lambda h: h.update(kind="model/conv")), "holds a 'model/conv', wanted a 'solver'"),
    (lambda data: with_header(data, lambda h: h.pop("fingerprint")), "description is damaged"),
    (lambda data: with_header(data, lambda h: h["config"].update(hidden=7)), "weights do not fit"),
    (lambda data: with_header(data, lambda h: h.update(kind=5)), "damaged: schema 2, kind 5"),
    (lambda data: with_header(data, lambda h: h.update(schema="1")), "damaged: schema '1'"),
    (lambda data: with_header(data, lambda h: h["config"].update(shape=[-3, 3, 3])), "damaged: "),
    (lambda data: with_header(data, lambda h: h["config"]["safeguard"].update(memory=0)), "memory must be an integer"),
    (lambda data: with_header(data, lambda h: h["config"].update(depth=7)), "unknown config fields"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[words for _, words in DAMAGE])
def test_a_file_that_cannot_be_used_is_refused_with_a_sentence(tmp_path, damage, words):
    path = mb.save_solver(some_solver(), tmp_path / "s.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(mb.CheckpointError, match=words) as caught:
        mb.load_solver(path)
    assert str(path) in str(caught.value)


def test_what_is_not_there_or_no_solver_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a file nor the name of a shipped solver \("):
        mb.load_solver("digits-conv-typo")
    with pytest.raises(TypeError, match="save_solver takes"):
        mb.save_solver(torch.nn.Linear(2, 2), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_model_comes_back_as_it_was(tmp_path):
    model = ConvClassifier()
    loaded = load_model(save_model(model, tmp_path / "m.safetensors"), solver=mb.Picard(), max_nfe=9, warn=False)
    assert loaded.deq.max_nfe == 9
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    assert load_model(save_model(model.double(), tmp_path / "m.safetensors")).head.weight.dtype == torch.float64
    assert load_model(save_model(model.half(), tmp_path / "m.safetensors")).head.weight.dtype == torch.half
    with pytest.raises(TypeError, match="save_model takes"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "x")


def test_a_large_model_is_stored_in_half_precision_and_comes_back_in_float32(tmp_path, monkeypatch):
    model = ConvClassifier()
    whole = save_model(model, tmp_path / "whole.safetensors").stat().st_size
    monkeypatch.setattr("metabroyden.checkpoint.LARGEST", 100)
    assert save_model(model, tmp_path / "whole.safetensors").stat().st_size == whole, "only where it was asked for"
    with torch.no_grad():
        model.head.bias[0] = 1e6  # more than half precision holds
    path = save_model(model, tmp_path / "slim.safetensors", slim=True)
    assert path.stat().st_size < 0.6 * whole
    for key, value in load_model(path).state_dict().items():
        wanted = model.state_dict()[key]
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted if key == "head.bias" else wanted.half().float())
    for dtype in (torch.float64, torch.half, torch.bfloat16):
        again = load_model(save_model(model.to(dtype), tmp_path / "m.safetensors", slim=True))
        assert again.head.weight.dtype == dtype
        assert torch.equal(again.head.weight, model.head.weight)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "a.txt", "old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


ROOT = Path(__file__).parents[1]


def test_every_solver_among_the_results_and_of_the_package_loads():
    paths = [*ROOT.glob("results/digits/seed*/[!m]*.safetensors"), *ROOT.glob("results/generalise/*.safetensors")]
    paths += [*ROOT.glob("results/*/*/*/solver.safetensors"), *mb.list_pretrained()]
    assert len(paths) > 17
    for path in paths:
        assert mb.load_solver(path).layout.channels > 0, path


OLD = {
    "metabroyden/pretrained/digits-conv": (40, 41, 58),
    "metabroyden/pretrained/universal": (4, 4, 4),
    "results/digits/seed0/coordinatewise": (25, 21, 24),
    "results/meta/conv-digits/meta-broyden-seed0/solver": (55, 50, 56),
    "results/meta/mlp-fashion/meta-broyden-seed0/solver": (8, 12, 17),
    "results/meta/multiscale-digits/meta-broyden-seed0/solver": (38, 48, 60),
    "results/meta/trellisnet-shakespeare/meta-broyden-seed0/solver": (26, 43, 49),
}
"""Files of schema 1, with the evaluations of the version that wrote them on the problem of the test."""


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
        moved = [0.6 * part.roll(1, 1) - 0.5 * part.roll(2, 1) for part in z]
        found = tuple(torch.tanh(r * m + b) for r, m, b in zip(rates, moved, x, strict=True))
        return found if several else found[0]

    z0, context = tuple(map(torch.zeros_like, x)), (seen, x, torch.linspace(0.3, 0.95, 3))
    found = mb.solve(f, z0 if several else z0[0], context, solver=solver, rtol=1e-5, max_nfe=60, throw=False)
    assert (found.nfe - torch.tensor(nfe)).abs().max() <= 2, "roundings of another machine aside"


@pytest.mark.parametrize(("name", "weights"), [("meta-broyden", "lstm"), ("coordinatewise", "scaled")])
def test_what_a_file_of_schema_1_leaves_out_means_what_it_meant_then(tmp_path, name, weights):
    option = "coefficients" if name == "meta-broyden" else "preprocessing"
    solver = make_learned(name, Layout("image", (4, 3, 3)), conditioning="input", **{option: weights})
    old = {new: old for old, new in deprecated.OPTIONS.items()}
    left_out = {option, "dilations", "initializer_kernels"}
    config = {old.get(key, key): value for key, value in asdict(solver.config).items() if key not in left_out}
    config |= {"layout": "nchw", "context": "native"}
    path = mb.save_solver(solver, tmp_path / "s.safetensors")
    path.write_bytes(with_header(path.read_bytes(), lambda header: header.update(schema=1, config=config)))
    assert mb.load_solver(path).config == solver.config


def small_solver() -> Any:
    return make_learned("universal", Layout("vector", (1,)), hidden=4)


def small_model() -> Any:
    return DenseClassifier(DenseClassifierConfig(n=6, side=3, classes=3))


FILES: dict[str, tuple[Callable, Callable, Callable]] = {
    "solver": (small_solver, mb.save_solver, mb.load_solver),
    "model": (small_model, save_model, load_model),
}
every_file = pytest.mark.parametrize("name", FILES)


def same(one: Any, other: Any) -> bool:
    """Whether two modules are configured alike and have the same weights."""
    weights = one.state_dict()
    return one.config == other.config and all(torch.equal(weights[k], v) for k, v in other.state_dict().items())


def outcome(load: Callable, path: Path, data: bytes, whole: Any) -> str:
    """What comes of a damaged file: anything but a refusal or the same module is an error of ours."""
    path.write_bytes(data)
    try:
        found = load(path)
    except mb.CheckpointError as error:
        return "refused" if str(path) in str(error) else f"refused without the file's name: {error}"
    return "same" if same(whole, found) else "other weights"


@every_file
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, name):
    build, save, load = FILES[name]
    data, drawn = save(build(), tmp_path / "whole").read_bytes(), random.Random(0)
    whole, found = load(tmp_path / "whole"), Counter()
    for bit in drawn.sample(range(8 * len(data)), 500):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        found[outcome(load, tmp_path / "flipped", bytes(flipped), whole)] += 1
    assert found["refused"] + found["same"] == 500, found
    assert found["same"] < 10, "in the name of the checksum alone a flip does no harm"


@every_file
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, name):
    build, save, load = FILES[name]
    data = save(build(), tmp_path / "whole").read_bytes()
    length = int.from_bytes(data[:8], "little")
    ends = {*range(20), *range(8 + length - 9, 8 + length + 9), *range(0, len(data), 31), len(data) - 1}
    for end in sorted(ends):
        assert outcome(load, tmp_path / "cut", data[:end], None) == "refused", end
    assert outcome(load, tmp_path / "long", data + b"0", None) == "refused"


def described(data: bytes) -> dict:
    return json.loads(header_of(data)[0]["__metadata__"]["metabroyden"])


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
SOLVERS = list_solvers(learned=True)


@pytest.fixture(scope="module")
def described_files(tmp_path_factory) -> list[tuple[Callable, bytes, list[tuple]]]:
    """(loader, content, ways into the description) of files of many kinds."""
    path = tmp_path_factory.mktemp("described") / "file"
    solvers = [*map(some_solver, SOLVERS), *map(mb.get_solver, list_solvers(learned=False))]
    models = ConvClassifier(), MLPClassifier(MLPClassifierConfig(hidden=4, depth=2)), unrolled_twin(small_model(), 3)
    found = [(mb.load_solver, mb.save_solver(solver, path).read_bytes()) for solver in solvers]
    found += [(load_model, save_model(model, path).read_bytes()) for model in models]
    return [(load, data, leaves(described(data))) for load, data in found]


def test_a_hand_damaged_description_is_refused_or_serves(described_files, tmp_path):
    path, drawn = tmp_path / "damaged", random.Random(0)
    cases = [(load, data, way, new) for load, data, ways in described_files for way in ways for new in FOREIGN]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load, data, way, new in drawn.sample(cases, 300):
        path.write_bytes(with_header(data, lambda header, way=way, new=new: put(header, way, new)))
        with suppress(mb.CheckpointError):
            load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes, for files of a few"


HUGE = [
    ("universal", {"hidden": 60_000}),
    ("grouped", {"hidden": 10**9}),
    ("grouped", {"shape": [10**6, 10**6, 10**6]}),
    ("meta-broyden", {"learned_steps": 10**12}),
    ("meta-broyden", {"rank": 10**5, "initializer_width": 10**5}),
    ("meta-broyden", {"dilations": []}),
    ("meta-broyden", {"dilations": [1, -1]}),
    ("meta-broyden", {"dilations": "11"}),
    ("universal", {"shape": []}),
    ("universal", {"hidden": 8.0}),
    ("universal", {"hidden": "8"}),
    ("universal", {"safeguard": {"horizon": "20"}}),
    ("started", {"classical": {"name": "broyden", "options": [1]}}),
    ("started", {"classical": {"name": ["broyden"], "options": {}}}),
]


@pytest.mark.parametrize(("name", "config"), HUGE, ids=repr)
def test_impossible_sizes_and_types_are_refused_before_they_take_memory(tmp_path, name, config):
    path = mb.save_solver(some_solver(name), tmp_path / "s.safetensors")
    path.write_bytes(with_header(path.read_bytes(), lambda header: header["config"].update(config)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(mb.CheckpointError):
        mb.load_solver(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


MODELS = [
    ({"config": {"classes": -1}}, "classes is -1"),
    ({"config": {"side": 10**6}}, "many times what the file holds"),
    ({"config": {"n": 10**9}}, "n is 1000000000, wanted from 0"),
    ({"config": {"n": 10.0}}, "n is 10.0, wanted int"),
    ({"config": [1]}, "config is"),
    ({"twin": {"kind": "explicit", "depth": 10**9}}, "many times what the file holds"),
    ({"twin": {"kind": "unrolled", "depth": "3"}}, "depth must be an integer"),
    ({"twin": {"kind": ["unrolled"]}}, "damaged"),
    ({"twin": "unrolled"}, "twin is 'unrolled'"),
    ({"to_half": "yes"}, "to_half is 'yes'"),
]


@pytest.mark.parametrize(("changes", "words"), MODELS, ids=repr)
def test_an_impossible_model_is_refused_with_a_sentence(tmp_path, changes, words):
    path = save_model(small_model(), tmp_path / "m.safetensors")

    def change(header: dict) -> None:
        for key, value in changes.items():
            header[key] = (
                header[key] | value if isinstance(header.get(key), dict) and isinstance(value, dict) else value
            )

    path.write_bytes(with_header(path.read_bytes(), change))
    with pytest.raises(mb.CheckpointError, match=words):
        load_model(path)


def test_a_deep_layered_model_that_the_file_does_not_hold_is_refused(tmp_path):
    path = save_model(MLPClassifier(MLPClassifierConfig(hidden=4, depth=2)), tmp_path / "m.safetensors")
    data = path.read_bytes()
    for depth in (10**5, 10**12):
        path.write_bytes(with_header(data, lambda header, depth=depth: header["config"].update(depth=depth)))
        with pytest.raises(mb.CheckpointError):
            load_model(path)


def test_brackets_beyond_counting_are_refused(tmp_path):
    path = mb.save_solver(small_solver(), tmp_path / "s.safetensors")
    header, rest = header_of(path.read_bytes())
    del header["__metadata__"]["blake2b"]
    for text in ("[" * 100_000, '{"schema": 1, "kind": ' + "[" * 100_000, '{"a":' * 100_000, "9" * 100_000):
        header["__metadata__"]["metabroyden"] = text
        written = json.dumps(header).encode()
        path.write_bytes(len(written).to_bytes(8, "little") + written + rest)
        with pytest.raises(mb.CheckpointError):
            mb.load_solver(path)
    written = b"[" * 100_000
    path.write_bytes(len(written).to_bytes(8, "little") + written)
    with pytest.raises(mb.CheckpointError):
        mb.load_solver(path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_a_solver_with_weights_that_no_state_can_have_is_refused(tmp_path, dtype):
    solver = small_solver()
    for mixed in (False, True):
        tensors = {name: value.to(dtype) for name, value in solver.state_dict().items()}
        if mixed:
            tensors = dict(list(tensors.items())[:1]) | dict(list(solver.state_dict().items())[1:])
        checkpoint.write(tmp_path / "s", "solver/universal", tensors, solver.describe())
        with pytest.raises(mb.CheckpointError, match="the weights do not fit"):
            mb.load_solver(tmp_path / "s")


def test_a_model_with_complex_weights_or_of_several_precisions_is_refused(tmp_path):
    model = small_model()
    names = list(model.state_dict())
    for dtype, count in ((torch.complex64, len(names)), (torch.complex64, 1), (torch.float64, 1)):
        tensors = {n: v.to(dtype) if n in names[:count] else v for n, v in model.state_dict().items()}
        checkpoint.write(tmp_path / "m", f"model/{model.kind}", tensors, {"config": model.describe()})
        with pytest.raises(mb.CheckpointError, match="the weights do not fit"):
            load_model(tmp_path / "m")


@every_file
def test_a_file_without_a_checksum_still_loads(tmp_path, name):
    build, save, load = FILES[name]
    path = save(build(), tmp_path / "f")
    whole = load(path)
    path.write_bytes(with_header(path.read_bytes(), lambda header: None))
    assert same(load(path), whole)


def test_the_checksum_is_of_tensors_names_and_description(tmp_path):
    data = mb.save_solver(small_solver(), tmp_path / "s").read_bytes()
    kept = header_of(data)[0]["__metadata__"]["blake2b"]
    tensors, _ = checkpoint.read(tmp_path / "s")
    text = header_of(data)[0]["__metadata__"]["metabroyden"]
    one, two = sorted(name for name in tensors if tensors[name].numel() > 1)[:2]
    assert checkpoint._checksum(tensors, text) == kept
    for other in (
        {**tensors, one: tensors[one] + 1},
        {**tensors, one: tensors[one].reshape(-1)},
        {**tensors, one: tensors[one].view(torch.int32)},
        {**tensors, one: tensors[two], two: tensors[one]},
    ):
        assert checkpoint._checksum(other, text) != kept
    assert checkpoint._checksum(tensors, text + " ") != kept


@pytest.fixture(params=["context", "default"])
def meta_device(request):
    """The meta device as the default one."""
    if request.param == "context":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)


@pytest.mark.parametrize("name", [*mb.list_pretrained(), *SOLVERS])
def test_a_solver_comes_to_the_cpu_whatever_the_default_device(tmp_path, name, meta_device):
    if name not in mb.list_pretrained():
        with torch.device("cpu"):
            name = mb.save_solver(some_solver(name), tmp_path / "s")
    solver = mb.load_solver(name)
    assert {value.device.type for value in solver.state_dict().values()} == {"cpu"}


def test_a_model_comes_to_the_cpu_whatever_the_default_device(tmp_path, meta_device):
    with torch.device("cpu"):
        save_model(small_model(), tmp_path / "m")
    for options in ({}, {"solver": mb.Picard()}):
        found = load_model(tmp_path / "m", **options)
        assert {value.device.type for value in found.state_dict().values()} == {"cpu"}


def test_what_is_saved_twice_is_the_same_file(tmp_path):
    solver = mb.load_solver("universal")
    files = {mb.save_solver(solver, tmp_path / f"{number}.safetensors").read_bytes() for number in range(12)}
    assert len(files) == 1
    assert len(next(iter(files))) % 4 == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_solver_whose_weights_are_not_finite_is_refused(tmp_path, value):
    solver = mb.load_solver("universal")
    with torch.no_grad():
        next(solver.parameters()).view(-1)[0] = value
    path = mb.save_solver(solver, tmp_path / "solver.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="is not finite"):
        mb.load_solver(path)
