"""A training goes on where it stopped, bit for bit, or says why its file cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metabroyden as mb
from metabroyden import checkpoint
from metabroyden.learned.layout import Layout
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.fit import make_learned
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import MetaTrainer, MultiTaskTrainer
from metabroyden.zoo.models import DenseClassifier, DenseClassifierConfig, Training, history, train
from metabroyden.zoo.random_cells import RandomCells
from tests.helpers import normal, refused, same_parameters


def tasks() -> TaskSet:
    return TaskSet(lambda z, x: torch.tanh(0.9 * z.roll(1, 1) + x), *(normal(n, 6, seed=n) for n in (20, 8, 9)))


def universal() -> Any:
    return make_learned("universal", Layout("vector", (6,)), hidden=4, rank=8)


CONFIG = MetaConfig(steps=6, unroll=3, batch=4, backend="native", validate_every=2, validation_size=8)


def trainer(path: Path | None, **options: Any) -> MetaTrainer:
    return MetaTrainer(universal(), tasks(), replace(CONFIG, **options), checkpoint=path, save_every=1)


def across(path: Path | None) -> MultiTaskTrainer:
    return MultiTaskTrainer(universal(), [(1.0, tasks())], [tasks()], CONFIG, checkpoint=path)


class Points:
    """A criterion on a few random points."""

    def steps(self, batch: int) -> int:
        return 2

    def losses(self, model, batch, generator):
        for _ in range(2):
            yield model(torch.randn(batch, 1, 3, 3, generator=generator)).square().mean()

    def score(self, model, split):
        return 0.5


class Stop(Exception):
    pass


def stop_at(place: str, number: int | None) -> Callable[..., None]:
    """A hook that stops a training when this attribute of its first argument is so much."""

    def hook(now: Any, *_: Any) -> None:
        if getattr(now, place) == number:
            raise Stop

    return hook


def model(path: Path | None, epochs: int | None = None) -> Any:
    build = lambda: DenseClassifier(DenseClassifierConfig(n=6, side=3, classes=3), warn=False)  # noqa: E731
    return train(build, Points(), Training(epochs=4, batch=4), path=path, report=stop_at("epoch", epochs))


TRAININGS: dict[str, Callable[[Path | None], Any]] = {
    "meta": trainer,
    "orthogonal": partial(trainer, orthogonal_rate=0.05),
    "pes": partial(trainer, estimator="pes", particles=2, segments=2),
    "across": across,
    "model": model,
}
every_training = pytest.mark.parametrize("name", TRAININGS)


def done(training: Any) -> nn.Module:
    """What a training makes in the end."""
    return training if isinstance(training, nn.Module) else training.run()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of each kind of training, half-way."""
    found = {name: tmp_path_factory.mktemp("trainings") / f"{name}.safetensors" for name in TRAININGS}
    torch.manual_seed(0)
    for name in ("meta", "orthogonal", "pes"):
        TRAININGS[name](found[name]).run(until=4)
    begun, update, stop = across(found["across"]), MultiTaskTrainer._update, stop_at("step", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "_update", lambda self: stop(self) or update(self))
        with pytest.raises(Stop):
            begun.run()
    with pytest.raises(Stop):
        model(found["model"], 3)  # stops before the third epoch is written
    return found


def copied(files: dict[str, Path], name: str, tmp_path: Path) -> Path:
    path = tmp_path / "training.safetensors"
    path.write_bytes(files[name].read_bytes())
    return path


@every_training
def test_a_training_goes_on_bit_for_bit(files, tmp_path, name):
    found = done(TRAININGS[name](copied(files, name, tmp_path)))
    assert same_parameters(done(TRAININGS[name](None)), found)


@every_training
def test_a_file_without_checksum_and_list_of_moments_still_serves(files, tmp_path, monkeypatch, name):
    path = copied(files, name, tmp_path)
    tensors, header = checkpoint.read(path)
    del header["moments"]
    monkeypatch.setattr(checkpoint, "_CHECKSUM", "other")
    checkpoint.write(path, header.pop("kind"), tensors, header)
    monkeypatch.undo()
    TRAININGS[name](path)


def test_a_file_from_before_a_setting_was_renamed_goes_on(files, tmp_path):
    path = copied(files, "meta", tmp_path)

    def earlier(_, header):
        del header["config"]["decay"]
        header["config"]["budget_seconds"] = header["config"].pop("seconds")

    changed(path, earlier)
    assert trainer(path).step == 4


def changed(path: Path, act: Callable[[dict, dict], Any]) -> None:
    """Write the file with other content, checksum included: what is checked then is the content."""
    tensors, header = checkpoint.read(path)
    act(tensors, header)
    checkpoint.write(path, header.pop("kind"), tensors, header)


def first(tensors: dict, prefix: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith(prefix))


def poison(prefix: str, value: float) -> Callable[[dict, dict], None]:
    return lambda tensors, _: tensors[first(tensors, prefix)].view(-1)[0].fill_(value)


def put(key: str, value: Any) -> Callable[[dict, dict], None]:
    return lambda _, header: header.__setitem__(key, value)


def without_moments(tensors: dict, header: dict) -> None:
    for name in [name for name in tensors if name.startswith("adam.")]:
        del tensors[name]
    header.pop("moments")


def change(key: str, value: Any) -> Callable[[dict, dict], None]:
    """Put a tensor in the place of the first of that name, or beside the others."""
    return lambda tensors, _: tensors.update({first(tensors, key): value})


def drop(key: str) -> Callable[[dict, dict], None]:
    return lambda tensors, _: tensors.pop(first(tensors, key))


def every(part: str, act: Callable[[dict, str], Any]) -> Callable[[dict, dict], None]:
    """Do this to each tensor whose name holds that."""
    return lambda tensors, _: [act(tensors, name) for name in list(tensors) if part in name]


def without_a_parameters_moments(tensors: dict, _: dict) -> None:
    owner = first(tensors, "adam.step.").removeprefix("adam.step")
    for name in [name for name in tensors if name.endswith(owner)]:
        del tensors[name]


TENSORS = {
    "a weight missing": drop("module."),
    "a weight of another shape": change("module.", torch.ones(7, 7)),
    "weights of another dtype": every("module.", lambda tensors, name: tensors.update({name: tensors[name].double()})),
    "a weight that is NaN": poison("module.", math.nan),
    "a weight that is infinite": poison("module.", math.inf),
    "a moment missing": drop("adam."),
    "a parameter's moments missing": without_a_parameters_moments,
    "all moments missing": without_moments,
    "a moment of another shape": change("adam.exp_avg.", torch.ones(9)),
    "a moment that is NaN": poison("adam.exp_avg.", math.nan),
    "a negative second moment": poison("adam.exp_avg_sq.", -1.0),
    "a negative count of updates": poison("adam.step.", -1.0),
    "moments of fewer updates": every("adam.step.", lambda tensors, name: tensors[name].fill_(1.0)),
    "moments of no parameter": lambda tensors, _: tensors.update({"adam.step.nobody": torch.tensor(1.0)}),
    "a tensor that nobody knows": lambda tensors, _: tensors.update({"else": torch.ones(2)}),
    "moments listed by number": put("moments", [1, 2]),
}
BEST = {"a best weight missing": drop("best."), "a best weight that is NaN": poison("best.", math.nan)}
GENERATOR = {
    "no state of the generator": drop("generator"),
    "another state of the generator": change("generator", torch.zeros(3, dtype=torch.uint8)),
    "a state of floats": change("generator", torch.zeros(5056)),
}


def fields(**values: tuple) -> dict[str, Callable[[dict, dict], Any]]:
    """Each field missing, of several other types, and of these values."""
    found: dict[str, Callable] = {}
    for name, others in values.items():
        found[f"{name} missing"] = lambda _, header, name=name: header.pop(name)
        for value in ({"a": 1}, [[1]], True, "text", -2.5, *others):
            found[f"{name} {value!r:.30}"] = put(name, value)
    return found


def entries(*pairs: tuple[str, Any]) -> dict[str, Callable[[dict, dict], Any]]:
    """The last entry of the history with one value changed."""
    return {f"history with {key} {value}": entry(key, value) for key, value in pairs}


def entry(key: str, value: Any) -> Callable[[dict, dict], Any]:
    return lambda _, header: header["history"][-1].__setitem__(key, value)


INCIDENTS = {"skipped": {"loss not finite": 3}}, {"returned": [99]}, {"exploded": [-1]}, {"consecutive_skips": -1}
META = (
    TENSORS
    | BEST
    | fields(
        step=(-3, 7, None, 2.0),
        seconds=([1.0], [-1.0, 1.0], [math.nan, 1.0]),
        best_score=("nan", "-inf", "inf", "3.0", math.nan, None),
        incidents=INCIDENTS,
        history=([{}], [{"step": "0"}], [3]),
    )
    | entries(("step", "9"), ("step", "x"), ("score", "nan"), ("score", 3.0), ("seconds", None), ("more", "1"))
    | {"stopped by a whim": put("stopped", "whim"), "stopped missing": lambda _, header: header.pop("stopped")}
)
ACROSS = GENERATOR | fields(config=())  # all else is checked by the same code
MODEL = TENSORS | GENERATOR | fields(history=([{}], [3], None))
MODEL |= entries(("epoch", 9), ("epoch", "2"), ("loss", math.nan), ("score", "x"), ("seconds", None), ("more", 1))
MODEL |= {f"config {value!r}": put("config", value) for value in (3, [1], "text")}
DAMAGE = {"meta": META, "across": ACROSS, "model": MODEL}


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, table in DAMAGE.items() for what in table])
def test_a_training_does_not_go_on_from_what_it_has_not_written(files, tmp_path, name, what):
    path = copied(files, name, tmp_path)
    changed(path, DAMAGE[name][what])
    with pytest.raises(mb.CheckpointError) as caught:
        TRAININGS[name](path)
    assert str(path) in str(caught.value)


def test_momentum_in_the_place_of_moments_is_refused(files, tmp_path):
    path = copied(files, "orthogonal", tmp_path)
    changed(path, lambda _, header: header.update(config=checkpoint.read(files["meta"])[1]["config"]))
    refused(r"the moments of .* are \['momentum', 'step'\], wanted", lambda: trainer(path), mb.CheckpointError)


def test_a_refused_file_leaves_the_solver_as_it_was(files, tmp_path):
    path, solver = copied(files, "meta", tmp_path), universal()
    changed(path, BEST["a best weight that is NaN"])
    with pytest.raises(mb.CheckpointError):
        MetaTrainer(solver, tasks(), CONFIG, checkpoint=path)
    assert same_parameters(solver, universal())


def test_a_history_that_no_training_wrote_is_refused(files, tmp_path):
    path = copied(files, "model", tmp_path)
    assert [end.epoch for end in history(path)] == [1, 2]
    changed(path, entry("loss", "low"))
    refused("loss is 'low', wanted float", lambda: history(path), mb.CheckpointError)


def test_a_training_is_read_and_draws_alike_whatever_the_default_device(files, tmp_path):
    path, whole = copied(files, "meta", tmp_path), trainer(None).run()
    made = [(universal(), tasks(), at) for at in (None, path)]
    free = make_learned("universal", Layout("vector", (1,)), hidden=4)
    several = MultiTaskTrainer(free, [(1.0, tasks()), (1.0, RandomCells())], [tasks()], CONFIG)
    with torch.device("meta"):
        new, resumed = (MetaTrainer(solver, problems, CONFIG, checkpoint=at) for solver, problems, at in made)
        found = new.run()
        several.run()
    assert same_parameters(whole, found)
    assert same_parameters(whole, resumed.run())


class Cell(nn.Module):
    layout = "vector"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


def kept_up() -> mb.CoTrainer:
    torch.manual_seed(0)
    deq = mb.DEQ(Cell(), warn=False)
    solvers = (make_learned(kind, Layout("vector", (4,)), hidden=3, rank=4) for kind in ("grouped", "adjoint"))
    return mb.CoTrainer(deq, *solvers, config=mb.CoTrainConfig(warmup_steps=1, unroll=2, batch=2))


def state_after(steps: int) -> dict[str, Any]:
    keep_up = kept_up()
    for _ in range(steps):
        keep_up.deq(torch.randn(3, 4)).square().sum().backward()
        keep_up.step()
    return keep_up.state_dict()


def header(**changes: Any) -> Callable[[dict], None]:
    return lambda state: state["header"].update(changes)


def damage(act: Callable[[dict, dict], Any]) -> Callable[[dict], None]:
    """The same damage as to a file."""
    return lambda state: act(state["tensors"], state["header"])


KEPT_UP = {name: damage(act) for name, act in (TENSORS | GENERATOR).items() if "count" not in name}
KEPT_UP |= {
    "nothing": lambda state: state.clear(),
    "no counts": lambda state: state["header"].pop("counts"),
    "two counts": header(counts=[1, 2]),
    "a negative count": header(counts=[1, -3, 0]),
    "a count in words": header(counts=[1, "two", 0]),
    "waiting in words": header(waiting="yes"),
    "solvers of other directions": header(solvers=["backward"]),
    "a number of solvers": header(solvers=2),
    "a list of tensors": lambda state: state.update(tensors=[1]),
    "a weight in words": lambda state: state["tensors"].update({first(state["tensors"], "module."): "zero"}),
    "no header": lambda state: state.update(header=None),
}
KEPT_UP.pop("moments of fewer updates")  # how many were skipped of one solver is not known


@pytest.mark.parametrize("what", KEPT_UP)
def test_solvers_are_not_kept_up_from_what_was_not_kept(what):
    state, other = state_after(2), kept_up()
    KEPT_UP[what](state)
    refused(r"CoTrainer|solvers", lambda: other.load_state_dict(state), mb.CheckpointError)
    assert same_parameters(other.solvers["forward"], kept_up().solvers["forward"])
    assert (other.steps, other._seen) == (0, 0)


def test_a_state_from_before_moments_were_listed_still_serves():
    state, other = state_after(2), kept_up()
    del state["header"]["moments"]
    other.load_state_dict(state)
    assert other.steps > 0
