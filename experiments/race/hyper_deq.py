"""Another library's learned solver: HyperDEQ of silva-networks, trained by its own loss, run as it is.

It follows Bai, Koltun & Kolter 2022 in form: a learned start, and a network that sets Anderson's coefficients (there by a
softmax: nothing is extrapolated) and the damping from four statistics of the last five residuals and of the context. Its
start ends in a tanh, and reaches no state beyond ±1.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.bench import solvers
from experiments.bench.peers import Enough, Recorder, available
from experiments.bench.problems import Family, HeldOut, packed
from experiments.bench.runner import Row
from experiments.bench.solvers import Contestant
from experiments.race.units import Setting, Unit
from metabroyden import checkpoint
from metabroyden.nn.pin import pin
from metabroyden.solve import solve
from metabroyden.solvers import Broyden
from metabroyden.state import Packing, gather
from metabroyden.zoo.tasks import family_tasks

FAMILIES = ("dense-digits", "dense-fashion")
"""Whose state is one vector, which is what it is made for, and whose context is one tensor."""
PACKAGE = "silva-networks"
RATES = (1e-3, 3e-3)
"""Learning rates tried, each falling to zero along a cosine; validation problems choose among them and among looks."""
STEPS, SECONDS, LOOKS = 2000, 130.0, 8
"""Of a training with one rate: outer steps, or CPU seconds if those are over before; looks at validation."""
UNROLL, BATCH, POOL = 10, 32, 2048
"""Steps unrolled; samples of a batch; training contexts, augmented as all learned solvers' are, or not: both are tried."""


class _Map(nn.Module):
    """The f that a HyperDEQ iterates, put in for every solve."""

    f: Callable[[Tensor], Tensor]

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.f(z)


class HyperDEQ:
    """A trained one as a peer for `solve_state`: stopped by our rule, since it has none but a number of steps."""

    conditioned = True

    def __init__(self, network: Any, options: str) -> None:
        self.network, self.options = network, options

    def __repr__(self) -> str:
        return self.options

    @torch.no_grad()
    def solve(
        self, f: Callable[[Tensor], Tensor], z0: Tensor, rtol: float, max_nfe: int, *, condition: Any, keep: bool = True
    ) -> tuple[Tensor, Recorder]:
        """(z, record) on a flat state (B, n), from its own start; condition: the context."""
        recorder = Recorder(f, rtol=rtol, max_calls=max_nfe, keep=keep)
        self.network.transition.f = recorder
        with contextlib.suppress(Enough):
            self.network(flat_context(condition), learned_steps=max_nfe)
        return z0 if recorder.last is None else recorder.last, recorder


def flat_context(x: Any) -> Tensor:
    """(B, d): what a HyperDEQ sees of a context, of a pinned one the user's."""
    return getattr(x, "context", x).flatten(1)


class Trained(NamedTuple):
    """A training's outcome: its score on validation, and after how many outer steps."""

    score: float
    steps: int
    rate: float
    weights: dict[str, Tensor]


def train(family: Family, validation: HeldOut, budget: int) -> tuple[Trained, float]:
    """(the best look at validation of trainings with all `RATES`, CPU seconds of all of them together)."""
    began = time.process_time()
    model, generator = family.model(), torch.Generator().manual_seed(0)
    tasks = family_tasks(model, family.criterion)
    raw = tasks.split("train")
    plain = raw[torch.randperm(len(raw), generator=generator)[:POOL]]
    tried: list[Trained] = []
    for z0, x in (tasks.draw(POOL, generator), tasks.prepare(plain)):
        f, x = pin(model.cell, x, z0)
        target, solved = _equilibria(f, z0, x)
        x, target = gather(x, solved), target[solved]
        for rate in RATES:
            tried += _training(rate, f, Packing.of(z0), x, target, validation, budget)
    return min(tried, key=lambda look: look.score), time.process_time() - began


def _equilibria(f: Any, z0: Any, x: Any) -> tuple[Tensor, Tensor]:
    """(equilibria to 1e-4 (N, n), the indices of those that were found): others teach nothing."""
    targets, found = [], []
    for index in torch.arange(len(packed(z0)), device=packed(z0).device).split(128):
        start, context = gather(z0, index), gather(x, index)
        solution = solve(f, start, context, solver=Broyden(120), rtol=1e-4, max_nfe=120, throw=False)
        targets.append(packed(solution.z))
        found.append(index[solution.converged])
    return torch.cat(targets), torch.cat(found)


def _training(
    rate: float, f: Any, packing: Packing, x: Any, target: Tensor, validation: HeldOut, budget: int
) -> Iterator[Trained]:
    network = _network(target.shape[1], flat_context(x).shape[1]).to(target)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    generator, began = torch.Generator().manual_seed(0), time.process_time()
    step, looked = 0, 0
    while looked < LOOKS:
        index = torch.randint(len(target), (BATCH,), generator=generator).to(target.device)
        context = gather(x, index)
        network.transition.f = lambda z: packing.pack(f(packing.unpack(z), context))  # noqa: B023 (called at once)
        loss = _loss(network(flat_context(context)), target[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        share = max(step / STEPS, (time.process_time() - began) / SECONDS)
        optimizer.param_groups[0]["lr"] = 0.5 * rate * (1 + math.cos(math.pi * min(share, 1.0)))
        if share * LOOKS >= looked + 1:
            looked += 1
            score = solvers.peer_score(HyperDEQ(network, ""), validation, budget)
            weights = {name: value.clone() for name, value in network.state_dict().items()}
            yield Trained(score, step, rate, weights)


def _network(size: int, condition: int) -> Any:
    from silva_networks.solver_learning import SILVAHyperDEQ

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SILVAHyperDEQ(size, condition, transition=_Map(), learned_steps=UNROLL)


def _loss(found: Any, target: Tensor) -> Tensor:
    from silva_networks.solver_learning import silva_hyper_deq_loss

    return silva_hyper_deq_loss(found, target, task_weight=0.0).total


def unit(setting: Setting, name: str) -> Unit:
    """HyperDEQ and MetaBroyden on one family, in turns."""
    if not available("silva_networks"):
        raise ImportError(f"HyperDEQ comes with {PACKAGE}: pip install {PACKAGE}==1.2.2, or leave it out by --no-cells")
    version = importlib.metadata.version(PACKAGE)
    also = repr((version, "augmented and plain", RATES, STEPS, SECONDS, LOOKS, UNROLL, BATCH, POOL))
    one = setting.family(name)
    return setting.unit(
        f"hyper-deq-{name}", lambda work: _rows(setting, one, work), [one.path, *setting.files(name)], also
    )


def _rows(setting: Setting, family: Family, work: Path) -> list[Row]:
    """Both, Broyden's method and torchdeq's Anderson beside them."""
    budget = setting.config.budget
    peer, taken = _trained(work / "hyper-deq.safetensors", family, budget)
    held = family.problems("test", setting.count(family))
    theirs = Contestant("HyperDEQ", "peer", peer, peer.options, 0)
    broyden = solvers.contestant("Broyden", Broyden(budget))
    everyone = [*setting.learned(family.name), theirs, broyden, *solvers.torchdeq("Anderson")]
    stamp = setting.stamp("hyper-deq", family.name)
    rows = setting.measure(held, everyone, replace(setting.rules(family, held), weighed=False), stamp)
    return [*rows, {"row": "training", **stamp(theirs), **taken}]


def _trained(path: Path, family: Family, budget: int) -> tuple[HyperDEQ, Row]:
    """Trained once, and kept; with CPU seconds and outer steps."""
    validation = family.problems("validation", 64)
    if not path.exists():
        found, seconds = train(family, validation, budget)
        header = {"rate": found.rate, "cpu_seconds": round(seconds, 1), "steps": found.steps}
        checkpoint.write(path, "race/hyper-deq", found.weights, header)
    tensors, kept = checkpoint.read(path, "race")
    network = _network(packed(validation.z0).shape[1], flat_context(validation.x).shape[1])
    network.load_state_dict(tensors)
    options = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, rate {kept['rate']:g}, {kept['steps']} steps"
    return HyperDEQ(network.to(family.device), options), {name: kept[name] for name in ("cpu_seconds", "steps")}
