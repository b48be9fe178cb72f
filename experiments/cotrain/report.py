"""The report over all families: report.md and its figures in the folder of the results, from rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.runner import Row, read_rows
from experiments.cotrain.variants import CO_TRAINED, CONTINUED, ORIGINAL, PENALISED
from metabroyden.comparison import figures
from metabroyden.comparison.figures import FLAGSHIP, label
from metabroyden.comparison.statistics import geometric, standard_error
from metabroyden.comparison.tables import Table, chosen, grouped, listed

TIMED = (1e-2, 1e-3)
"""Tolerances of the summary."""
SOLVERS = {"classical": "best classical", "started": "best + start", "learned": "MetaBroyden"}
"""Kinds of solvers in words."""
WORDS = """\
Trained models of the zoo, fine-tuned as `cotrain` does (task, learned start and residuals of the learned solver's first
steps together; of ten looks at validation the one of fewest evaluations whose score is lower by at most a standard error
of the difference, of texts by at most 0.005 bits), then fitted; beside them the same models trained on for as many steps,
and with a Jacobian penalty. Classical solvers (Picard,
Anderson, Broyden) are tuned anew on every resulting model; those called "+ start" begin at the learned start. The best
classical solver is, of those that solve most give or take a standard error, the one with the smallest median; the
fastest is, of the same, the one of the least time. A sample that is not solved counts as the budget of 60. Scores are
taken at equilibria, on test samples: accuracy, or minus the bits a token."""
SUMMARY = """\
Co-trained with MetaBroyden over the *original* model's best (evaluations) and fastest (time) classical solver, and over the
best classical solver on the *co-trained* model from the learned start: means over seeds, in brackets the lowest and
highest. The score is the difference to the original's on test samples, with the standard error of the first seed's. Below
them geometric means over families. Where a fine-tuning is refused the original is returned: a ratio of 1."""
VARIANTS = """\
The ways side by side, to 1e-2 / 1e-3, means over seeds: median, mean, 90th percentile of evaluations and share solved of
the best classical solver (of co-trained models: from zero, from the start, and MetaBroyden); difference of the score to
the original's and, in brackets, its standard error over samples. Of the Jacobian penalties all weights are shown."""
STARTS = """\
One equilibrium: the same problems solved to 1e-4 from zero, and from other starts; how many end more than one hundredth
away, of those where both were solved, over seeds."""
DEPTHS = """\
Where the fixed point is what the model computes, the score by evaluations of f is flat from the stopping point on. In the
figure the original's best classical solver and MetaBroyden on the co-trained model, first seed."""


def write(folder: Path) -> Path:
    """report.md over the families in a folder."""
    runs = report.runs_below(folder, "*/rows.jsonl")
    rows = [row for _, found in runs for row in found]
    made = [f"- `{described['command']}`, commit {described['provenance']['commit']}" for described, _ in runs]
    families = list(dict.fromkeys(row["family"] for row in rows))
    by_family = {name: [row for row in rows if row["family"] == name] for name in families}
    sections: list[report.Section] = [WORDS, "\n".join(made), SUMMARY]
    sections += [_summary(by_family, tolerance) for tolerance in TIMED]
    sections += [_costs(by_family), _evaluations_figure(folder, by_family), VARIANTS]
    sections += [_variants(name, found) for name, found in by_family.items()]
    sections += [_front_figure(folder, by_family), DEPTHS, _depth_table(by_family), _depth_figure(folder, by_family)]
    sections += [STARTS, _starts(by_family)]
    return report.write(folder, "Co-training", sections)


def best(rows: Sequence[Row], tolerance: float, kind: str = "classical") -> Row:
    """The best solver of a kind on one model, see `WORDS`."""
    found = able(rows, tolerance, kind)
    return min(found, key=lambda row: (row["median"], row["mean"]))


def able(rows: Sequence[Row], tolerance: float, kind: str) -> list[Row]:
    """Those of a kind that solve most, give or take a standard error."""
    found = [row for row in chosen(rows, "solver", tolerance=tolerance) if row["kind"] == kind]
    top = max(found, key=lambda row: row["solved"])
    return [row for row in found if row["solved"] >= top["solved"] - standard_error(top["solved"], top["samples"])]


def _refused(rows: Sequence[Row]) -> bool:
    """Whether the fine-tuning of one seed was refused."""
    return chosen(rows, "model")[0]["refused"]


def adapted(rows: Sequence[Row]) -> list[Row]:
    """Rows of co-trained models whose weight was adapted."""
    return [row for row in rows if row["way"] == CO_TRAINED and row["weight"] is None]


def compared(rows: Sequence[Row], tolerance: float) -> list[Row]:
    """A row a seed: the co-trained model with its MetaBroyden over the original, and over the best from the same start."""
    theirs = [row for row in rows if row["way"] == ORIGINAL]
    rival = best(theirs, tolerance)
    found = []
    for of in grouped(adapted(rows), "seed"):
        (model,) = chosen(of, "model")
        ours = rival if model["refused"] else best(of, tolerance, "learned")
        started = min((best(of, tolerance, kind) for kind in ("started", "classical")), key=lambda row: row["median"])
        started = rival if model["refused"] else started
        found.append({
            "seed": of[0]["seed"], "ours": ours, "rival": rival, "evaluations": ours["median"] / rival["median"],
            "p90": ours["p90"] / rival["p90"], "time": 1.0 if model["refused"] else _time(of, theirs, tolerance),
            "started": ours["median"] / started["median"], "difference": model["difference"], "model": model,
        })  # fmt: skip
    return found


def overall(families: Iterable[Sequence[Row]], key: str) -> float:
    """The geometric mean over families of that over seeds, of a ratio of `compared`."""
    return geometric([geometric([row[key] for row in of]) for of in families])


def _time(of: Sequence[Row], theirs: Sequence[Row], tolerance: float) -> float:
    """Median of paired ratios: MetaBroyden on the co-trained model over the original's fastest classical solver."""
    names = {row["solver"] for row in able(theirs, tolerance, "classical")}
    times = chosen(of, "time", tolerance=tolerance)
    rivals = [row["seconds"] for row in times if row["model"] == ORIGINAL and row["solver"] in names]
    (ours,) = (row["seconds"] for row in times if row["model"] == CO_TRAINED and row["solver"] == FLAGSHIP)
    return float(np.median(np.divide(ours, min(rivals, key=np.median))))


def _summary(by_family: dict[str, list[Row]], tolerance: float) -> Table:
    found = {name: compared(rows, tolerance) for name, rows in by_family.items()}
    keys = ("evaluations", "p90", "time", "started")
    body = []
    for name, of in found.items():
        rival, model = of[0]["rival"], of[0]["model"]
        ours = [f"{np.mean([row['ours'][key] for row in of]):.1f}" for key in ("median", "p90")]
        solved = np.mean([row["ours"]["solved"] for row in of])
        score = np.mean([row["difference"] for row in of])
        body.append([
            name, f"{score:+.4f} ({model['difference_error']:.4f})",
            f"{rival['median']:g} / {rival['p90']:g} ({rival['solved']:.0%}) {label(rival['solver'])}",
            f"{' / '.join(ours)} ({solved:.1%})", *(_range([row[key] for row in of]) for key in keys),
        ])  # fmt: skip
    kept = [of for of in found.values() if not all(row["model"]["refused"] for row in of)]
    wholes = [("**all**", list(found.values()))]
    wholes += [("**where returned**", kept)] if len(kept) < len(found) else []
    for words, some in wholes:
        whole = [f"**{overall(some, key):.2f}**" for key in keys]
        body.append([words, "", "", "", *whole])
    head = ["family", "score (its error)", "original's best: median / 90%", "co-trained", "evaluations", "90%", "time",
            "over best from start"]  # fmt: skip
    return Table(f"To {tolerance:g}", head, body)


def _range(values: Sequence[float]) -> str:
    return f"{geometric(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _costs(by_family: dict[str, list[Row]]) -> Table:
    """Seconds of fine-tuning, of the fit, and of the original's training."""

    def seconds(rows: list[Row], key: str) -> float:
        return float(np.mean([row[key] for row in chosen(adapted(rows), "model")]))

    def refused(rows: list[Row]) -> str:
        models = chosen(adapted(rows), "model")
        return f"{sum(row['refused'] for row in models)} of {len(models)}"

    items = [(name, rows, _original_seconds(name)) for name, rows in by_family.items()]
    return listed("What it costs", items, [
        ("family", lambda item: item[0]),
        ("original training", lambda item: f"{item[2]:.0f} s" if item[2] else ""),
        ("fine-tuning", lambda item: f"{seconds(item[1], 'seconds'):.0f} s"),
        ("share", lambda item: f"{seconds(item[1], 'seconds') / item[2]:.1%}" if item[2] else ""),
        ("fit of the solver", lambda item: f"{seconds(item[1], 'fit_seconds'):.0f} s"),
        ("steps", lambda item: str(chosen(adapted(item[1]), "model")[0]["steps"])),
        ("refused", lambda item: refused(item[1])),
    ])  # fmt: skip


def _original_seconds(family: str) -> float:
    """Seconds of the training that results/models tells of; 0 where it does not."""
    path = Path("results/models", family, "rows.jsonl.gz")
    if not path.exists():
        return 0.0
    return max(row["seconds"] for row in chosen(read_rows(path), "epoch", way="DEQ"))


def _variants(name: str, rows: list[Row]) -> Table:
    """A line for each way, weight and solver shown."""
    order = {ORIGINAL: 0, CONTINUED: 1, PENALISED: 2, CO_TRAINED: 3}
    body = []
    for of in sorted(grouped(rows, "way", "weight"), key=lambda of: (order[of[0]["way"]], of[0]["weight"] or 0)):
        way, weight = of[0]["way"], of[0]["weight"]
        shown = way if weight is None else f"{way} {weight:g}{', held fast' if way == CO_TRAINED else ''}"
        models = chosen(of, "model")
        shown += " (refused)" if any(row["refused"] for row in models) else ""
        score = f"{np.mean([row['difference'] for row in models]):+.4f} ({models[0]['difference_error']:.4f})"
        kinds = ("classical",) if way != CO_TRAINED else ("classical", "started", "learned")
        for kind in kinds:
            cells = [_cell([best(seed, tolerance, kind) for seed in grouped(of, "seed")]) for tolerance in TIMED]
            body.append([shown, score, SOLVERS[kind], *cells])
            shown = score = ""
    return Table(name, ["way", "score", "solver", *(f"to {tolerance:g}" for tolerance in TIMED)], body)


def _cell(rows: Sequence[Row]) -> str:
    median, mean, p90, solved = (np.mean([row[key] for row in rows]) for key in ("median", "mean", "p90", "solved"))
    return f"{median:.1f} / {mean:.1f} / {p90:.1f} ({solved:.1%})"


def _evaluations_figure(folder: Path, by_family: dict[str, list[Row]]) -> report.Picture:
    """Bars: evaluations before and after."""

    def values(rows: list[Row], tolerance: float) -> list[float]:
        before = best([row for row in rows if row["way"] == ORIGINAL], tolerance)
        seeds = grouped(adapted(rows), "seed")
        after = [
            [before["median"] if _refused(of) else best(of, tolerance, kind)["median"] for of in seeds]
            for kind in ("classical", "started", "learned")
        ]
        return [before["median"], *map(np.mean, after)]

    figure, places = figures.grid(len(TIMED), len(TIMED), (5.2, 3.4))
    names = (
        "original, best classical",
        "co-trained, best classical",
        "the same, learned start",
        "co-trained, MetaBroyden",
    )
    inks = ("#000000", "#56B4E9", "#0072B2", figures.colour(FLAGSHIP))
    for place, tolerance in zip(places, TIMED, strict=True):
        found = np.array([values(rows, tolerance) for rows in by_family.values()])
        for number, (name, ink) in enumerate(zip(names, inks, strict=True)):
            place.bar(np.arange(len(found)) + 0.2 * (number - 1.5), found[:, number], 0.19, label=name, color=ink)
        place.set_xticks(range(len(by_family)), [name.replace("-", "\n", 1) for name in by_family], fontsize=7)
        place.set(title=f"to {tolerance:g}", ylabel="median evaluations of f")
    figures.legend(figure, places)
    caption = "Median evaluations before and after, at the score of the summary; means over seeds."
    return report.Picture(figures.save(figure, folder / "evaluations.png"), caption)


def _front_figure(folder: Path, by_family: dict[str, list[Row]]) -> report.Picture:
    """Score against evaluations: every way and weight, to 1e-3."""
    marks = {
        ORIGINAL: ("#000000", "o"),
        CONTINUED: ("#999999", "s"),
        PENALISED: ("#009E73", "^"),
        CO_TRAINED: ("#D55E00", "D"),
    }

    def draw(place: Any, name: str) -> None:
        rows = by_family[name]
        for way, (ink, shape) in marks.items():
            points = []
            for of in grouped([row for row in rows if row["way"] == way], "weight", "seed"):
                kind = "learned" if way == CO_TRAINED and not _refused(of) else "classical"
                (model,) = chosen(of, "model")
                points.append((best(of, 1e-3, kind)["mean"], model["score"], of[0]["weight"]))
            held = [point for point in points if point[2] is not None and way == CO_TRAINED]
            free = [point for point in points if point not in held]
            if free:
                place.plot(*zip(*[point[:2] for point in free], strict=True), shape, color=ink, label=way, markersize=4)
            if held:
                x, y, weights = zip(*sorted(held, key=lambda point: point[2]), strict=True)
                place.plot(x, y, "x--", color=ink, markersize=5, linewidth=0.8, label="co-trained, weight held fast")
                for at in zip(x, y, weights, strict=True):
                    place.annotate(f"{at[2]:g}", at[:2], fontsize=6, xytext=(2, 3), textcoords="offset points")
        (base,) = {(row["original"], row["original_error"]) for row in chosen(rows, "model", way=ORIGINAL)}
        place.axhspan(base[0] - base[1], base[0] + base[1], color="black", alpha=0.08, linewidth=0)
        place.set_xlim(0, None)

    figure = figures.panels(list(by_family), draw, "mean evaluations to 1e-3", "score", columns=3, size=(3.8, 2.9))
    caption = (
        "Score and mean evaluations: the best classical solver of models trained without a solver, MetaBroyden of "
        "co-trained ones. The band is the original's score, give or take a standard error; up and to the left is better."
    )
    return report.Picture(figures.save(figure, folder / "front.png"), caption)


def _depth_rows(rows: list[Row]) -> dict[str, list[Row]]:
    """By way, those of the first seed."""
    return {way: chosen(rows, "depth", way=way, seed=0) for way in (ORIGINAL, CO_TRAINED)}


def _depth_table(by_family: dict[str, list[Row]]) -> Table:
    """Score less that after 60 evaluations, of the co-trained model, mean over seeds."""

    def cell(rows: list[Row], depth: int) -> str:
        texts = chosen(rows, "model")[0]["score"] < 0
        found = [row["over_last"] for row in chosen(adapted(rows), "depth", evaluations=depth)]
        return f"{(-1 if texts else 1) * np.mean(found):+.4f}"

    depths = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 60)
    body = [[name, *(cell(rows, depth) for depth in depths)] for name, rows in by_family.items()]
    return Table("MetaBroyden on the co-trained model: score after so many evaluations, less that after 60",
                 ["family", *map(str, depths)], body)  # fmt: skip


def _depth_figure(folder: Path, by_family: dict[str, list[Row]]) -> report.Picture:
    def draw(place: Any, name: str) -> None:
        for number, (which, rows) in enumerate(_depth_rows(by_family[name]).items()):
            ink = ("#000000", figures.colour(FLAGSHIP))[number]
            sign = -1 if chosen(by_family[name], "model")[0]["score"] < 0 else 1
            x = [row["evaluations"] for row in rows]
            place.plot(x, [sign * row["score"] for row in rows], "o-", color=ink, markersize=2.5, label=which)
        last = [sign * rows[-1]["score"] for rows in _depth_rows(by_family[name]).values()]
        spread = max(0.01, 0.05 * abs(last[0]))
        place.set(xscale="log", ylim=(min(last) - spread, max(last) + spread / 4))

    figure = figures.panels(list(by_family), draw, "evaluations of f", "score", columns=3, size=(3.8, 2.9))
    caption = (
        "Score against evaluations: flat where the equilibrium counts. The learned start is not counted (RESEARCH, 61)."
    )
    return report.Picture(figures.save(figure, folder / "depth.png"), caption)


def _starts(by_family: dict[str, list[Row]]) -> Table:
    def cell(of: list[Row], key: Callable[[Row], float]) -> float:
        return sum(map(key, of))

    items = [of for rows in by_family.values() for of in grouped(chosen(rows, "start"), "start")]
    return listed("", items, [
        ("family", "{family}"), ("start", "{start}"),
        ("elsewhere", lambda of: f"{cell(of, lambda row: row['elsewhere']):g} of {cell(of, lambda row: row['both']):g}"),
        ("solved from there", lambda of: f"{np.mean([row['solved'] for row in of]):.1%}"),
        ("farthest", lambda of: f"{max(row['farthest'] for row in of):.2g}"),
    ])  # fmt: skip
