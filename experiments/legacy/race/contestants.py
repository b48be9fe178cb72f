"""Who runs: classical solvers, tuned, also from a learned start; learned ones; other libraries'."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.peers import TorchDEQSolver, solve_state
from experiments.legacy import equilibria
from experiments.legacy.equilibria import HeldOut
from metabroyden.checkpoint import load_solver
from metabroyden.learned.learned_start import LearnedStart
from metabroyden.solvers import Broyden, Newton, Picard
from metabroyden.solvers.tuning import score, tune

FLAGSHIP = "meta-broyden"
LEARNED = (FLAGSHIP, "grouped", "hyper-anderson")
"""Solvers taken from results/meta, with all seeds that are there."""
_JUDGED = (1e-2, 1e-3)


@dataclass(frozen=True)
class Contestant:
    """One solver of the race.

    Attributes:
        name, kind: see `schema`. solver: one for `solve`; a peer's for `solve_state`. options: in words.
        seed: of a learned solver; None for others.
    """

    name: str
    kind: str
    solver: Any
    options: str
    seed: int | None = None

    @property
    def peer(self) -> bool:
        """Whether it runs in another library's loop."""
        return self.kind == "peer"

    @property
    def key(self) -> str:
        """Its name with its seed."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


def classical(validation: HeldOut, budget: int, *, splitting: bool) -> list[Contestant]:
    """Ours, each the best of its grid on validation problems, and two as they are."""
    z0, x, _ = next(iter(validation.chunks()))
    newton = [Newton(krylov=directions, forcing=forcing) for directions in (5, 20) for forcing in (1e-2, 1e-1)]
    found = {"Picard": Picard(), "Broyden": Broyden(budget), **equilibria.tuned_solvers(validation, budget)}
    found["Newton-Krylov"] = tune(newton, validation.f, z0, x, tolerances=_JUDGED, max_nfe=budget)[0][0]
    if splitting:
        found |= equilibria.splitting_solvers(validation, budget)
    return [Contestant(name, "classical", solver, repr(solver)) for name, solver in found.items()]


def started(learned: Contestant, known: list[Contestant]) -> list[Contestant]:
    """The tuned Picard, Anderson and Broyden from the start of a learned solver, where it has one that makes states."""
    solver = learned.solver
    if getattr(solver, "initializer", None) is None or solver.required_methods:
        return []
    return [
        Contestant(
            f"{one.name} + start", "started", LearnedStart.of(solver, one.solver), f"{one.options} + {learned.options}"
        )
        for one in known
        if one.name in ("tuned Picard", "tuned Anderson", "tuned Broyden")
    ]


def learned(folder: Path, family: str, names: tuple[str, ...] = LEARNED) -> list[Contestant]:
    """Trained solvers of a family, from results/meta."""
    found = []
    for name in names:
        for path in sorted((folder / family).glob(f"{name}-seed*/solver.safetensors")):
            seed = int(path.parent.name.rpartition("seed")[2])
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
            found.append(Contestant(name, "learned", load_solver(path), digest, seed))
    return found


def universal() -> Contestant:
    """The universal solver that is shipped."""
    solver = load_solver("universal")
    weights = b"".join(value.cpu().numpy().tobytes() for value in solver.state_dict().values())
    return Contestant("universal", "learned", solver, f"shipped, {hashlib.sha256(weights).hexdigest()[:8]}", 0)


def torchdeq(name: str) -> TorchDEQSolver:
    """torchdeq's solver of this name, as it is."""
    return TorchDEQSolver(name.lower())


def peers(validation: HeldOut, budget: int) -> list[Contestant]:
    """torchdeq's Broyden and Anderson, as they are and tuned like ours."""
    grids = {
        "Broyden": [
            # its line search spends calls beyond the budget
            TorchDEQSolver("broyden", (("LBFGS_thres", memory),))
            for memory in (5, 10, 15, 20, 30, 40, budget)
        ],
        "Anderson": [
            torchdeq("Anderson"),
            *(
                TorchDEQSolver("anderson", (("m", memory), ("lam", ridge), ("tau", damping)))
                for memory, ridge, damping in itertools.product((5, 10), (1e-4, 1e-6), (0.25, 0.7, 1.0, 1.5))
            ),
        ],
    }
    found = []
    for name, grid in grids.items():
        usual = torchdeq(name)
        found.append(Contestant(f"torchdeq {name}", "peer", usual, repr(usual)))
        best = min(grid, key=lambda solver: peer_score(solver, validation, budget))
        found.append(Contestant(f"tuned torchdeq {name}", "peer", best, repr(best)))
    return found


def peer_score(solver: Any, validation: HeldOut, budget: int) -> float:
    """What tuning minimises, of another library's solver."""
    z0, x, _ = next(iter(validation.chunks()))
    _, recorder = solve_state(solver, validation.f, z0, x, min(_JUDGED), budget)
    return score(recorder.trace(), _JUDGED, budget)
