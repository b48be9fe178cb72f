"""Who is measured: classical solvers, as they are and tuned, also from a learned start; learned ones; other libraries'."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench.peers import TorchDEQSolver, solve_state
from experiments.bench.runner import digest
from metabroyden.checkpoint import list_pretrained, load_solver
from metabroyden.comparison import verdict
from metabroyden.comparison.clock import now
from metabroyden.comparison.figures import FLAGSHIP
from metabroyden.comparison.measure import Contestant, Found
from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.tables import Row
from metabroyden.gradients.base import parts_of
from metabroyden.learned.learned_start import LearnedStart
from metabroyden.solution import State
from metabroyden.solvers import Broyden, Newton, Picard
from metabroyden.solvers import classical as grids
from metabroyden.solvers.tuning import score, tune

LEARNED = (FLAGSHIP, "grouped", "hyper-anderson")
"""Solvers taken from results/meta, with all seeds that are there."""
JUDGED = (1e-2, 1e-3)
"""Tolerances on which solvers are tuned."""


@dataclass(frozen=True)
class Peer(Contestant):
    """A solver of another library, which runs in that one's loop: for `solve_state`."""

    @property
    def parts(self) -> bool:
        """No peer uses parts of a cell."""
        return False

    def timed(
        self, f: Any, z0: State, x: Any, tolerance: float, budget: int, *, keep: bool = True
    ) -> tuple[Found, Row]:
        """A solve, and where its time went. keep: False where only the time is wanted: it is not recorded then."""
        device = parts_of(z0)[0].device
        began = now(device)
        z, recorder = solve_state(self.solver, f, z0, x, tolerance, budget, keep=keep)
        total = now(device) - began - recorder.excused
        in_f = recorder.f_seconds if device.type == "cpu" else None
        taken = {"total": total, "f": in_f, "solver": total - (in_f or 0.0), "bookkeeping": 0.0}
        if not keep:
            return Found(z0, np.empty(0), [], "", 0, None), taken
        trace = recorder.trace()
        evaluations, reached = trace.evaluations_to(tolerance, budget)
        smallest = trace.residual.nan_to_num(torch.inf).min(dim=0).values.tolist()
        finite = torch.isfinite(trace.residual[-1]).tolist()
        letters = ["C" if hit else "B" if whole else "N" for hit, whole in zip(reached, finite, strict=True)]
        return Found(z, evaluations, smallest, "".join(letters), 0, trace), taken


def contestant(name: str, solver: Any, seed: int | None = None) -> Contestant:
    """A solver under a name; its kind follows from what it is."""
    if not hasattr(solver, "solve"):
        return replace(verdict.contestant(name, solver), seed=seed)
    return Peer(name, "peer", solver, repr(solver), seed)


def contestants(**solvers: Any) -> list[Contestant]:
    """Several, by name."""
    return [contestant(name, solver) for name, solver in solvers.items()]


def tuned(validation: HeldOut, budget: int, *, splitting: bool = False) -> dict[str, Any]:
    """The best Picard, Anderson and Broyden of a grid on validation problems; splitting: and the two splitting methods."""
    z0, x = validation.first()
    found = grids.tuned_solvers(validation.f, z0, x, budget=budget)
    return found | (grids.splitting_solvers(validation.f, z0, x, budget=budget) if splitting else {})


def classical(validation: HeldOut, budget: int, *, splitting: bool) -> list[Contestant]:
    """Ours, each the best of its grid on validation problems, and two as they are."""
    z0, x = validation.first()
    newton = [Newton(krylov=directions, forcing=forcing) for directions in (5, 20) for forcing in (1e-2, 1e-1)]
    found = {"Picard": Picard(), "Broyden": Broyden(budget), **tuned(validation, budget)}
    found["Newton-Krylov"] = tune(newton, validation.f, z0, x, tolerances=JUDGED, max_nfe=budget)[0][0]
    if splitting:
        found |= grids.splitting_solvers(validation.f, z0, x, budget=budget)
    return contestants(**found)


def started(learned: Contestant, known: Iterable[Contestant]) -> list[Contestant]:
    """The tuned Picard, Anderson and Broyden from the start of a learned solver, where it has one that makes states."""
    solver = learned.solver
    if getattr(solver, "initializer", None) is None or learned.parts:
        return []
    return [
        Contestant(
            f"{name} + start", "started", LearnedStart.of(solver, one.solver), f"{one.options} + {learned.options}"
        )
        for name, one in ((one.name, one) for one in known)
        if name in ("tuned Picard", "tuned Anderson", "tuned Broyden")
    ]


def solver_files(folder: Path, family: str, name: str = "*") -> list[Path]:
    """Files of the solvers trained on a family, from results/meta."""
    return sorted((folder / family).glob(f"{name}-seed*/solver.safetensors"))


def learned(folder: Path, family: str, names: Iterable[str] = LEARNED, device: Any = "cpu") -> list[Contestant]:
    """Trained solvers of a family with all seeds that are there, from results/meta."""
    found = []
    for path in (path for name in names for path in solver_files(folder, family, name)):
        name, _, seed = path.parent.name.rpartition("-seed")
        found.append(Contestant(name, "learned", load_solver(path).to(device), digest(path), int(seed)))
    return found


def trained(folder: Path, family: str, name: str) -> Any:
    """A shipped solver, or NAME-seedNUMBER of those trained on a family, from results/meta."""
    if name in list_pretrained():
        return load_solver(name)
    path = folder / family / name / "solver.safetensors"
    kind, _, seed = name.rpartition("-seed")
    if not (kind and seed.isdigit()):
        shipped = ", ".join(list_pretrained())
        raise ValueError(f"solver must be NAME-seedNUMBER or a shipped one ({shipped}), got {name!r}")
    if not path.exists():
        command = f"python -m experiments meta --family {family} --solver {kind} --seed {seed}"
        raise FileNotFoundError(f"{path} is missing: train it with `{command}`")
    return load_solver(path)


def universal(device: Any = "cpu") -> Contestant:
    """The universal solver that is shipped."""
    solver = load_solver("universal")
    weights = b"".join(value.cpu().numpy().tobytes() for value in solver.state_dict().values())
    made_of = hashlib.sha256(weights).hexdigest()[:8]
    return Contestant("universal", "learned", solver.to(device), f"shipped, {made_of}", 0)


def shuffled(solver: Any, seed: int) -> Any:
    """A copy whose weights are its own, those of each tensor in another order: wrong ones of the right scale."""
    wrong, generator = copy.deepcopy(solver), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in wrong.parameters():
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return wrong


def torchdeq(*names: str) -> list[Contestant]:
    """torchdeq's Broyden and Anderson, as they are."""
    return [contestant(f"torchdeq {name}", TorchDEQSolver(name.lower())) for name in names or ("Broyden", "Anderson")]


def peers(validation: HeldOut, budget: int) -> list[Contestant]:
    """torchdeq's Broyden and Anderson, as they are and tuned like ours."""
    options = itertools.product((5, 10), (1e-4, 1e-6), (0.25, 0.7, 1.0, 1.5))
    tried = [tuple(zip(("m", "lam", "tau"), values, strict=True)) for values in options]
    memories = (5, 10, 15, 20, 30, 40, budget)  # its line search spends calls beyond the budget
    grids = {
        "Broyden": [TorchDEQSolver("broyden", (("LBFGS_thres", memory),)) for memory in memories],
        "Anderson": [TorchDEQSolver("anderson", option) for option in ((), *tried)],
    }
    found = []
    for name, grid in grids.items():
        (usual,) = torchdeq(name)
        best = min(grid, key=lambda solver: peer_score(solver, validation, budget))
        found += [usual, replace(usual, name=f"tuned {usual.name}", solver=best, options=repr(best))]
    return found


def peer_score(solver: Any, validation: HeldOut, budget: int) -> float:
    """What tuning minimises, of another library's solver."""
    _, recorder = solve_state(solver, validation.f, *validation.first(), min(JUDGED), budget)
    return score(recorder.trace(), JUDGED, budget)
