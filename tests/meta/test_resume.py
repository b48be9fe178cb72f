"""A training goes on where it stopped, bit for bit, or says why its file cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
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


def contexts(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def tasks() -> TaskSet:
    return TaskSet(lambda z, x: torch.tanh(0.9 * z.roll(1, 1) + x), contexts(20, 0), contexts(8, 1), contexts(8, 2))


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
            x = torch.randn(batch, 1, 3, 3, generator=generator)
            yield model(x).square().mean()

    def score(self, model, split):
        return 0.5


TRAINING = Training(epochs=4, batch=4)


class Stop(Exception):
    pass


def model(path: Path | None, epochs: int | None = None) -> Any:
    def report(now, _):
        if now.epoch == epochs:
            raise Stop

    build = lambda: DenseClassifier(DenseClassifierConfig(n=6, side=3, classes=3), warn=False)  # noqa: E731
    return train(build, Points(), TRAINING, path=path, report=report)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of each kind of training, half-way."""
    folder = tmp_path_factory.mktemp("trainings")
    found = {name: folder / f"{name}.safetensors" for name in ("meta", "orthogonal", "pes", "across", "model")}
    torch.manual_seed(0)
    trainer(found["meta"]).run(until=4)
    trainer(found["orthogonal"], orthogonal_rate=0.05).run(until=4)
    trainer(found["pes"], estimator="pes", particles=2, segments=2).run(until=4)
    begun, made = across(found["across"]), MultiTaskTrainer._update

    def until_four(self):
        if self.step == 4:
            raise Stop
        return made(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "_update", until_four)
        with pytest.raises(Stop):
            begun.run()
    with pytest.raises(Stop):
        model(found["model"], 3)  # stops before the third epoch is written
    return found


RESUME: dict[str, Callable[[Path], Any]] = {
    "meta": trainer,
    "orthogonal": lambda path: trainer(path, orthogonal_rate=0.05),
    "pes": lambda path: trainer(path, estimator="pes", particles=2, segments=2),
    "across": across,
    "model": model,
}
WHOLE: dict[str, Callable[[], Any]] = {
    "meta": lambda: trainer(None).run(),
    "orthogonal": lambda: trainer(None, orthogonal_rate=0.05).run(),
    "pes": lambda: trainer(None, estimator="pes", particles=2, segments=2).run(),
    "across": lambda: across(None).run(),
    "model": lambda: model(None),
}
every_training = pytest.mark.parametrize("name", RESUME)


def copied(files: dict[str, Path], name: str, tmp_path: Path) -> Path:
    path = tmp_path / "training.safetensors"
    path.write_bytes(files[name].read_bytes())
    return path


@every_training
def test_a_training_goes_on_bit_for_bit(files, tmp_path, name):
    found = RESUME[name](copied(files, name, tmp_path))
    found = found if isinstance(found, nn.Module) else found.run()
    for key, value in WHOLE[name]().state_dict().items():
        assert torch.equal(value, found.state_dict()[key]), key


@every_training
def test_a_file_without_checksum_and_list_of_moments_still_serves(files, tmp_path, monkeypatch, name):
    path = copied(files, name, tmp_path)
    tensors, header = checkpoint.read(path)
    del header["moments"]
    monkeypatch.setattr(checkpoint, "_CHECKSUM", "other")
    checkpoint.write(path, header.pop("kind"), tensors, header)
    monkeypatch.undo()
    RESUME[name](path)


def test_a_file_from_before_a_setting_was_renamed_goes_on(files, tmp_path):
    path = copied(files, "meta", tmp_path)

    def earlier(_, header):
        del header["config"]["decay"]
        header["config"]["budget_seconds"] = header["config"].pop("seconds")

    changed(path, earlier)
    assert trainer(path).step == 4


def changed(path: Path, change: Callable[[dict, dict], Any]) -> None:
    """Write the file with other content, checksum included: what is checked then is the content."""
    tensors, header = checkpoint.read(path)
    change(tensors, header)
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


TENSORS = {
    "a weight missing": lambda tensors, _: tensors.pop(first(tensors, "module.")),
    "a weight of another shape": lambda tensors, _: tensors.update({first(tensors, "module."): torch.ones(7, 7)}),
    "weights of another dtype": lambda tensors, _: tensors.update(
        {name: value.double() for name, value in tensors.items() if name.startswith("module.")}
    ),
    "a weight that is NaN": poison("module.", math.nan),
    "a weight that is infinite": poison("module.", math.inf),
    "a moment missing": lambda tensors, _: tensors.pop(first(tensors, "adam.")),
    "a parameter's moments missing": lambda tensors, _: [
        tensors.pop(name)
        for name in list(tensors)
        if name.endswith(first(tensors, "adam.step.").removeprefix("adam.step"))
    ],
    "all moments missing": without_moments,
    "a moment of another shape": lambda tensors, _: tensors.update({first(tensors, "adam.exp_avg."): torch.ones(9)}),
    "a moment that is NaN": poison("adam.exp_avg.", math.nan),
    "a negative second moment": poison("adam.exp_avg_sq.", -1.0),
    "a negative count of updates": poison("adam.step.", -1.0),
    "moments of fewer updates": lambda tensors, _: [
        value.fill_(1.0) for name, value in tensors.items() if name.startswith("adam.step.")
    ],
    "moments of no parameter": lambda tensors, _: tensors.update({"adam.step.nobody": torch.tensor(1.0)}),
    "a tensor that nobody knows": lambda tensors, _: tensors.update({"else": torch.ones(2)}),
    "moments listed by number": put("moments", [1, 2]),
}
BEST = {
    "a best weight missing": lambda tensors, _: tensors.pop(first(tensors, "best.")),
    "a best weight that is NaN": poison("best.", math.nan),
}
GENERATOR = {
    "no state of the generator": lambda tensors, _: tensors.pop("generator"),
    "another state of the generator": lambda tensors, _: tensors.update(generator=torch.zeros(3, dtype=torch.uint8)),
    "a state of floats": lambda tensors, _: tensors.update(generator=torch.zeros(5056)),
}


def fields_of(*names: str, values: dict[str, tuple]) -> dict[str, Callable[[dict, dict], Any]]:
    """Each field missing, of several other types, and of these values."""
    found: dict[str, Callable] = {}
    for name in names:
        found[f"{name} missing"] = lambda _, header, name=name: header.pop(name)
        for value in ({"a": 1}, [[1]], True, "text", -2.5, *values.get(name, ())):
            found[f"{name} {value!r:.30}"] = put(name, value)
    return found


def entry(key: str, value: Any) -> Callable[[dict, dict], Any]:
    return lambda _, header: header["history"][-1].__setitem__(key, value)


META = TENSORS | BEST
META |= fields_of(
    "step",
    "seconds",
    "incidents",
    "best_score",
    "history",
    values={
        "step": (-3, 7, None, 2.0),
        "seconds": ([1.0], [-1.0, 1.0], [math.nan, 1.0]),
        "best_score": ("nan", "-inf", "inf", "3.0", math.nan, None),
        "incidents": (
            {"skipped": {"loss not finite": 3}},
            {"returned": [99]},
            {"exploded": [-1]},
            {"consecutive_skips": -1},
        ),
        "history": ([{}], [{"step": "0"}], [3]),
    },
)
META |= {
    f"history with {key} {value}": entry(key, value)
    for key, value in (("step", "9"), ("step", "x"), ("score", "nan"), ("score", 3.0), ("seconds", None), ("more", "1"))
}
META |= {"stopped by a whim": put("stopped", "whim"), "stopped missing": lambda _, header: header.pop("stopped")}
ACROSS = GENERATOR | fields_of("config", values={})  # all else is checked by the same code
MODEL = TENSORS | GENERATOR
MODEL |= fields_of("history", values={"history": ([{}], [3], None)})
MODEL |= {
    f"history with {key} {value}": entry(key, value)
    for key, value in (("epoch", 9), ("epoch", "2"), ("loss", math.nan), ("score", "x"), ("seconds", None), ("more", 1))
}
MODEL |= {f"config {value!r}": put("config", value) for value in (3, [1], "text")}
DAMAGE = {"meta": META, "across": ACROSS, "model": MODEL}


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, table in DAMAGE.items() for what in table])
def test_a_training_does_not_go_on_from_what_it_has_not_written(files, tmp_path, name, what):
    path = copied(files, name, tmp_path)
    changed(path, DAMAGE[name][what])
    with pytest.raises(mb.CheckpointError) as caught:
        RESUME[name](path)
    assert str(path) in str(caught.value)


def test_momentum_in_the_place_of_moments_is_refused(files, tmp_path):
    path = copied(files, "orthogonal", tmp_path)
    changed(path, lambda _, header: header.update(config=checkpoint.read(files["meta"])[1]["config"]))
    with pytest.raises(mb.CheckpointError, match=r"the moments of .* are \['momentum', 'step'\], wanted"):
        trainer(path)


def test_a_refused_file_leaves_the_solver_as_it_was(files, tmp_path):
    path = copied(files, "meta", tmp_path)
    changed(path, BEST["a best weight that is NaN"])
    solver = universal()
    before = {name: value.clone() for name, value in solver.state_dict().items()}
    with pytest.raises(mb.CheckpointError):
        MetaTrainer(solver, tasks(), CONFIG, checkpoint=path)
    assert all(torch.equal(value, before[name]) for name, value in solver.state_dict().items())


def test_a_history_that_no_training_wrote_is_refused(files, tmp_path):
    path = copied(files, "model", tmp_path)
    assert [end.epoch for end in history(path)] == [1, 2]
    changed(path, entry("loss", "low"))
    with pytest.raises(mb.CheckpointError, match="loss is 'low', wanted float"):
        history(path)


def test_a_training_is_read_whatever_the_default_device(files, tmp_path):
    path, solver, problems = copied(files, "meta", tmp_path), universal(), tasks()
    with torch.device("meta"):
        resumed = MetaTrainer(solver, problems, CONFIG, checkpoint=path)
    found, whole = resumed.run(), WHOLE["meta"]()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in whole.state_dict().items())


class Cell(nn.Module):
    layout = "vector"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


def kept_up() -> mb.OnlineMetaTrainer:
    torch.manual_seed(0)
    deq = mb.DEQ(Cell(), warn=False)
    solvers = (make_learned(kind, Layout("vector", (4,)), hidden=3, rank=4) for kind in ("grouped", "adjoint"))
    return mb.OnlineMetaTrainer(deq, *solvers, config=mb.OnlineConfig(warmup_steps=1, unroll=2, batch=2))


def state_after(steps: int) -> dict[str, Any]:
    keep_up = kept_up()
    for _ in range(steps):
        keep_up.deq(torch.randn(3, 4)).square().sum().backward()
        keep_up.step()
    return keep_up.state_dict()


def header(**changes: Any) -> Callable[[dict], None]:
    return lambda state: state["header"].update(changes)


def damage(change: Callable[[dict, dict], Any]) -> Callable[[dict], None]:
    """The same damage as to a file."""
    return lambda state: change(state["tensors"], state["header"])


KEPT_UP = {name: damage(change) for name, change in (TENSORS | GENERATOR).items() if "count" not in name}
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
    before = {name: value.clone() for name, value in other.solvers["forward"].state_dict().items()}
    KEPT_UP[what](state)
    with pytest.raises(mb.CheckpointError, match=r"OnlineMetaTrainer|solvers"):
        other.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in other.solvers["forward"].state_dict().items())
    assert (other.steps, other._seen) == (0, 0)


def test_a_state_from_before_moments_were_listed_still_serves():
    state, other = state_after(2), kept_up()
    del state["header"]["moments"]
    other.load_state_dict(state)
    assert other.steps > 0


def test_training_draws_alike_whatever_the_default_device():
    solver, problems, whole = universal(), tasks(), WHOLE["meta"]()
    made = MetaTrainer(solver, problems, CONFIG)
    free = make_learned("universal", Layout("vector", (1,)), hidden=4)
    several = MultiTaskTrainer(free, [(1.0, tasks()), (1.0, RandomCells())], [tasks()], CONFIG)
    with torch.device("meta"):
        found = made.run()
        several.run()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in whole.state_dict().items())
