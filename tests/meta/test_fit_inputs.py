"""`fit_solver` on what people's models take: trees of tensors, batches of a loader, several inputs, integers, sequences."""

from __future__ import annotations

from collections import UserDict
from typing import NamedTuple

import pytest
import torch
import torchdeq
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import metabroyden as mb
from metabroyden.learned.layout import guess_layout
from metabroyden.meta.fit import device_of
from metabroyden.meta.inputs import MOST, gathered
from metabroyden.meta.target import Inside, call_arguments, target_of
from tests.helpers import normal, refused, same_parameters

pytestmark = pytest.mark.usefixtures("quick_fits")


def fitted(f, x, **options):
    return mb.fit_solver(f, x, **{"steps": 1, "progress": False, "fallback": False} | options)


def taken(solver) -> int:
    """How many samples a fit held out for its comparison: a fifth."""
    return solver.summary["held_out"]["samples"]


X, GAIN = normal(40, 4), normal(40, 1, seed=1).abs()
IDS = torch.randint(0, 9, (40, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(6) < torch.randint(1, 7, (40, 1), generator=torch.Generator().manual_seed(1))


# --- contexts that are trees


class Gated(nn.Module):
    """A cell whose context is a tree with None, plain values and booleans in it."""

    layout = "vector"

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def initial_state(self, c):
        return torch.zeros_like(c["x"])

    def forward(self, z, c):
        (gain, bias), keep = c["more"], c["keep"]
        assert bias is None
        assert c["mode"] == "eval"
        return torch.where(keep, torch.tanh(0.5 * gain * self.linear(z) + c["x"]), 0)


def tree(x=X, gain=GAIN):
    return {"x": x, "more": (gain, None), "keep": x > -1, "mode": "eval", "scale": 0.5}


class Classifier(nn.Module):
    """A model that hands such a tree to the DEQ inside it."""

    def __init__(self):
        super().__init__()
        self.stem, self.deq, self.head = nn.Linear(4, 4), mb.DEQ(Gated()), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.deq(tree(self.stem(x), x[:, :1].abs())))


@pytest.mark.parametrize("make", [Gated, lambda: mb.DEQ(Gated()), Classifier])
def test_contexts_may_be_trees_with_none_and_plain_values_for_cells_layers_and_models(make):
    f = make()
    x = X if isinstance(f, Classifier) else tree()
    solver = fitted(f, x, metric=lambda z, c: -z.square().sum(1))
    assert solver.config.conditioning == "initial_value"
    assert taken(solver) == 8
    assert solver.summary["skipped_steps"] == 0
    if isinstance(f, Classifier):
        f.deq.solver = solver
        f(x)
        assert f.deq.last_solution.converged.all()


def test_the_native_context_of_a_tree_is_the_first_tensor_of_a_tuple():
    f = lambda z, c: torch.tanh(0.4 * z.roll(1, 1) + c[0] + (0 if c[1] is None else c[1]))  # noqa: E731
    solver = fitted(f, (X, None, GAIN), z0=lambda c: torch.zeros_like(c[0]), conditioning="input")
    assert solver.config.context_channels == 4
    words = "conditioning='input' cannot be had: x must be a tensor .* got dict"
    refused(words, lambda: fitted(Gated(), tree(), conditioning="input"))


# --- contexts that come in batches


def f(z, x):
    return torch.tanh(0.4 * z.roll(1, 1) + x)


class Labelled(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return X[index], index % 3


BATCHED = {
    "a loader": lambda: DataLoader(TensorDataset(X), batch_size=7),
    "a data set": lambda: TensorDataset(X),
    "a generator over a loader of pairs": lambda: (x for x, _ in DataLoader(Labelled(), batch_size=7)),
    "an iterator over a list": lambda: iter([X[:30], X[30:]]),
    "a map": lambda: map(torch.Tensor.float, X.double().split(9)),
}


@pytest.mark.parametrize("form", BATCHED)
def test_batches_are_gathered_and_the_fit_is_that_of_all_samples(form):
    assert torch.equal(gathered(BATCHED[form]()), X)
    if form == "a loader":
        assert same_parameters(fitted(f, BATCHED[form]()), fitted(f, X))


def test_batches_may_be_trees_and_what_is_no_tensor_must_be_the_same_in_all():
    loader = DataLoader([{"x": x, "gain": gain} for x, gain in zip(X, GAIN, strict=True)], batch_size=9)
    found = gathered({**batch, "mask": None, "mode": "eval"} for batch in loader)
    assert torch.equal(found["gain"], GAIN)
    assert (found["mask"], found["mode"]) == (None, "eval")
    refused("differ in a value that is no tensor's: 1, 2", lambda: gathered(iter([(X, 1), (X, 2)])))
    refused("differ in structure: tuple of .*, None, then tuple of", lambda: gathered(iter([(X, None), (X, X)])))


def test_no_more_than_so_many_samples_are_read():
    read = []

    def endless():
        while True:
            read.append(1)
            yield torch.zeros(300, 2)

    assert len(gathered(endless())) == MOST == 2048
    assert len(read) == 7


def test_of_a_data_set_evenly_spaced_samples_are_read():
    found = gathered(TensorDataset(torch.arange(10_000.0)[:, None]))
    assert len(found) == MOST
    assert (found[0].item(), found[-1].item()) == (0, 9999)
    assert float(found.diff(dim=0).max()) <= 5


def test_samples_are_taken_to_where_the_model_is():
    target = target_of(Classifier().to("meta"))
    assert device_of(target, X) == torch.device("meta")
    assert device_of(target_of(f), X) == torch.device("cpu")


def test_what_is_whole_already_stays_as_it_is():
    for whole in (X, (X, GAIN), [X, GAIN], {"x": X}, mb.Shared(X)):
        assert gathered(whole) is whole
    assert gathered(UserDict(x=X)) == {"x": X}, "what a tokenizer returns is a mapping and no dict"


def test_batches_that_cannot_be_used_are_refused_with_what_to_write():
    pairs = DataLoader(Labelled(), batch_size=8)
    words = r"lists of 2, .* \(input, label\) pairs, and f takes one: give the inputs alone, \(x for x, _ in loader\)"
    refused(words, lambda: fitted(f, pairs))
    refused("and Classifier takes one", lambda: fitted(Classifier(), pairs))
    refused(r"samples of shapes \(5,\) and \(6,\): pad them all", lambda: gathered(iter([normal(4, 5), normal(4, 6)])))
    spent = iter([X])
    list(spent)
    refused("x_train has no batch to give", lambda: gathered(spent))
    refused("got a batch that is int", lambda: gathered(range(3)), TypeError)
    refused(r"list, so .*if it is a list of batches, give iter\(batches\)", lambda: fitted(f, [X, X]))
    refused("got ndarray", lambda: fitted(f, X.numpy()))


# --- models with several inputs


class Encoder(nn.Module):
    """Tokens and a mask → logits, by a DEQ of ours or torchdeq's over tokens × channels."""

    layout = "ntc"

    def __init__(self, ours: bool = True):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.seen = None
        self.cell = Attend(self.mix)
        self.deq = mb.DEQ(self.cell) if ours else torchdeq.get_deq(f_stop_mode="rel")

    def forward(self, input_ids, attention_mask=None):
        self.seen = None if attention_mask is None else attention_mask.clone()
        c = (self.embed(input_ids), attention_mask)
        if isinstance(self.deq, mb.DEQ):
            return self.head(self.deq(c))
        return self.head(self.deq(lambda z: self.cell(z, c), torch.zeros_like(c[0]))[0][-1])


class Attend(nn.Module):
    """Every token sees the mean of those that the mask leaves."""

    layout = "ntc"

    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def initial_state(self, c):
        return torch.zeros_like(c[0])

    def forward(self, z, c):
        keep = torch.ones_like(z[:, :, :1]) if c[1] is None else c[1].unsqueeze(2).to(z.dtype)
        mean = (keep * z).sum(1, keepdim=True) / keep.sum(1, keepdim=True)
        return torch.tanh(self.mix(0.3 * z + 0.5 * mean) + c[0])


@pytest.mark.parametrize("ours", [True, False])
def test_a_tuple_means_positional_arguments_and_a_dict_keywords(ours):
    model = Encoder(ours).eval()
    solver = fitted(model, (IDS, MASK), steps=2)
    assert model.seen.dtype == torch.bool
    assert solver.config.layout == "ntc"
    assert same_parameters(solver, fitted(model, {"input_ids": IDS, "attention_mask": MASK}, steps=2))
    batches = DataLoader(TensorDataset(IDS, MASK), batch_size=16)
    assert same_parameters(solver, fitted(model, batches, steps=2))
    for alone in ((IDS, None), IDS):
        assert taken(fitted(model, alone)) == 8
        assert model.seen is None
    if ours:
        model.deq.solver = solver
    else:
        model.deq.f_solver = mb.integrations.torchdeq.register("fitted", solver)
    assert model(IDS, MASK).shape == (40, 6, 2)


class Pair(NamedTuple):
    x: torch.Tensor
    gain: torch.Tensor


class OneTuple(nn.Module):
    """A model of one argument, which is a pair."""

    def __init__(self):
        super().__init__()
        self.deq = mb.DEQ(Gated())

    def forward(self, pair):
        x, gain = pair
        return self.deq(tree(x, gain))


class OneDict(OneTuple):
    def forward(self, batch, verbose=False):
        return super().forward((batch["x"], batch["gain"]))


class OnePair(OneTuple):
    def forward(self, pair: Pair, verbose=False):
        return super().forward((pair.x, pair.gain))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(OneTuple(), (X, GAIN)), (OneTuple(), [X, GAIN]), (OneDict(), {"x": X, "gain": GAIN}), (OnePair(), Pair(X, GAIN))],
)
def test_a_model_of_one_argument_that_is_a_tuple_or_a_dict_gets_it_whole(model, inputs):
    context = Inside(model).context(inputs)
    assert torch.equal(context["x"], X)
    assert torch.equal(context["more"][0], GAIN)


def test_a_tuple_in_a_tuple_is_one_argument_where_forward_takes_more():
    assert call_arguments(OneDict(), ({"batch": X},)) == (({"batch": X},), {})
    assert call_arguments(OneDict(), {"batch": X}) == ((), {"batch": X})


class Bilinear3(nn.Module):
    """Of three arguments."""

    def forward(self, a, b, c):
        return a * b * c


class Loop(nn.Module):
    """A model that iterates by itself."""

    def forward(self, x, steps=10):
        z = torch.zeros_like(x)
        for _ in range(steps):
            z = torch.tanh(0.5 * z + x)
        return z


class Wide(nn.Module):
    """A cell whose state is wider than its context."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(4, 6)

    def forward(self, z, x):
        return torch.tanh(0.3 * self.inner(z) + self.outer(x))


@pytest.mark.parametrize("use", ["fit_solver", "compare"])
def test_a_model_without_a_deq_is_told_what_to_give(use):
    run = {"fit_solver": fitted, "compare": lambda f, x: mb.compare(f, x, solvers="broyden", progress=False)}[use]
    words = (
        r"Linear takes one argument and has no DEQ in it: give its cell, a map f\(z, x\), or put the cell into mb.DEQ"
    )
    refused(words, lambda: run(nn.Linear(4, 4), X), TypeError)
    refused("takes one argument and has no DEQ in it", lambda: run(lambda z: z.cos(), X), TypeError)
    words = r"Loop takes one input, forward\(x, steps=10\), and has no DEQ in it: give its cell"
    refused(words, lambda: run(Loop(), X), TypeError)


@pytest.mark.parametrize(
    "use",
    [
        lambda: fitted(Wide(), X),
        lambda: fitted(mb.DEQ(Wide()), X),
        lambda: fitted(Wide(), X, metric=lambda z, x: z[:, 5]),
        lambda: mb.compare(Wide(), X, solvers="broyden", progress=False),
    ],
)
def test_a_state_of_another_shape_without_a_start_is_explained(use):
    words = (
        r"f failed at the default start, zeros like x of shape \(2, 4\) \(RuntimeError: mat1 and mat2 shapes .*\): if the "
        r"state has another shape give z0=, a map x → start, or give f a method initial_state\(x\)"
    )
    with pytest.raises(ValueError, match=words) as told:
        use()
    assert isinstance(told.value.__cause__, RuntimeError)


def test_an_error_of_f_at_a_start_that_was_given_goes_through():
    refused("mat1 and mat2", lambda: fitted(Wide(), X, z0=lambda x: x.new_zeros(len(x), 7)), RuntimeError)
    assert taken(fitted(Wide(), X, z0=lambda x: x.new_zeros(len(x), 6))) == 8


def test_what_is_neither_a_map_nor_a_model_with_a_deq_is_told_so():
    words = (
        r"Bilinear3 holds no DEQ, ours or torchdeq's, so that it is taken for a map f\(z, x\), and its forward\(a, b, c"
    )
    refused(words, lambda: fitted(Bilinear3(), X), TypeError)
    refused("got the class Classifier: give an instance of it", lambda: fitted(Classifier, X), TypeError)
    batches = [{"input_ids": IDS[:20]}, {"input_ids": IDS[20:]}]
    refused(r"of a list of batches give iter\(batches\)", lambda: fitted(Encoder(), batches), TypeError)
    assert taken(fitted(Encoder(), iter(batches))) == 8


def test_a_model_that_is_wrapped_for_several_processes_is_the_model():
    assert target_of(nn.DataParallel(Encoder())).model.__class__ is Encoder


def test_masks_with_minus_infinity_may_stand_beside_what_is_finite():
    bias = torch.zeros(40, 4).masked_fill(X > 1, -torch.inf)
    masked = lambda z, c: torch.tanh(0.4 * z + c[0]) * torch.softmax(c[1], dim=1)  # noqa: E731
    assert taken(fitted(masked, (X, bias), z0=lambda c: torch.zeros_like(c[0]))) == 8
    words = "must be finite, got NaN or infinity in it; a mask may hold −inf"
    for wrong in (bias + X, -bias, bias * torch.nan):
        refused(words, lambda wrong=wrong: fitted(masked, (X, wrong), z0=lambda c: torch.zeros_like(c[0])))


def test_fit_adjoint_takes_such_models_and_batches_too():
    one = mb.fit_adjoint(Encoder(), (IDS, MASK), steps=1, progress=False)
    other = mb.fit_adjoint(Encoder(), DataLoader(TensorDataset(IDS, MASK), batch_size=16), steps=1, progress=False)
    assert one.config.layout == other.config.layout == "ntc", "as the cell says"


def test_inputs_that_fit_no_way_of_calling_are_refused():
    words = r"forward\(input_ids, attention_mask=None\) .* a dict of input_ids, labels \(.*'labels'\): leave out what"
    refused(words, lambda: call_arguments(Encoder(), {"input_ids": IDS, "labels": IDS}), TypeError)
    words = r"Three.forward\(input_ids, attention_mask, \*, scale=1\) cannot .* tuple of 3 \(too many"
    refused(words, lambda: call_arguments(Three(), (IDS, MASK, IDS)), TypeError)
    refused("holds a DEQ .* cannot be called", lambda: fitted(Three(), (IDS, MASK, IDS)), TypeError)


class Three(Encoder):
    def forward(self, input_ids, attention_mask, *, scale=1):
        return super().forward(input_ids, attention_mask)


# --- integers, and tokens × channels


class Tokens(nn.Module):
    """A cell whose context is token ids."""

    layout = "ntc"

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 5)

    def forward(self, z, ids):
        return torch.tanh(0.4 * z.roll(1, 2) + self.embed(ids))


def test_integer_contexts_need_a_start_and_work_with_one():
    cell = Tokens()
    words = r"x_train is torch.int64, so .*: give z0=, a map x → start, or f a method initial_state\(x\)"
    refused(words, lambda: fitted(cell, IDS))
    refused("x_train is tuple, so the state cannot be zeros like it: give z0=", lambda: fitted(cell, (IDS, MASK)))
    refused("from a context of torch.int64: give z0", lambda: fitted(mb.DEQ(cell), IDS))
    start = lambda ids: torch.zeros(*ids.shape, 5)  # noqa: E731
    by_option = fitted(cell, IDS, z0=start, steps=2)
    cell.initial_state = start
    for target in (cell, mb.DEQ(cell)):
        assert same_parameters(by_option, fitted(target, IDS, steps=2))


def test_tokens_by_channels_are_asked_for_with_this_very_shape():
    words = (
        r"layout= is needed for a state of per-sample shape \(6, 5\): 'nct' if that is 6 channels × 5 tokens .*"
        "'ntc' if it is 6 tokens × 5 channels, .*; or give the cell an attribute"
    )
    plain = lambda z, x: torch.tanh(0.4 * z + x)  # noqa: E731
    refused(words, lambda: fitted(plain, normal(20, 6, 5)))
    assert fitted(plain, normal(20, 6, 5), layout="ntc").config.layout == "ntc"
    refused("no layout has 4 axes a sample", lambda: guess_layout((2, 3, 4, 5)))


# --- states of several tensors


def test_states_of_several_tensors_with_a_tree_for_context():
    def scales(z, c):
        return torch.tanh(0.3 * z[0] + 0.2 * z[1].mean(1, keepdim=True) + c["x"]), 0.3 * z[1] + 0.1 * z[0][:, :3]

    start = lambda c: (torch.zeros_like(c["x"]), torch.zeros(len(c["x"]), 3))  # noqa: E731
    solver = fitted(scales, (batch for batch in [{"x": X, "none": None}]), z0=start)
    found = mb.solve(scales, start({"x": X}), {"x": X}, solver=solver)
    assert [tuple(part.shape) for part in found.z] == [(40, 4), (40, 3)]
    assert found.converged.all()
