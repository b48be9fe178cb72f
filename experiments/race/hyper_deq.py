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
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench import solvers
from experiments.bench.peers import Enough, Recorder, available
from experiments.bench.problems import Family, HeldOut, packed
from experiments.bench.runner import Row
from experiments.bench.solvers import Peer
from experiments.race.units import Setting, Unit
from metabroyden import checkpoint
from metabroyden.nn.pin import pin
from metabroyden.solve import solve
from metabroyden.solvers import Broyden

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


def network(size: int, condition: int) -> Any:
    """An untrained one, for states (B, size) and contexts (B, condition)."""
    from silva_networks.solver_learning import SILVAHyperDEQ

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SILVAHyperDEQ(size, condition, transition=_Map(), learned_steps=UNROLL)


class HyperDEQ:
    """A trained one as a peer for `solve_state`: stopped by our rule, since it has none but a number of steps."""

    conditioned = True

    def __init__(self, network: Any, options: str = "") -> None:
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
            self.network(_flat(condition), learned_steps=max_nfe)
        return z0 if recorder.last is None else recorder.last, recorder


def _flat(x: Any) -> Tensor:
    """(B, d): what it sees of a context, of a pinned one the user's."""
    return getattr(x, "context", x).flatten(1)


Look = tuple[float, int, float, dict[str, Tensor]]
"""A look at validation in a training: the score there, outer steps, the rate, the weights."""


def looks(family: Family, validation: HeldOut, budget: int) -> Iterator[Look]:
    """All looks of trainings on augmented contexts and on others, with all `RATES`."""
    tasks, generator = family.tasks(0), torch.Generator().manual_seed(0)
    raw = tasks.split("train")
    plain = raw[torch.randperm(len(raw), generator=generator)[:POOL]]
    for z0, x in (tasks.draw(POOL, generator), tasks.prepare(plain)):
        f, x = pin(tasks.f, x, z0)
        held = HeldOut(f, z0, x, validation.judge)
        found = [
            solve(held.f, *problems, solver=Broyden(120), rtol=1e-4, max_nfe=120, throw=False)
            for *problems, _ in held.chunks(128)
        ]
        # what was not found to 1e-4 teaches nothing
        solved = torch.cat([one.converged for one in found]).nonzero()[:, 0]
        star = torch.cat([packed(one.z) for one in found])[solved]
        z0, x = held.take(solved)
        for rate in RATES:
            yield from _training(rate, replace(held, z0=z0, x=x, star=star), validation, budget)


def _training(rate: float, held: HeldOut, validation: HeldOut, budget: int) -> Iterator[Look]:
    from silva_networks.solver_learning import silva_hyper_deq_loss

    assert held.star is not None
    model = network(held.star.shape[1], _flat(held.x).shape[1]).to(held.star)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator, began = torch.Generator().manual_seed(0), time.process_time()
    step, looked = 0, 0
    while looked < LOOKS:
        index = torch.randint(len(held), (BATCH,), generator=generator).to(held.device)
        _, x = held.take(index)
        model.transition.f = lambda z: packed(held.f(held.states(z), x))  # noqa: B023 (called at once)
        optimizer.zero_grad()
        silva_hyper_deq_loss(model(_flat(x)), held.star[index], task_weight=0.0).total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        share = max(step / STEPS, (time.process_time() - began) / SECONDS)
        optimizer.param_groups[0]["lr"] = 0.5 * rate * (1 + math.cos(math.pi * min(share, 1.0)))
        if share * LOOKS >= looked + 1:
            looked += 1
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            yield solvers.peer_score(HyperDEQ(model), validation, budget), step, rate, weights


def unit(setting: Setting, name: str) -> Unit:
    """HyperDEQ and MetaBroyden on one family, in turns."""
    if not available("silva_networks"):
        raise ImportError(
            f"HyperDEQ comes with {PACKAGE}: pip install {PACKAGE}==1.2.2, or leave it out by --no-hyper-deq"
        )
    also = repr((importlib.metadata.version(PACKAGE), RATES, STEPS, SECONDS, LOOKS, UNROLL, BATCH, POOL))

    def rows(work: Path) -> list[Row]:
        """Both, Broyden's method and torchdeq's Anderson beside them."""
        family, budget = setting.family(name), setting.config.budget
        peer, taken = _trained(work / "hyper-deq.safetensors", family, budget)
        theirs = Peer("HyperDEQ", "peer", peer, peer.options, 0)
        classical = [solvers.contestant("Broyden", Broyden(budget)), *solvers.torchdeq("Anderson")]
        held = setting.held(family)
        everyone, rules = [*setting.fitted(name), theirs, *classical], setting.rules(family, held, weighed=False)
        found = setting.measure("hyper-deq", held, everyone, rules)
        return [*found, {"row": "training", **setting.stamp("hyper-deq", name)(theirs), **taken}]

    return setting.unit(f"hyper-deq-{name}", rows, setting.files(name), also)


def _trained(path: Path, family: Family, budget: int) -> tuple[HyperDEQ, Row]:
    """Trained once, and kept; with CPU seconds and outer steps."""
    validation = family.problems("validation", 64)
    if not path.exists():
        began = time.process_time()
        _, steps, rate, weights = min(looks(family, validation, budget), key=itemgetter(0))
        header = {"rate": rate, "cpu_seconds": round(time.process_time() - began, 1), "steps": steps}
        checkpoint.write(path, "race/hyper-deq", weights, header)
    tensors, kept = checkpoint.read(path, "race")
    model = network(packed(validation.z0).shape[1], _flat(validation.x).shape[1])
    model.load_state_dict(tensors)
    options = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, rate {kept['rate']:g}, {kept['steps']} steps"
    return HyperDEQ(model.to(family.device), options), {name: kept[name] for name in ("cpu_seconds", "steps")}
