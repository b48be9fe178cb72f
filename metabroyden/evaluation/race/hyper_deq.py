"""Another library's learned solver: HyperDEQ of silva-networks, trained by its own loss, run as it is.

It follows Bai, Koltun & Kolter 2022 in form: a learned start, and a network that sets Anderson's coefficients (there by a
softmax: nothing is extrapolated) and the damping from four statistics of the last five residuals and of the context.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden import checkpoint
from metabroyden.evaluation import equilibria, meta_rows
from metabroyden.evaluation.equilibria import HeldOut
from metabroyden.evaluation.peers import Enough, Recorder
from metabroyden.evaluation.race import contestants, measure
from metabroyden.evaluation.race.contestants import FLAGSHIP, Contestant
from metabroyden.evaluation.race.schema import Row
from metabroyden.evaluation.race.units import OnFamily, Settings, digest
from metabroyden.meta.families import family_tasks
from metabroyden.solve import solve
from metabroyden.solvers import Broyden
from metabroyden.state import Packing, gather
from metabroyden.training.pin import pin

FAMILIES = ("dense-digits", "dense-fashion", "conv-digits")
"""Whose state is one tensor, and whose context is one."""
VERSION = "1.2.2"
RATES = (1e-3, 3e-3)
"""Learning rates tried; validation problems choose."""
STEPS, SECONDS = 1500, 90.0
"""Of a training with one rate: outer steps, or CPU seconds if those are over before."""
UNROLL, BATCH, POOL = 10, 32, 1024
SETTINGS = (RATES, STEPS, SECONDS, UNROLL, BATCH, POOL)


class _Map(nn.Module):
    """The f that a HyperDEQ iterates, put in for every solve."""

    f: Callable[[Tensor], Tensor]

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.f(z)


class HyperDEQ:
    """A trained one as a peer for `solve_state`: stopped by our rule, since it has none but a number of steps."""

    conditioned = True

    def __init__(self, network: Any, options: str) -> None:
        self.network, self.options = network.eval(), options

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


def train(unit: OnFamily, validation: HeldOut) -> tuple[HyperDEQ, float]:
    """(the best on validation over `RATES`, CPU seconds of all trainings together).

    Targets are equilibria of training contexts, to 1e-4.
    """
    began = time.process_time()
    model, seed = unit.model(), torch.Generator().manual_seed(0)
    tasks = family_tasks(model, unit.criterion)
    raw = tasks.split("train")
    z0, x = tasks.prepare(raw[torch.randperm(len(raw), generator=seed)[:POOL]])
    f, x = pin(model.cell, x, z0)
    packing = Packing.of(z0)
    targets = []
    for index in torch.arange(len(meta_rows.packed(z0))).split(128):
        start, context = gather(z0, index), gather(x, index)
        found = solve(f, start, context, solver=Broyden(60), rtol=1e-4, max_nfe=60, throw=False)
        targets.append(meta_rows.packed(found.z))
    target = torch.cat(targets)

    def attempt(rate: float) -> HyperDEQ:
        network = _network(target.shape[1], flat_context(x).shape[1])
        optimizer = torch.optim.Adam(network.parameters(), lr=rate)
        generator, until = torch.Generator().manual_seed(0), time.process_time() + SECONDS
        step = 0
        while step < STEPS and time.process_time() < until:
            index = torch.randint(len(target), (BATCH,), generator=generator)
            context = gather(x, index)
            network.transition.f = lambda z: packing.pack(f(packing.unpack(z), context))  # noqa: B023 (called at once)
            loss = _loss(network(flat_context(context)), target[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1
        return HyperDEQ(network, f"silva-networks {VERSION}, rate {rate:g}, {step} steps")

    best = min((attempt(rate) for rate in RATES), key=lambda one: contestants.peer_score(one, validation, 60))
    return best, time.process_time() - began


def _network(size: int, condition: int) -> Any:
    from silva_networks.solver_learning import SILVAHyperDEQ

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SILVAHyperDEQ(size, condition, transition=_Map(), learned_steps=UNROLL)


def _loss(found: Any, target: Tensor) -> Tensor:
    from silva_networks.solver_learning import silva_hyper_deq_loss

    return silva_hyper_deq_loss(found, target, task_weight=0.0).total


class HyperDEQUnit(OnFamily):
    """HyperDEQ and MetaBroyden on one family, in turns."""

    def __init__(self, settings: Settings, family: str) -> None:
        super().__init__(settings, family)
        self.name = f"hyper-deq-{family}"
        also = repr((VERSION, SETTINGS))
        self.key = f"{self.name}-{digest(self.path, *self.solvers_of(family), also=also)}"

    def rows(self, work: Path) -> list[Row]:
        """Both, Broyden's method and torchdeq's Anderson beside them."""
        settings, model = self.settings, self.model()
        peer, seconds = self._trained(work / "hyper-deq.safetensors", model)
        held = equilibria.held_out(model, self.criterion, "test", self.count)
        ours = contestants.learned(settings.meta, self.family, (FLAGSHIP,))
        for one in ours:
            one.solver.to(settings.device)
        broyden, anderson = Broyden(settings.budget), contestants.torchdeq("Anderson")
        theirs = Contestant("HyperDEQ", "peer", peer, peer.options, 0)
        everyone = [
            *ours,
            theirs,
            Contestant("Broyden", "classical", broyden, repr(broyden)),
            Contestant("torchdeq Anderson", "peer", anderson, repr(anderson)),
        ]
        stamp = self.stamp("hyper-deq", self.family)
        rules = replace(self.rules(held), weighed=False)
        rows = self.solves(everyone, held, *measure.unknown(held), rules, stamp, self.name)
        return [*rows, {"row": "training", **stamp(theirs), "cpu_seconds": seconds, "steps": STEPS}]

    def _trained(self, path: Path, model: Any) -> tuple[HyperDEQ, float]:
        """Trained once, and kept."""
        validation = equilibria.held_out(model, self.criterion, "validation", 64)
        if not path.exists():
            found, seconds = train(self, validation)
            header = {"options": found.options, "cpu_seconds": seconds}
            checkpoint.write(path, "race/hyper-deq", dict(found.network.state_dict()), header)
        tensors, kept = checkpoint.read(path, "race")
        network = _network(meta_rows.packed(validation.z0).shape[1], flat_context(validation.x).shape[1])
        network.load_state_dict(tensors)
        return HyperDEQ(network.to(self.settings.device), str(kept["options"])), float(kept["cpu_seconds"])
