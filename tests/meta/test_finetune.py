"""`cotrain`: a trained model in, one that is easier to solve out, or the original."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metabroyden as mb
from metabroyden.meta.cotrainer import AIM
from metabroyden.meta.judging import DIVERGENCE, Judged, Standard, judge
from metabroyden.meta.supervised import Task
from tests.helpers import normal, refused, same_parameters


class Cell(nn.Module):
    """tanh(zW + x), W nearly a rotation: slow to solve, and free to become quick where the head does the rest."""

    layout = "vector"

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(0.9 * torch.linalg.qr(normal(n, n)).Q)

    def forward(self, z, x):
        return torch.tanh(z @ self.w + x)


class Model(nn.Module):
    """Three classes of vectors."""

    def __init__(self, n: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, n), nn.Linear(n, 3)
        self.deq = mb.DEQ(Cell(n), rtol=1e-2, max_nfe=60, backward=mb.Phantom(steps=4), warn=False)

    def forward(self, inputs):
        return self.head(self.deq(self.stem(inputs)))


def data(count: int = 200):
    """(inputs, targets): the largest of the first three coordinates."""
    inputs = normal(count, 6, seed=3)
    return inputs, inputs[:, :3].argmax(dim=1)


def trained() -> Model:
    model, (inputs, targets) = Model(), data(400)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        part = slice(40 * step % 400, 40 * step % 400 + 40)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[part]), targets[part]).backward()
        optimizer.step()
    return model.eval()


OPTIONS = {"steps": 60, "learning_rate": 5e-3, "progress": False, "batch_size": 40}


@pytest.mark.usefixtures("quick_fits")
@pytest.mark.filterwarnings("ignore:fit_solver")
def test_a_co_trained_model_needs_fewer_evaluations_at_the_same_score(capsys):
    model = trained()
    before = copy.deepcopy(model)
    own, report = mb.cotrain(model, data(), **OPTIONS | {"progress": True}, residual_weight=0.3, return_report=True)
    assert same_parameters(model, before), "the model that was given is left as it is"
    assert report.accepted
    assert own is not model
    assert own.deq.solver is not model.deq.solver
    theirs = report.before.outcome(report.before.best_classical())
    ours = report.after.outcome(report.after.name)
    assert ours.mean < 0.75 * theirs.mean
    assert ours.success >= theirs.success
    assert report.scores[1] >= report.scores[0] - 0.05
    assert [look.step for look in report.looks] == list(range(6, 61, 6))
    assert all(look.divergence > 0 for look in report.looks)
    said = capsys.readouterr().out
    assert "before" in said
    assert "The co-trained model is returned" in said
    inputs, targets = data(40)
    with torch.no_grad():
        assert float((own(inputs).argmax(1) == targets).float().mean()) > 0.6


@pytest.mark.usefixtures("quick_fits")
def test_a_model_whose_score_falls_is_not_returned():
    model = trained()
    falls = iter(range(10**6))
    with pytest.warns(UserWarning, match="cotrain: the original is returned: the score was"):
        own, report = mb.cotrain(
            model, data(), **OPTIONS | {"steps": 8}, score=lambda outputs, targets: -float(next(falls)),
            return_report=True,
        )  # fmt: skip
    assert own is model
    assert not report.accepted
    assert report.after is None
    assert "The original is returned" in str(report)
    assert str(report).count("tuned") == 1, "one line, of the solvers on the model as it was"
    assert report.looks[-1].residual_weight < 0.06, "a score that is too low lowers the weight of the residuals"


@pytest.mark.usefixtures("quick_fits")
@pytest.mark.filterwarnings("ignore")
def test_the_same_call_gives_the_same_model_and_batches_do_as_well_as_tensors():
    inputs, targets = data()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=50)
    held = TensorDataset(*data(60))
    options = OPTIONS | {"steps": 6, "tolerance": 1.0}
    one, other = (
        mb.cotrain(trained(), loader, validation=DataLoader(held, batch_size=20), **options) for _ in range(2)
    )
    assert same_parameters(one, other)
    assert not same_parameters(one, trained())


@pytest.mark.usefixtures("quick_fits")
@pytest.mark.filterwarnings("ignore")
def test_regression_by_losses_of_ones_own_and_dicts_of_inputs():
    class Both(Model):
        def forward(self, a, b):
            return super().forward(a + b)

    torch.manual_seed(0)
    x = normal(60, 6)
    model = mb.cotrain(
        Both(), ({"a": x, "b": 0.1 * x}, normal(60, 3, seed=1)), **OPTIONS | {"steps": 5, "tolerance": 9.0},
        loss=lambda outputs, targets: (outputs - targets).abs().mean(),
        score=lambda outputs, targets: -(outputs - targets).abs().mean(dim=1),
    )  # fmt: skip
    assert isinstance(model, Both)
    assert model.deq.solver is not None


@pytest.mark.usefixtures("quick_fits")
def test_what_saves_no_evaluations_is_not_returned():
    model = Model()
    model.deq.cell.w.data *= 0.05
    with pytest.warns(UserWarning, match="a solve takes .* evaluations in the mean"):
        assert mb.cotrain(model, data(), **OPTIONS | {"steps": 6, "tolerance": 9.0, "residual_weight": 0.0}) is model


@pytest.mark.usefixtures("quick_fits")
def test_flags_stay_and_what_is_frozen_is_not_trained():
    class Normed(Model):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(12)

        def forward(self, inputs):
            return self.head(self.norm(self.deq(self.stem(inputs))))

    model = Normed().train()
    model.norm.eval()
    model.stem.requires_grad_(False)
    seen = []
    model.deq.observers.append(lambda *told: seen.append(told))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = mb.cotrain(model, data(), **OPTIONS | {"steps": 4, "tolerance": 9.0}, loss=nn.functional.cross_entropy)
    assert [part.training for part in (model, model.stem, model.deq, model.norm)] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (seen, model.deq.last_solution) == ([], None)
    assert own is not model
    assert not own.training
    for name, weight in own.named_parameters():
        assert weight.requires_grad == (not name.startswith("stem"))
        assert weight.grad is None
        assert torch.equal(weight, before[name]) == name.startswith("stem")
    assert torch.equal(own.norm.running_mean, before["norm.running_mean"])
    nn.functional.cross_entropy(own(data()[0]), data()[1]).backward()
    assert own.head.weight.grad is not None


@pytest.mark.usefixtures("quick_fits")
def test_a_loss_that_is_not_finite_leaves_no_trace_or_ends_the_call():
    def blows_up(every: int):
        calls = iter(range(10**6))
        factor = lambda: float("nan") if next(calls) % every == 0 else 1.0  # noqa: E731
        return lambda outputs, targets: factor() * nn.functional.cross_entropy(outputs, targets)

    options = OPTIONS | {"steps": 24, "tolerance": 9.0}
    own = mb.cotrain(trained(), data(), loss=blows_up(5), **options)
    assert all(bool(value.isfinite().all()) for value in own.state_dict().values())
    refused(
        "not finite in 10 training steps",
        lambda: mb.cotrain(Model(), data(), loss=blows_up(1), **options),
        FloatingPointError,
    )
    broken = Judged(torch.tensor([1.0, float("nan"), 1.0]), 1.0)
    assert Standard(Judged(torch.ones(3), 1.0), 1.0).used(broken) == float("inf")


def test_ignored_targets_count_in_no_loss_and_no_score():
    task, outputs = Task(None, None), normal(4, 5, 3)
    targets = outputs.argmax(dim=-1)
    targets[:, 3:] = -100
    targets[0, 0] = (targets[0, 0] + 1) % 3
    assert task.score(outputs, targets).tolist() == pytest.approx([2 / 3, 1.0, 1.0, 1.0])
    torch.testing.assert_close(task.loss(outputs, targets), task.loss(outputs[:, :3], targets[:, :3]))
    assert task.score(outputs[..., 0], outputs[..., 0] + 2.0).tolist() == pytest.approx([-4.0] * 4)
    outputs[1, 0, 0] = float("nan")
    assert task.score(outputs, targets)[1].isnan(), "the largest of what is not finite is no answer"


def test_means_of_unequal_chunks_count_by_their_samples():
    held = [(normal(3, 6), torch.zeros(3)), (normal(1, 6), torch.zeros(1))]
    scores = iter([1.0, 5.0])
    task = Task(None, lambda outputs, targets: next(scores))
    assert float(judge(Model(), mb.Broyden(), held, task, 1e-2).scores) == pytest.approx(2.0)


def test_a_standard_is_of_paired_differences():
    reference = torch.tensor([1.0, 0.0, 1.0, 1.0] * 10)
    other = reference.clone()
    other[0] = 0.0

    def used(scores, tolerance=None, beside=reference):
        return Standard(Judged(beside, 1.0), tolerance).used(Judged(scores, 1.0))

    assert used(reference) == 0.0
    assert used(other) == pytest.approx(1.0), "one of forty is one standard error"
    assert used(other) <= 1.0
    assert used(reference - 0.01) > 1, "all lower by the same is more than that"
    assert used(reference + 0.01) == 0.0
    assert used(other, 0.1) == pytest.approx(0.25)
    assert used(other, 0.0) > 1
    assert used(torch.tensor(0.5), None, torch.tensor(0.5)) == 0.0
    assert used(torch.tensor(0.49), None, torch.tensor(0.5)) > 1


def test_outputs_that_move_are_pressure_before_scores_show_it():
    logits = normal(40, 3).log_softmax(dim=1)
    moved = (logits + 0.6 * normal(40, 3, seed=1)).log_softmax(dim=1)
    scores = torch.ones(40)
    standard = Standard(Judged(scores, 1.0, logits), None)
    assert standard.pressure(Judged(scores, 1.0, logits)) == 0.0
    wanted = (logits.exp() * (logits - moved)).sum(dim=1).mean()
    assert standard.divergence(Judged(scores, 1.0, moved)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(wanted) > DIVERGENCE
    assert standard.pressure(Judged(scores, 1.0, moved)) == AIM, "no reason to lower the weight where no score is lost"
    slightly = scores.clone()
    slightly[0] = 0.0
    assert standard.pressure(Judged(slightly, 1.0, moved)) == pytest.approx(float(wanted) / DIVERGENCE, rel=1e-5)
    assert standard.pressure(Judged(scores, 1.0, moved * float("nan"))) == float("inf")
    fewer = scores.clone()
    fewer[0] = 0.0
    assert standard.pressure(Judged(fewer, 1.0, logits)) == 0.0, "one of forty is not surely a loss"
    fewer[:10] = 0.0
    assert standard.pressure(Judged(fewer, 1.0, logits)) > 1
    masked = torch.tensor([[0.0, -torch.inf]]).expand(40, 2)
    assert Standard(Judged(scores, 1.0, masked), None).pressure(Judged(scores, 1.0, masked)) == 0.0
    unknown = Standard(Judged(scores, 1.0), None)
    assert unknown.divergence(Judged(fewer, 1.0)) is None
    assert unknown.pressure(Judged(fewer, 1.0)) == unknown.used(Judged(fewer, 1.0)) > 1
    numbers = Standard(Judged(-scores, 1.0, torch.zeros(40, 2), 0.5), None)
    assert numbers.divergence(Judged(-scores, 1.0, torch.full((40, 2), 0.1), 0.5)) == pytest.approx(0.01)


def test_what_is_judged_has_outputs_of_either_kind():
    model, (inputs, targets) = Model(), data(30)
    held = [(inputs[:20], targets[:20]), (inputs[20:], targets[20:])]
    classes = judge(model, mb.Broyden(), held, Task(None, None), 1e-2)
    torch.testing.assert_close(classes.outputs.logsumexp(dim=1), torch.zeros(30))
    assert classes.error is None
    held = [(part, torch.zeros(len(part), 3)) for part, _ in held]
    numbers = judge(model, mb.Broyden(), held, Task(None, None), 1e-2)
    assert numbers.error == pytest.approx(-float(numbers.scores.mean()), rel=1e-5)
    own = Task(lambda outputs, targets: outputs.mean(), lambda outputs, targets: 0.0)
    other = judge(model, mb.Broyden(), [(part, torch.zeros(len(part), 7)) for part, _ in held], own, 1e-2)
    assert other.outputs is None


class Unseen(Model):
    """Its DEQ gets no gradients."""

    def forward(self, inputs):
        with torch.no_grad():
            z = self.deq(self.stem(inputs))
        return self.head(z)


def unrolled() -> Model:
    model = Model()
    model.deq.backward_mode = mb.Unroll(steps=3)
    return model


INPUTS, TARGETS = data(40)
BAD = [
    ("did not call its DEQ with gradients", {"model": Unseen()}, ValueError),
    ("DEQ has no parameters to train", {"model": mb.DEQ(lambda z, x: 0.5 * z + x)}, ValueError),
    ("finds none: use Implicit or Phantom", {"model": unrolled()}, TypeError),
    ("40 inputs and 39 targets", {"data": (INPUTS, TARGETS[:39])}, ValueError),
    ("validation has 40 inputs and 39", {"validation": (INPUTS, TARGETS[:39])}, ValueError),
    ("inputs must be a tensor or a pytree", {"data": (INPUTS.numpy(), TARGETS)}, TypeError),
    ("validation has no batch to give", {"validation": []}, ValueError),
    ("validation must be .inputs, targets.*got float", {"validation": 0.2}, TypeError),
    ("can be read once only", {"data": (part for part in [(INPUTS, TARGETS)]), "validation": data(30)}, ValueError),
    ("at least 10 samples", {"data": (INPUTS[:8], TARGETS[:8]), "validation": data(30)}, ValueError),
    ("must be finite", {"data": (INPUTS.clone().fill_(float("nan")), TARGETS)}, ValueError),
    ("validation_rtol must be a positive", {"rtol": 0.0}, ValueError),
    ("one for each row of class logits, shape .8,., got .8, 1", {"data": (INPUTS, TARGETS[:, None])}, ValueError),
    ("targets must be like outputs", {"data": (INPUTS, TARGETS[:, None].float())}, ValueError),
    ("outputs Tensor, targets dict", {"data": (INPUTS, {"y": TARGETS})}, TypeError),
    ("score must give a tensor or a number, got NoneType", {"score": lambda outputs, targets: None}, TypeError),
    ("model must be a module with a metabroyden.DEQ", {"model": nn.Linear(2, 2)}, TypeError),
    ("has several DEQs", {"model": nn.ModuleList([Model(), Model()])}, ValueError),
    ("steps must be an integer of at least 1, got 0", {"steps": 0}, ValueError),
    ("learning_rate must be a positive number", {"learning_rate": -1.0}, ValueError),
    ("tolerance must be a number of at least 0", {"tolerance": -0.1}, ValueError),
    ("residual_weight must be a number of at least 0", {"residual_weight": -0.1}, ValueError),
    ("data must be .inputs, targets.", {"data": torch.zeros(30, 6)}, TypeError),
    ("at least 20 samples, got 5", {"data": data(5)}, ValueError),
    ("give validation=", {"data": [data(30)]}, ValueError),
    ("a batch that is Tensor", {"data": [torch.zeros(30, 6)], "validation": data(30)}, TypeError),
    ("data has no batch to give", {"data": [], "validation": data(30)}, ValueError),
    ("loss must be a function", {"loss": 3}, TypeError),
    ("loss must give a scalar", {"loss": lambda outputs, targets: outputs}, ValueError),
    ("score must give", {"score": lambda outputs, targets: outputs}, ValueError),
]


@pytest.mark.usefixtures("quick_fits")
@pytest.mark.parametrize(("words", "changed", "error"), BAD)
def test_bad_input_is_refused(words, changed, error):
    given = {"model": Model(), "data": data(), **OPTIONS} | changed
    refused(words, lambda: mb.cotrain(given.pop("model"), given.pop("data"), **given), error)
