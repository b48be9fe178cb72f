"""Solvers and models as folders that Hugging Face's Hub takes as they are, and those that come with the package."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import metabroyden as mb
from experiments.bench import shipped
from metabroyden import checkpoint, storage
from metabroyden.folder import CARD, CONFIG, WEIGHTS
from metabroyden.learned.base import LearnedSolver
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.zoo import models as zoo
from metabroyden.zoo.data.digits import load_digits
from tests.helpers import refused, same_parameters

NAMES = tuple(sorted(shipped.MODELS))


def some_solver(name: str = "grouped", **options: Any) -> Any:
    solver = make_learned(name, Layout("image", (4, 3, 3)), **options)
    for parameter in solver.parameters():
        parameter.data.normal_()
    solver.fingerprint, solver.summary = "abc", {"seconds": 1.5, "held_out": {"mean_evaluations": 7.5, "solvers": {}}}
    return solver


def small_model() -> Any:
    return zoo.DenseClassifier(zoo.DenseClassifierConfig(n=6, side=3, classes=3))


# --- what is saved comes back


@pytest.mark.parametrize("name", mb.list_solvers(learned=True))
def test_a_learned_solver_comes_back_from_its_folder(tmp_path, name):
    solver = some_solver(name)
    folder = solver.save_pretrained(tmp_path / "deep" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == [CARD, CONFIG, WEIGHTS]
    for load in (type(solver).from_pretrained, LearnedSolver.from_pretrained, mb.load_solver):
        loaded = load(folder)
        assert type(loaded) is type(solver)
        assert loaded.config == solver.config
        assert same_parameters(loaded, solver)
        assert (loaded.fingerprint, loaded.summary) == (solver.fingerprint, solver.summary)


@pytest.mark.parametrize("name", mb.list_solvers(learned=False))
def test_a_classical_solver_comes_back_from_its_config_alone(tmp_path, name):
    solver = mb.get_solver(name)
    some_solver().save_pretrained(tmp_path)
    mb.save_pretrained(solver, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, CONFIG]
    assert mb.load_solver(tmp_path) == solver


@pytest.mark.parametrize("make", [small_model, lambda: zoo.unrolled_twin(small_model(), 3)])
def test_a_model_comes_back_from_its_folder_with_the_options_given(tmp_path, make):
    model = make().eval()
    folder = model.save_pretrained(tmp_path, {"family": "small"})
    options = {"solver": mb.Picard(), "rtol": 1e-2} if isinstance(model.deq, mb.DEQ) else {}
    for load in (zoo.DenseClassifier.from_pretrained, zoo.load_model):
        loaded = load(folder, **options)
        assert torch.equal(loaded(torch.ones(2, 1, 3, 3)), load(folder, **options)(torch.ones(2, 1, 3, 3)))
        assert same_parameters(loaded, model)
        assert not options or (loaded.deq.solver, loaded.deq.rtol) == (mb.Picard(), 1e-2)
    assert checkpoint.read(folder)[1]["summary"] == {"family": "small"}


def test_config_json_is_what_the_weights_file_says_of_itself_and_that_file_loads_alone(tmp_path):
    solver = some_solver("meta-broyden")
    folder = solver.save_pretrained(tmp_path)
    header = checkpoint.read(folder / WEIGHTS)[1]
    assert json.loads((folder / CONFIG).read_text(encoding="utf-8")) == header
    assert header["config"] == json.loads(json.dumps(asdict(solver.config)))
    assert (folder / WEIGHTS).read_bytes() == mb.save_solver(solver, tmp_path / "one-file").read_bytes()
    assert same_parameters(mb.load_solver(folder / WEIGHTS), solver)


def test_the_model_card_says_what_the_summary_holds_and_your_own_stays(tmp_path):
    card = some_solver().save_pretrained(tmp_path) / CARD
    text = card.read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: metabroyden\n")
    for row in ("| states | image (4, 3, 3) |", "| seconds of meta-training | 1.5 |", "| mean evaluations | 7.5 |"):
        assert row in text.splitlines()
    (code,) = (part.split("```")[0] for part in text.split("```python\n")[1:])
    found: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", tmp_path.as_posix()), found)
    assert isinstance(found["solver"], mb.GroupedLSTM)
    mb.save_pretrained(mb.Anderson(memory=3), tmp_path)
    assert "| memory | 3 |" in card.read_text(encoding="utf-8"), "written anew, with what is there now"
    card.write_text("# My solver\n", encoding="utf-8")
    some_solver().save_pretrained(tmp_path)
    assert card.read_text(encoding="utf-8") == "# My solver\n"


# --- what cannot be used is refused


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def with_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def with_text(text: bytes) -> Any:
    return lambda folder: (folder / CONFIG).write_bytes(text)


def with_weights(change: Any) -> Any:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def newer(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with_config(schema=checkpoint.SCHEMA + 1)(folder)


FOREIGN = {"architectures": ["BertModel"], "hidden_size": 768}
OTHER = "config.json is not the description of model.safetensors"
REFUSED = {
    "no config": (without(CONFIG), "has no config.json"),
    "no weights": (without(WEIGHTS), "holds no weights: a folder needs model.safetensors"),
    "another library's": (with_text(json.dumps(FOREIGN).encode()), "not one that metabroyden wrote"),
    "a list": (with_text(b"[1]"), "not one that metabroyden wrote"),
    "no JSON": (with_text(b"{"), "holds no readable JSON"),
    "no text": (with_text(b"\xff\xfe"), "holds no readable JSON"),
    "deep": (with_text(b"[" * 100_000), "holds no readable JSON"),
    "edited": (with_config(fingerprint="abd"), OTHER),
    "of another kind": (with_config(kind="solver/universal"), OTHER),
    "newer": (newer, "has schema 3, newer than 2: update metabroyden"),
    "a bit": (with_weights(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "its checksum does not match"),
    "cut": (with_weights(lambda data: data[:-9]), "truncated or foreign"),
    "others' weights": (with_weights(lambda data: safetensors.torch.save({"a": torch.ones(2)})), OTHER),
    "a description that is no JSON": (
        with_weights(lambda data: safetensors.torch.save({"a": torch.ones(2)}, {"metabroyden": "{"})),
        OTHER,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("kind", ["solver", "model"])
def test_a_folder_that_cannot_be_used_is_refused_with_a_sentence(tmp_path, kind, what):
    damage, words = REFUSED[what]
    made, load = (some_solver(), mb.load_solver) if kind == "solver" else (small_model(), zoo.load_model)
    folder = made.save_pretrained(tmp_path / "folder")
    with_config()(folder)
    load(folder)  # its config may be laid out otherwise
    if what == "edited" and kind == "model":
        damage = with_config(summary={"by": "hand"})
    damage(folder)
    with pytest.raises(mb.CheckpointError, match=words) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_what_is_of_another_class_or_no_solver_or_no_folder_is_refused(tmp_path):
    folder, model = some_solver().save_pretrained(tmp_path / "s"), small_model().save_pretrained(tmp_path / "m")
    refused(
        "holds a GroupedLSTM, wanted a MetaBroyden", lambda: mb.MetaBroyden.from_pretrained(folder), mb.CheckpointError
    )
    wanted = "holds a DenseClassifier, wanted a ConvClassifier"
    refused(wanted, lambda: zoo.ConvClassifier.from_pretrained(model), mb.CheckpointError)
    refused("holds a 'model/dense-classifier', wanted a 'solver'", lambda: mb.load_solver(model), mb.CheckpointError)
    refused("holds a 'solver/grouped', wanted a 'model'", lambda: zoo.load_model(folder), mb.CheckpointError)
    refused("takes a learned solver", lambda: mb.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "x"), TypeError)
    refused("is a file, wanted the name of a folder", lambda: some_solver().save_pretrained(folder / CARD), OSError)
    refused("neither a file or folder", lambda: mb.GroupedLSTM.from_pretrained(tmp_path / "none"), FileNotFoundError)
    refused("is a folder, .* save_pretrained writes", lambda: mb.save_solver(mb.Picard(), folder), IsADirectoryError)
    (tmp_path / "empty").mkdir()
    refused("has no config.json", lambda: mb.load_solver(tmp_path / "empty"), mb.CheckpointError)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("survives", range(3))
@pytest.mark.parametrize("before", [None, "grouped", "broyden"])
@pytest.mark.parametrize("after", ["universal", "anderson"])
def test_a_save_that_is_killed_leaves_a_folder_that_loads_whole_or_is_refused(
    tmp_path, monkeypatch, before, after, survives
):
    made = {name: mb.get_solver(name) for name in ("broyden", "anderson")}
    made |= {name: some_solver(name) for name in ("grouped", "universal")}
    if before is not None:
        mb.save_pretrained(made[before], tmp_path)
    replace, done = storage.os.replace, []

    def killed(source: Any, target: Any) -> None:
        if len(done) == survives:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", killed)
    try:
        mb.save_pretrained(made[after], tmp_path)
    except KeyboardInterrupt:
        complete = False
    else:
        complete = True
    try:
        found = type(mb.load_solver(tmp_path)).__name__
    except mb.CheckpointError:
        found = "refused"
    old = set() if before is None else {type(made[before]).__name__}
    assert found in ({type(made[after]).__name__} if complete else {"refused", *old})
    assert {path.name for path in tmp_path.iterdir()} <= {CARD, CONFIG, WEIGHTS}


# --- what comes with the package


@pytest.mark.parametrize("name", shipped.SOLVERS)
def test_a_shipped_solver_is_that_of_the_results(name):
    mine, theirs = checkpoint.read(checkpoint.SHIPPED / name), checkpoint.read(shipped.SOLVERS[name])
    described = [mb.load_solver(place).describe() for place in (checkpoint.SHIPPED / name, shipped.SOLVERS[name])]
    assert described[0] == described[1]
    assert mine[0].keys() == theirs[0].keys()
    assert all(torch.equal(value, theirs[0][key]) for key, value in mine[0].items())


def test_the_shipped_folders_are_what_the_command_writes(tmp_path):
    shipped.main(tmp_path)
    made, kept = (
        {
            path.relative_to(folder): path.read_bytes()
            for folder in (root,)
            for path in root.rglob("*")
            if path.is_file()
        }
        for root in (tmp_path, checkpoint.SHIPPED)
    )
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []
    assert sum(map(len, kept.values())) < 2_300_000


def test_every_digits_family_is_shipped_and_names_resolve():
    assert mb.list_pretrained() == (*NAMES, "universal")
    assert set(NAMES) == {name for name in zoo.FAMILIES if name.endswith("-digits")}
    assert isinstance(mb.MetaBroyden.from_pretrained("conv-digits"), mb.MetaBroyden)
    with pytest.warns(DeprecationWarning, match="'digits-conv' is now called 'conv-digits'") as said:
        old = mb.load_solver("digits-conv")
    assert said[0].filename == __file__
    assert same_parameters(old, mb.load_solver("conv-digits"))
    refused("no model named 'universal' is shipped, only conv-digits, ", lambda: zoo.load_pretrained("universal"))


def test_a_folder_of_ones_own_goes_before_a_shipped_name_unless_it_is_no_solver(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("universal").mkdir()
    assert isinstance(mb.load_solver("universal"), mb.Universal)
    mb.save_pretrained(mb.Picard(), "universal")
    assert mb.load_solver("universal") == mb.Picard()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error")
def test_a_shipped_model_classifies_digits_with_its_own_solver_in_few_evaluations(name):
    model, test = zoo.load_pretrained(name), load_digits().test
    with torch.no_grad():
        score = float((model(test.images).argmax(1) == test.labels).double().mean())
    assert score > 0.94
    found = model.deq.last_solution
    assert found.converged.all()
    model.deq = mb.DEQ(model.cell, rtol=1e-2, max_nfe=60, warn=False)
    with torch.no_grad():
        model(test.images)
    assert found.nfe.double().mean() < model.deq.last_solution.nfe.double().mean()


def test_options_of_a_shipped_model_may_be_ones_own():
    model = zoo.load_pretrained("dense-digits", solver=mb.Picard(), rtol=1e-1)
    assert (model.deq.solver, model.deq.rtol, model.deq.max_nfe) == (mb.Picard(), 1e-1, 60)
    assert not model.training


def test_shipped_solvers_load_without_the_zoo():
    code = (
        "import sys, metabroyden as mb; [mb.load_solver(name) for name in mb.list_pretrained()]; "
        "sys.exit(any(name.startswith('metabroyden.zoo') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
