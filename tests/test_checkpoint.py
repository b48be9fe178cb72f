"""Files describe themselves, are written whole, and refused with a sentence when they cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import metabroyden as mb
from metabroyden import checkpoint
from metabroyden.learned import ADJOINT, LEARNED, LEARNED_SPLITTING
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.models import ConvClassifier, load_model, save_model
from metabroyden.storage import atomic_write


def some_solver(name: str = "grouped"):
    solver = make_learned(name, Layout("nchw", (4, 3, 3)))
    for parameter in solver.parameters():
        parameter.data.normal_()
    solver.fingerprint, solver.summary = "abc", {"seconds": 1.5}
    return solver


@pytest.mark.parametrize("name", sorted(LEARNED | LEARNED_SPLITTING | ADJOINT))
def test_a_learned_solver_comes_back_as_it_was(tmp_path, name):
    solver = some_solver(name)
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "deep" / "s.safetensors"))
    assert type(loaded) is type(solver)
    assert loaded.config == solver.config
    assert (loaded.fingerprint, loaded.summary) == ("abc", {"seconds": 1.5})
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for key, value in solver.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


def test_a_solver_keeps_its_precision(tmp_path):
    solver = some_solver().double()
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "s.safetensors"))
    for key, value in solver.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


@pytest.mark.parametrize("name", sorted(mb.SOLVERS))
def test_a_classical_solver_comes_back_as_it_was(tmp_path, name):
    solver = mb.make_solver(name, damping=0.7)
    assert mb.load_solver(mb.save_solver(solver, tmp_path / "s.safetensors")) == solver


def test_every_shipped_solver_loads():
    assert mb.pretrained()
    for name in mb.pretrained():
        assert mb.load_solver(name).layout.channels > 0


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(data: bytes, change) -> bytes:
    header, rest = header_of(data)
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
    assert ours["config"]["layout"] == "nchw"
    assert ours["config"]["shape"] == [4, 3, 3]
    assert ours["summary"] == {"seconds": 1.5}


DAMAGE = [
    (lambda data: data[: len(data) // 2], "truncated or foreign"),
    (lambda data: data[:5], "truncated or foreign"),
    (lambda data: b"", "truncated or foreign"),
    (lambda data: b"PK\x03\x04" + data, "truncated or foreign"),
    (lambda data: safetensors.torch.save({"a": torch.ones(2)}), "not one that metabroyden wrote"),
    (lambda data: with_header(data, lambda h: h.update(schema=99)), "schema 99, newer than 1: update metabroyden"),
    (lambda data: with_header(data, lambda h: h.update(kind="solver/quantum")), "unknown kind 'quantum'"),
    (lambda data: with_header(data, lambda h: h.update(kind="model/conv")), "holds a 'model/conv', wanted a 'solver'"),
    (lambda data: with_header(data, lambda h: h.pop("fingerprint")), "description is damaged"),
    (lambda data: with_header(data, lambda h: h["config"].update(hidden=7)), "weights do not fit"),
    (lambda data: with_header(data, lambda h: h.update(kind=5)), "damaged: schema 1, kind 5"),
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


def test_every_solver_among_the_results_loads():
    root = Path(__file__).parents[1] / "results"
    paths = [*root.glob("digits/seed*/[!m]*.safetensors"), *root.glob("generalise/*.safetensors")]
    paths += [*root.glob("*/*/*/solver.safetensors")]
    assert len(paths) > 15
    for path in paths:
        assert mb.load_solver(path).config, path
