"""`cotrain`: a trained model in, one that is easier to solve out, or the original."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metabroyden as mb
from metabroyden.meta.finetune import Standard
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
    assert [look.step for look in report.looks] == [10, 20, 30, 40, 50, 60]
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
    with pytest.warns(UserWarning, match="so the original is returned"):
        own, report = mb.cotrain(
            model, data(), **OPTIONS | {"steps": 8}, score=lambda outputs, targets: -float(next(falls)),
            return_report=True,
        )  # fmt: skip
    assert own is model
    assert not report.accepted
    assert report.after is None
    assert "The original is returned" in str(report)
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


def test_a_standard_is_of_paired_differences():
    reference = torch.tensor([1.0, 0.0, 1.0, 1.0] * 10)
    other = reference.clone()
    other[0] = 0.0
    assert Standard(reference, None).used(reference) == 0.0
    assert Standard(reference, None).used(other) == pytest.approx(1.0), "one of forty is one standard error"
    assert Standard(reference, None).used(other) <= 1.0
    assert Standard(reference, None).used(reference - 0.01) > 1, "all lower by the same is more than that"
    assert Standard(reference, None).used(reference + 0.01) == 0.0
    assert Standard(reference, 0.1).used(other) == pytest.approx(0.25)
    assert Standard(reference, 0.0).used(other) > 1
    assert Standard(torch.tensor(0.5), None).used(torch.tensor(0.5)) == 0.0
    assert Standard(torch.tensor(0.5), None).used(torch.tensor(0.49)) > 1


BAD = [
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
