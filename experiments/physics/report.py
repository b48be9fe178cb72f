"""The report of the experiment on physics: report.md and its figure, from rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.runner import Row
from experiments.physics.parts import PACKAGES
from metabroyden.comparison import figures
from metabroyden.comparison.statistics import Field, Outcome, able, geometric
from metabroyden.comparison.tables import Table, chosen, grouped, number

PLAIN, TUNED = ("Picard", "Anderson", "Broyden"), ("tuned Picard", "tuned Anderson", "tuned Broyden")
OURS = "universal"
SAME = 1e-5
"""Hartree within which two solutions of an SCF are taken for the same."""
FIGURE = ("case3120sp", "case300-stressed", "KL", "ky10", "O3", "FeO")
WORDS = """\
Solvers see f(z) alone. An evaluation is one call of f on one sample; a sample has converged to a tolerance where
‖f(z) − z‖ ≤ tolerance · ‖f(z)‖. Cells are means over the samples of a problem, with the share solved where not all are; a
failure counts as the budget. n is the number of coordinates of z. `universal` is the shipped solver, which was trained on
cells of neural networks, with its weights in float64. The best of several solvers is the one with the smallest mean
among those that solve as many samples as any, within a standard error: of the three as they come (plain), or of these and
the tuned ones (tuned), which are the best of a grid on other samples of the same problem. Ratios are of means; one over a
rival that solves fewer than half of the samples is left out.

- **power**: AC power flow, flat start. f is the chord method: z − J₀⁻¹F(z), J₀ the Jacobian at the flat start, factored
  once; z are voltage angles and magnitudes. Samples: loads, and generation with them, of 0.8 to 1.05 of the scheduled
  ones; *stressed*: 0.5 to 0.95 of the way to the highest load that Newton's method solves. Own method: Newton's, which
  factors anew in each step, so that its iterations cost more than evaluations of f do.
- **water**: steady flows of the pipes, Hazen–Williams. f is linear theory: the flows of the linear network whose pipes
  conduct as at the flows q; each evaluation factors a Laplacian. Reservoirs, tanks and both ends of each pump and valve
  have the heads of EPANET's solution at the first hour; pumps and valves are left out. Samples: demands of 0.5 to 1.5 of the
  scheduled ones, with noise. Own method: EPANET's global gradient method, which on balanced flows is f damped by 1 / 1.852.
- **scf**: restricted Hartree–Fock, 6-31G for H2O, N2 and O3, STO-3G for the others. f is Roothaan's map of the density in
  the Löwdin basis, one Fock build an evaluation. Samples: geometries stretched by 0.95 to 1.3, with noise of 0.03 Å. Own
  method: DIIS, by pyscf itself; counted are its Fock builds until f's residual at its density meets the tolerance."""
APART = """\
## Distance to the reference

The reference is Newton's solution and the global gradient method's. Shown is the largest relative distance to it, in the
2-norm, of the samples that a solver solved to the smallest tolerance."""
BELOW = f"""\
## Other SCF solutions

Molecules have several SCF solutions, and broken symmetries make families of equal energy. The reference is the one which
DIIS finds in at most 200 Fock builds. Of the samples solved to the smallest tolerance, counted are those whose energy is by
more than {SAME:g} hartree below, and above, that of the reference."""


@report.of_rows("Physics", *PACKAGES.values())
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figure."""
    field = Field(rows)
    kinds = [(of[0]["physics"], {row["family"]: row["size"] for row in of}) for of in grouped(rows, "physics")]
    tables = [_table(field, *kind, tolerance) for kind in kinds for tolerance in field.tolerances]
    return [WORDS, *tables, *_apart(field), *_below(field), _figure(field, folder)]


def ratios(field: Field, family: str, tolerance: float) -> dict[str, float]:
    """Mean evaluations of the universal solver over those of the best plain, the best tuned solver and the field's own.

    NaN where the rival solves fewer than half of the samples.
    """
    ours = field.must(family, OURS, tolerance)
    own = field.solvers(family, "peer")
    rivals = {"best plain": PLAIN, "best tuned": (*PLAIN, *TUNED), "own method": own}
    found = {}
    for name, among in rivals.items():
        best = min(able({one: field.must(family, one, tolerance) for one in among}).values(), key=lambda one: one.mean)
        found[name] = ours.mean / best.mean if best.success >= 0.5 else float("nan")
    return found


def _table(field: Field, kind: str, sizes: dict[str, int], tolerance: float) -> Table:
    (own,) = field.solvers(next(iter(sizes)), "peer")
    names = (*PLAIN, *TUNED, own, OURS)
    every = {family: ratios(field, family, tolerance) for family in sizes}
    body = []
    for family, over in every.items():
        cells = (_cell(field.must(family, name, tolerance)) for name in names)
        body.append([family, str(sizes[family]), *cells, *(number(value) for value in over.values())])
    whole = {head: geometric(over[head] for over in every.values()) for head in next(iter(every.values()))}
    body.append(["**geometric mean**", *[""] * (1 + len(names)), *(f"**{number(value)}**" for value in whole.values())])
    return Table(f"{kind}, to {tolerance:g}", ["problem", "n", *names, *(f"over {head}" for head in whole)], body)


def _cell(one: Outcome) -> str:
    return f"{one.mean:.1f}" + ("" if one.success == 1 else f" ({one.success:.0%})")


def _solved(field: Field, family: str, name: str, key: str) -> np.ndarray:
    """Numbers under a key of the samples that were solved to the smallest tolerance and have a reference."""
    tolerance = field.tolerances[-1]
    there = field.must(family, name, tolerance).solved & np.isfinite(field.samples(family, name, tolerance, "distance"))
    return field.samples(family, name, tolerance, key)[there]


def _apart(field: Field) -> list[report.Section]:
    def cell(family: str, name: str) -> str:
        found = _solved(field, family, name, "distance")
        return f"{found.max():.0e}" if len(found) else ""

    return _by_problem(field, APART, ("power", "water"), cell)


def _below(field: Field) -> list[report.Section]:
    def cell(family: str, name: str) -> str:
        found = _solved(field, family, name, "score")
        return f"{(found > SAME).sum()}, {(found < -SAME).sum()} of {len(found)}"

    return _by_problem(field, BELOW, ("scf",), cell)


def _by_problem(
    field: Field, words: str, kinds: Sequence[str], cell: Callable[[str, str], str]
) -> list[report.Section]:
    """Words and a table of problems of these kinds, where there are some, and solvers."""
    names = (*PLAIN, *TUNED, OURS)
    families = [of[0]["family"] for of in grouped(field.rows, "family") if of[0]["physics"] in kinds]
    body = [[family, *(cell(family, name) for name in names)] for family in families]
    return [words, Table("", ["problem", *names], body)] if body else []


def _figure(field: Field, folder: Path) -> report.Picture:
    """Residuals by evaluations."""
    shown = [family for family in FIGURE if family in field.families] or field.families

    def draw(place: Any, family: str) -> None:
        (own,) = field.solvers(family, "peer")
        looks = {name: figures.look(name) for name in ("Picard", "Anderson", "Broyden", OURS)}
        looks[own] = {"color": "#000000", "linestyle": ":", "label": "own method"}
        for name, style in looks.items():
            (curve,) = chosen(field.rows, "curve", family=family, solver=name)
            figures.converging(place, curve["evaluations"], {"median": curve["median"]}, field.tolerances[-1], style)
        place.set_title(f"{curve['physics']}: {family}", fontsize=8)
        place.set_yscale("log")
        place.set_xlim(0, 40)

    figure = figures.panels(shown, draw, "evaluations of f", "relative residual, median", columns=3, size=(3.4, 2.6))
    return report.Picture(
        figures.save(figure, folder / "residuals.png"),
        "Smallest relative residual so far by evaluations, medians over samples, to 1e-6.",
    )
