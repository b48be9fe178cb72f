"""Sequence cells and language models: what they compute, that nothing looks ahead, what memory does."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.zoo import models as zoo
from metabroyden.zoo.models.stem import STEMS, TokenStem, followers
from metabroyden.zoo.models.transformer import shifted, sinusoids
from tests.helpers import refused

TOKENS, SEGMENT, RECENT = 11, 9, 20
TIGHT = {"solver": mb.Anderson(memory=8), "rtol": 1e-13, "max_nfe": 2000}
WORDS = {"embedding": 5, "recent": RECENT}


def trellisnet(stem: str = "conv", dilation: int = 2) -> zoo.TrellisNet:
    config = zoo.TrellisNetConfig(TOKENS, channels=6, dilation=dilation, stem=stem, **WORDS)
    return zoo.TrellisNet(config, **TIGHT).double().eval()


def transformer(stem: str = "conv", memory: int = 5) -> zoo.DEQTransformer:
    config = zoo.DEQTransformerConfig(TOKENS, width=8, heads=2, inner=10, memory=memory, stem=stem, **WORDS)
    return zoo.DEQTransformer(config, **TIGHT).double().eval()


MODELS = {"trellisnet": trellisnet, "transformer": transformer}
every_model = pytest.mark.parametrize("name", MODELS)


def tokens(batch: int = 3, length: int = SEGMENT) -> torch.Tensor:
    return torch.randint(TOKENS, (batch, length))


def equilibrium(model, inputs: torch.Tensor, memory: zoo.Memory | None = None) -> torch.Tensor:
    with torch.no_grad():
        z = model.deq(model.inject(inputs, memory))
    assert float(model.deq.last_solution.residual.max()) < 1e-12
    return z


def read(model, inputs: torch.Tensor) -> zoo.Memory:
    return model.remember(equilibrium(model, inputs), inputs)


def test_the_trellis_cell_is_what_its_docstring_says():
    cell = zoo.TrellisCell(3, dilation=2).double()
    z, x, memory = torch.randn(2, 6, 5).double(), torch.randn(2, 12, 5).double(), torch.randn(2, 6, 2).double()
    found = cell(z, (x, memory))
    w = cell.conv.weight
    for b in range(2):
        for t in range(5):
            before = z[b, :, t - 2] if t >= 2 else memory[b, :, t]
            a = w[:, :, 0] @ before[3:] + w[:, :, 1] @ z[b, 3:, t] + x[b, :, t]
            i, f, g, o = a[:3], a[3:6], a[6:9], a[9:]
            c = torch.sigmoid(f) * before[:3] + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            assert_close(found[b, :, t], torch.cat([c, h]))


def test_the_transformer_cell_is_what_its_docstring_says():
    cell = zoo.TransformerCell(6, 3, 7).double()
    z, x, memory = torch.randn(2, 4, 6).double(), torch.randn(2, 4, 24).double(), torch.randn(2, 3, 6).double()
    for norm in (cell.norm1, cell.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    found = cell(z, (x, memory))
    rate = torch.tensor([1.0, 10000 ** (-2 / 6), 10000 ** (-4 / 6)]).double()
    u, v = cell.content_bias, cell.position_bias
    for b in range(2):
        past = [cell.qkv.weight @ m for m in memory[b]]
        now = [cell.qkv.weight @ z[b, t] + x[b, t, 6:] for t in range(4)]
        keys, values = [a[6:12] for a in past + now], [a[12:] for a in past + now]
        for t in range(4):
            heard, i = [], 3 + t
            for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
                scores = []
                for j in range(i + 1):
                    angle = (i - j) * rate
                    r = cell.position.weight @ torch.cat([angle.sin(), angle.cos()])
                    q = now[t][:6]
                    score = (q + u)[part] @ keys[j][part] + (q + v)[part] @ r[part]
                    scores.append(score / math.sqrt(2))
                weights = torch.stack(scores).softmax(0)
                heard.append(sum(weight * values[j][part] for j, weight in enumerate(weights)))
            y = cell.norm1(z[b, t] + x[b, t, :6] + cell.out(torch.cat(heard)))
            wanted = cell.norm2(y + cell.ff2(nn.functional.gelu(cell.ff1(y))))
            assert_close(found[b, t], wanted)


def test_the_relative_shift_brings_every_distance_to_its_key():
    queries, length = 4, 7
    by_distance = torch.arange(length - 1, -1, -1.0).expand(2, queries, length)  # the score is the distance itself
    by_key = shifted(by_distance)
    for i in range(queries):
        position = length - queries + i
        for j in range(position + 1):
            assert by_key[0, i, j] == position - j
    assert torch.equal(sinusoids(length, 4, like=by_key)[-1], torch.tensor([0.0, 0, 1, 1]))
    assert_close(sinusoids(length, 4, like=by_key)[0, 2], torch.tensor(6.0).cos())


@pytest.mark.parametrize("stem", STEMS)
@every_model
def test_nothing_looks_ahead_in_one_evaluation_or_at_the_equilibrium(name, stem):
    model = MODELS[name](stem)
    inputs = tokens()
    memory = read(model, tokens())
    logits = model.classify(equilibrium(model, inputs, memory))
    context = model.inject(inputs, memory)
    z = torch.randn_like(model.cell.initial_state(context))
    time = 2 if model.cell.layout == "nct" else 1
    for position in (0, 1, 4, SEGMENT - 1):
        later = inputs.clone()
        later[:, position:] = (later[:, position:] + 1) % TOKENS
        z_later = z.clone()
        z_later.narrow(time, position, SEGMENT - position).normal_()
        before, after = model.cell(z, context), model.cell(z_later, model.inject(later, memory))
        kept = position * before.shape[3 - time]  # of both, token by token
        before, after = (v.movedim(time, 1).flatten(1) for v in (before, after))
        assert_close(after[:, :kept], before[:, :kept], rtol=0, atol=1e-12)
        changed = model.classify(equilibrium(model, later, memory))
        assert_close(changed[:, :position], logits[:, :position], rtol=0, atol=1e-9)
        assert (changed[:, position] - logits[:, position]).abs().max() > 1e-4


@every_model
def test_a_segment_influences_the_next_through_memory_alone(name):
    model = MODELS[name]()
    first, second = tokens(), tokens()
    z = equilibrium(model, first)
    memory = model.remember(z, first)
    alone, after = equilibrium(model, second), equilibrium(model, second, memory)
    assert (after - alone).abs().amax(dim=(1, 2)).min() > 1e-4
    for part in (zoo.Memory(0 * memory.states, memory.tokens), zoo.Memory(memory.states, 0 * memory.tokens - 1)):
        assert (equilibrium(model, second, part) - after).abs().amax(dim=(1, 2)).min() > 1e-5  # both tell something
    assert torch.equal(equilibrium(model, second, model.beginning(len(second))), alone)
    _, kept = model.inject(second, memory)
    assert torch.equal(kept, memory.states)
    assert not model.remember(z.requires_grad_(), first).states.requires_grad
    other = read(model, first[:1])  # a sample alone: the rest of a batch tells nothing
    assert_close(equilibrium(model, second[:1], other), after[:1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_trellisnets_segments_end_to_end_have_the_equilibrium_of_the_whole(dilation, stem):
    model = trellisnet(stem, dilation)
    inputs = tokens(length=2 * SEGMENT)  # a hashed stem looks as far back as the text's beginning
    whole = equilibrium(model, inputs)
    memory, pieces = None, []
    for segment in inputs.split([2, SEGMENT, SEGMENT - 2], dim=1):
        pieces.append(equilibrium(model, segment, memory))
        memory = model.remember(pieces[-1], segment, memory)
    assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=1e-10)


@every_model
def test_memory_is_the_last_tokens_there_are_of_this_segment_and_those_before(name):
    model = MODELS[name]()
    time = 2 if model.cell.layout == "nct" else 1
    size = model.inject(tokens())[1].shape[time]
    inputs = tokens(length=8)
    z = torch.randn_like(model.cell.initial_state(model.inject(inputs)))
    memory = None
    for piece, segment in zip(z.split([1, 3, 4], dim=time), inputs.split([1, 3, 4], dim=1), strict=True):
        memory = model.remember(piece, segment, memory)
        assert memory.states.shape[time] == size
    assert_close(memory.states, z.narrow(time, 8 - size, size), rtol=0, atol=0)
    assert torch.equal(memory.tokens, inputs[:, -3:])
    early = model.remember(z.narrow(time, 0, 1), inputs[:, :1])
    assert float(early.states.narrow(time, 0, size - 1).abs().max()) == 0
    assert torch.equal(early.states.narrow(time, size - 1, 1), z.narrow(time, 0, 1))
    assert early.tokens.tolist() == [[-1, -1, first] for first in inputs[:, 0].tolist()]


@every_model
def test_memory_of_another_batch_or_model_is_refused(name):
    model = MODELS[name]()
    memory, two = read(model, tokens(2)), tokens(2)
    single, far = memory._replace(states=memory.states.float()), memory.tokens + 11 - memory.tokens.max()
    z, words = equilibrium(model, two, tuple(memory)), r"states and tokens of "
    refused(words + r".*\(3, 3\).* got .*\(2, 3\)", lambda: model.inject(tokens(3), memory))
    refused(words + r".*float64.* got .*float32", lambda: model.inject(two, single))
    words = r"tokens before them must be from -1 to 10, got some from .* to 11"
    refused(words, lambda: model.inject(two, memory._replace(tokens=far)))
    refused(r"got torch.int64 of \(\)", lambda: model.inject(torch.tensor(1)))
    words = r"an equilibrium of \(2, .*\) is not that of tokens \(2, 8\)"
    refused(words, lambda: model.remember(z, tokens(2, SEGMENT - 1), memory))


@every_model
def test_an_equilibrium_is_found_under_autocast(name):
    model = MODELS[name]("hashed").float()
    model.deq.rtol, inputs = 3e-2, tokens()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
    assert bool(model.deq.last_solution.converged.all())
    model.deq.rtol = 1e-4
    assert_close(logits.float(), model(inputs), rtol=0, atol=0.3)


def test_the_transformer_may_have_no_memory():
    model, first, second = transformer(memory=0), tokens(), tokens()
    memory = read(model, first)
    assert memory.states.shape == (3, 0, 8)
    memory = zoo.Memory(memory.states, model.beginning(3).tokens)
    assert torch.equal(equilibrium(model, second, memory), equilibrium(model, second))


@every_model
def test_gradients_reach_every_parameter_through_the_equilibrium(name):
    model = MODELS[name]()
    model.deq.backward_mode = mb.Implicit(rtol=1e-9, max_nfe=300)
    inputs = tokens()
    memory = read(model, tokens())
    logits = model(inputs, memory)
    assert logits.shape == (3, SEGMENT, TOKENS)
    assert logits.dtype == torch.float64
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens().flatten()).backward()
    for parameter in model.parameters():
        assert float(parameter.grad.abs().max()) > 1e-8


def test_a_hashed_stem_knows_the_last_few_tokens_and_no_more():
    stem = TokenStem(TOKENS, 5, 6, 7, "hashed", reach=3, rows=997, row=4).eval()
    text = tokens(2, 6)
    out = stem(text)
    for back in range(4):
        changed = text.clone()
        changed[:, 5 - back] = (changed[:, 5 - back] + 1) % TOKENS
        assert torch.equal(stem(changed)[:, 5], out[:, 5]) == (back >= 3)
    alone = torch.cat([stem(text[:, :4]), stem(text[:, 2:])[:, 2:]], dim=1)  # what stands before 3 tokens is not seen
    assert_close(alone, out)
    assert_close(stem(text[:, 2:], text[:, :2]), out[:, 2:])
    assert not torch.equal(stem.train()(text), stem(text)), "rows are left out in training"
    pairs = torch.cartesian_prod(torch.arange(TOKENS), torch.arange(TOKENS))
    keys = stem._keys(pairs)[:, 1, 0]
    assert len(keys.unique()) > 0.9 * len(pairs), "few pairs may share a row"


def test_followers_are_the_tokens_after_the_last_time_an_n_gram_was_read():
    stem = TokenStem(3, 5, 6, 7, "hashed", reach=4, recent=1)
    text = torch.randint(3, (4, 30))
    text[:, :3] = -1  # the text begins after these
    found = followers(text, stem._keys(text))
    for b, read in enumerate(text.tolist()):
        for t, order in product(range(3, 30), range(3)):
            n = order + 2
            gram = read[t - n + 1 : t + 1]
            places = [j for j in range(n - 1, t) if -1 not in gram and read[j - n + 1 : j + 1] == gram]
            assert found[b, t, order] == (read[places[-1] + 1] if places else -1)
    assert (found >= 0).float().mean() > 0.3, "some are found"


def test_what_was_read_recently_tells_what_follows_across_segments():
    stem = TokenStem(TOKENS, 5, 6, 7, "hashed", reach=3, rows=97, recent=12).eval()
    before, segment = tokens(2, 12), tokens(2, 6)
    before[:, 5:8] = torch.tensor([1, 2, 3])  # 1 2 was followed by 3 …
    segment[:, 2:4] = torch.tensor([1, 2])
    out, other = stem(segment, before), before.clone()
    other[:, 7] = 4  # … or by 4
    nothing = torch.full_like(before, -1)
    changed = (stem(segment, other) - out).abs().amax(dim=(0, 2))
    assert changed[3] > 1e-3
    assert torch.equal(stem(segment, nothing), stem(segment))
    assert not torch.equal(stem(segment, nothing)[:, 3], out[:, 3])


@torch.no_grad()
def test_rows_tell_of_which_length_an_n_gram_is_that_was_followed():
    stem = TokenStem(TOKENS, 5, 6, 7, "hashed", reach=3, rows=97, recent=4)
    stem.follow.weight.copy_(torch.arange(len(stem.follow.weight))[:, None].expand_as(stem.follow.weight))
    for parameter in stem.linear.parameters():
        parameter.zero_()
    stem.linear.weight[0, -17] = stem.linear.weight[1, -1] = 1  # of the rows for pairs, and for three
    out = stem.eval()(torch.tensor([[3, 1, 2, 5, 3, 1, 2]]))[0, -1]
    assert out[:2].tolist() == [5 + 1, 5 + 1 + (TOKENS + 1)]


@every_model
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(2, 0, dtype=torch.long), r"not empty, got torch.int64 of \(2, 0\)"),
        (torch.zeros(4, dtype=torch.long), r"int64 \(B, T\)"),
        (torch.zeros(2, 4), "got torch.float32"),
        (torch.tensor([[0, TOKENS]]), f"from 0 to {TOKENS - 1}, got some from 0 to {TOKENS}"),
        (torch.tensor([[-1, 2]]), "got some from -1 to 2"),
    ],
)
def test_what_are_no_tokens_is_refused(name, bad, words):
    refused(words, lambda: MODELS[name]()(bad))
