"""results/meta/report.md and its figures: learned root finders on trained families, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.legacy.meta_results import BEST, CALLING, HARD, MARKED, MetaResults, totals
from experiments.legacy.plots import new_axes, save_figure
from experiments.legacy.report import table
from metabroyden.meta.schedule import STOPS
from metabroyden.meta.step_guard import in_words
from metabroyden.storage import atomic_write

_SPLITS = " †"
_COLOURS = {
    "meta-broyden": ("#D55E00", "-"),
    "grouped": ("#E69F00", "--"),
    "coordinatewise": ("#CC79A7", "--"),
    "hyper-anderson": ("#0072B2", "-."),
    "neural-fixed-point": ("#8C564B", "--"),
    "gated-secant": ("#8C564B", "-."),
    "meta-learner": ("#7F7F7F", "--"),
    "started-broyden": ("#56B4E9", "-."),
    "started-anderson": ("#009E73", "-."),
    "tuned Picard": ("#000000", ":"),
    "tuned Anderson": ("#009E73", ":"),
    "tuned Broyden": ("#56B4E9", ":"),
    "Peaceman-Rachford": ("#0072B2", ":"),
    "forward-backward": ("#999999", ":"),
}


def write(folder: Path) -> Path:
    """Write report.md and a figure a family over all that is in a folder."""
    families = [MetaResults(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    families = [results for results in families if results.runs]
    for results in families:
        results.check()
    sections = [
        "# Learned root finders on trained families",
        "Frozen models of results/models, held-out problems, read once a run. A median is of all samples, those that fail "
        "within the budget being infinite: a dash. Each folder was made by the command in its config.json, `python -m "
        "experiments meta --family NAME --solver NAME --seed N`; `--solver classical` makes the rows of the classical ones, "
        "tuned on validation problems to 1e-2 and 1e-3.",
        "## All families",
        summary(families),
        *(section for results in families for section in _family(results, folder)),
        "## Setting",
        _settings(families),
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def _family(results: MetaResults, folder: Path) -> list[str]:
    figure = curves(results, folder / results.name / "residual.png")
    sections = [
        f"## {results.name}",
        "Evaluations: median of each seed (success rate over all seeds); ratio to the best classical solver.",
        evaluations_table(results),
        f"![{figure.stem}]({results.name}/{figure.name})",
    ]
    if results.learned:
        sections += ["Same equilibrium, safeguard, task:", equilibrium_table(results)]
        sections += ["Wall-clock:", clock_table(results)]
        sections += ["Past the trained horizon:", horizon_table(results)]
    return sections


def summary(families: Sequence[MetaResults]) -> str:
    """Geometric means over families of the evaluations, as shares of the best classical solver's and of HyperAnderson's;
    family by family; where fewer samples are solved."""
    names = list(dict.fromkeys(name for results in families for name in results.learned))
    body = []
    for name in names:
        for rival in (BEST, HARD, MARKED, CALLING, "meta-broyden", "hyper-anderson"):
            cells = []
            for tolerance in (1e-2, 1e-3):
                ratios = {
                    results.name: found
                    for results in families
                    if (found := results.ratio(name, rival, tolerance)) is not None
                }
                mean = np.exp(np.mean(np.log(list(ratios.values())))) if ratios else np.nan
                cells.append(
                    f"{mean:.2f}× ({len(ratios)}: {min(ratios.values()):.2f}–{max(ratios.values()):.2f})"
                    if ratios
                    else ""
                )
            if any(cells) and name != rival:
                body.append([name, rival, *cells])
    lower = [
        f"{name} on {results.name} to {tolerance:g} ({100 * ours:.1f}% against {100 * theirs:.1f}%)"
        for results in families
        if results.classical
        for name in results.learned
        for tolerance in results.tolerances
        if (ours := results.spent(name, tolerance)[1])
        < (theirs := max(results.spent(rival, tolerance)[1] for rival in results.classical)) - 1e-9
    ]
    words = (
        "Geometric mean over families of the median evaluations (mean of the seeds' medians, a failed one counting as the "
        "budget) over the rival's, how many families it is of (those where the rival's median is finite), the least and "
        f"the most. On families marked{_SPLITS} a meta-broyden is one on Peaceman–Rachford's map (`MetaSplitting`): it uses "
        "the resolvent of a monotone cell instead of f, as that classical solver does. A use counts as an evaluation, "
        "setting it up is in the time alone. Against what calls f alone such families do not count."
    )
    fewer = "Fewer samples solved than by the classical solver that solves most: " + (
        "; ".join(lower) if lower else "nowhere"
    )
    return "\n\n".join(
        [words, table(["", "against", "0.01", "0.001"], body), *_by_family(families, names), fewer + "."]
    )


def _by_family(families: Sequence[MetaResults], names: Sequence[str]) -> list[str]:
    """A table for each solver that there is on several families, of evaluations to 1e-2 and 1e-3 and of the clock."""
    tables = []
    for name in names:
        body = []
        for results in families:
            if name not in results.learned or not results.classical:
                continue
            cells = [results.name + (_SPLITS if results.splits(name) else "")]
            for tolerance in (1e-2, 1e-3):
                if tolerance not in results.tolerances:
                    cells += ["", "", ""]
                    continue
                best, ratio = results.best(tolerance), results.ratio(name, BEST, tolerance)
                cells += [_spent_words(results, name, tolerance), f"{_spent_words(results, best, tolerance)} {best}"]
                cells.append("" if ratio is None else f"**{ratio:.2f}×**")
            body.append([*cells, *(_clock_words(results, name, tolerance) for tolerance in (1e-2, 1e-3))])
        if len(body) > 1:
            head = ["", "to 0.01", "best classical", "ratio", "to 0.001", "best classical", "ratio"]
            tables.append(f"{name}, family by family; time as in the family's own table, mean over seeds:")
            tables.append(table([*head, "time to 0.01", "to 0.001"], body))
            tables += _beside_evaluations(families, name)
    return tables


def _beside_evaluations(families: Sequence[MetaResults], name: str) -> list[str]:
    """What a solver does on each family beside saving evaluations: time, scores, the safeguard, training."""
    body: list[list[str]] = []
    ratios: dict[float, list[float]] = {1e-2: [], 1e-3: []}
    for results in families:
        if name not in results.learned or not results.classical:
            continue
        star = results.star()
        early = [row["score"] for row in results.of("score", name, evaluations=5)]
        horizon = results.of("horizon", name, tolerance=1e-3)
        fallback, lost, broken = totals(horizon, "fallback", "lost", "broken")
        handed = np.mean([row["handed_over"] for row in results.of("solve", name, tolerance=results.tolerances[-1])])
        cpu = [described["summary"].get("cpu_seconds", np.nan) for described in results.described(name)]
        outside = [_outside_words(results, name, tolerance) for tolerance in ratios]
        for tolerance, found in ratios.items():
            ratio = results.clock_mean(name, tolerance)
            found += [ratio] if np.isfinite(ratio) else []
        body.append(
            [
                results.name,
                " / ".join(outside),
                f"{star['score']:.4f}",
                f"{np.mean(early):.4f}" if early else "",
                f"{lost} of {fallback} in {horizon[0]['steps']}" if horizon else "",
                str(broken) if horizon else "",
                f"{100 * handed:.0f}%",
                f"{max(cpu):.0f} s" if np.isfinite(cpu).all() else "",
            ]
        )
    head = ["", "outside f, an evaluation", "score at z*", "after 5", "lost at 4 × horizon", "given what was spent"]
    means = [
        f"{np.exp(np.mean(np.log(found))):.2f}× to {tolerance:g} ({len(found)})"
        for tolerance, found in ratios.items()
        if found
    ]
    words = (
        f"{name}, beside evaluations. Time over that of the fastest classical solver that solves as many, geometric mean "
        f"of the families (how many): {', '.join(means) or 'not taken'}. Outside f, to 1e-2 and 1e-3: the rest of a solve's "
        "time by evaluation, in times of f (a dash where parts of f are used instead). Scores: accuracy, of texts bits a "
        "token. Lost: of the samples that the solver's fallback (plain Broyden; Peaceman–Rachford for one on its map) "
        "solves to 1e-3 in as many evaluations as are named, those that this solver does not, all seeds together; "
        "and those that it does not given as many more as it had spent when the fallback took over. Handed over: on the "
        "way to the last tolerance. Training: CPU time, of the first process, of the seed that took longest."
    )
    return [words, table([*head, "handed over", "training"], body)]


def _spent_words(results: MetaResults, name: str, tolerance: float) -> str:
    medians, success = results.spent(name, tolerance)
    return " ".join("—" if np.isinf(value) else f"{value:g}" for value in medians) + f" ({100 * success:.0f}%)"


def _clock_words(results: MetaResults, name: str, tolerance: float) -> str:
    ratio = results.clock_mean(name, tolerance)
    return f"{ratio:.2f}×" if np.isfinite(ratio) else "—"


def _outside_words(results: MetaResults, name: str, tolerance: float) -> str:
    share = results.outside(name, tolerance)
    return f"{share:.2f} f" if np.isfinite(share) else "—"


def evaluations_table(results: MetaResults) -> str:
    """Evaluations to each tolerance."""
    body = []
    for name in [*results.learned, *results.classical]:
        cells = []
        for tolerance in results.tolerances:
            words = _spent_words(results, name, tolerance)
            if name in results.learned and results.classical:
                medians = results.spent(name, tolerance)[0]
                theirs = results.spent(results.best(tolerance), tolerance)[0][0]
                if np.isfinite([*medians, theirs]).all():
                    words += f" {np.mean(medians) / theirs:.2f}×"
            cells.append(words)
        body.append([name, *cells])
    return table(["", *(f"{tolerance:g}" for tolerance in results.tolerances)], body)


def equilibrium_table(results: MetaResults) -> str:
    """Distance to z* when stopped at each tolerance, task scores, hand-overs, leak."""
    star = results.star()
    body = []
    for name in [*results.learned, *results.classical]:
        distance, score = [], []
        for tolerance in results.tolerances:
            rows = results.of("solve", name, tolerance=tolerance)
            found = [[value for value in row["distance"] if value is not None] for row in rows]
            distance.append(f"{np.mean([np.median(values) for values in found if values]):.1e}")
            score.append(f"{np.mean([row['score'] for row in rows]):.4f}")
        handed = np.mean([row["handed_over"] for row in results.of("solve", name, tolerance=results.tolerances[-1])])
        early = [row["score"] for row in results.of("score", name, evaluations=5)]
        leaks = [row["mean"] for row in results.of("leak", name, tolerance=1e-2)]
        body.append(
            [
                name,
                " ".join(distance),
                " ".join(score),
                f"{np.mean(early):.4f}" if early else "",
                f"{100 * handed:.0f}%" if name in results.learned else "",
                f"{np.mean(leaks):.1e}" if leaks else "",
            ]
        )
    head = ["", "median distance to z* at each tolerance", "score there", "score after 5 evaluations", "handed over"]
    words = (
        f"Float64 equilibria found for {100 * star['known']:.1f}% of {star['samples']} problems; the score there is "
        f"{star['score']:.4f}. Handed over: samples that left the learned steps on the way to the last tolerance. Leak: by "
        "how many bits predictions change when later tokens do, solved to 1e-2."
    )
    return f"{words}\n\n" + table([*head, "leak"], body)


def clock_table(results: MetaResults) -> str:
    """Seconds of a batch, ratios to the fastest classical solver (paired by repeat), time outside f."""
    body = []
    for tolerance in (1e-2, 1e-3):
        for name in results.learned:
            clocks = results.clocks(name, tolerance)
            if not clocks:
                continue
            ours = [clock[name] for clock in clocks]
            seconds = np.mean([np.median(row["total"]) for row in ours])
            spent = f"{1000 * seconds:.0f} ms ({100 * np.mean([row['reached'] for row in ours]):.0f}%)"
            against = [
                f"{ratio:.2f}× {rival['solver']}'s ({100 * rival['reached']:.0f}%)" if np.isfinite(ratio) else "—"
                for ratio, rival in results.clock_ratios(name, tolerance)
            ]
            body.append([f"{tolerance:g}", name, spent, ", ".join(against), _outside_words(results, name, tolerance)])
    head = "to the fastest classical solver that solves as many, or as the one that solves most (within 2%), by seed"
    return table(["to", "", "batch (solved)", head, "outside f, an evaluation"], body)


def horizon_table(results: MetaResults) -> str:
    """What the safeguard does far past the trained horizon, all seeds together."""
    body = []
    for name in results.learned:
        for tolerance in (1e-3, 1e-4):
            rows = results.of("horizon", name, tolerance=tolerance)
            if not rows:
                continue
            samples, fallback, learned, lost, broken, triggered = totals(
                rows, "samples", "fallback", "learned", "lost", "broken", "triggered"
            )
            shares = [f"{100 * count / samples:.1f}%" for count in (learned, fallback, triggered)]
            body.append(
                [
                    f"{tolerance:g}",
                    name,
                    str(rows[0]["steps"]),
                    *shares,
                    f"{lost} of {samples}",
                    f"{broken} of {samples}",
                ]
            )
    head = ["to", "", "evaluations", "solved", "solved by the fallback", "handed over"]
    words = (
        "As many evaluations as four times the trained horizon, for the learned solver and for its fallback: plain Broyden; "
        "Peaceman–Rachford for a solver on its map. Lost: solved by the fallback, not by the learned solver; in the last "
        "column that one has as many more as it had spent when the fallback took over, where its safeguard promises none."
    )
    return f"{words}\n\n" + table([*head, "lost", "lost, given those"], body)


def curves(results: MetaResults, path: Path) -> Path:
    """Median residual against evaluations, with the band of the quartiles for learned solvers."""
    figure, axes = new_axes()
    for name in [*results.learned, *results.classical]:
        if name not in _COLOURS:
            continue
        colour, line = _COLOURS[name]
        for number, row in enumerate(results.of("curve", name)):
            low, middle, high = np.array(row["residual"]).T
            k = np.arange(row["first"], row["first"] + len(middle))
            axes.plot(k, middle, color=colour, linestyle=line, label=name if number == 0 else None)
            if name in results.learned and number == 0:
                axes.fill_between(k, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="evaluations of f", ylabel="relative residual, median", yscale="log", title=results.name)
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def _time(described: dict[str, Any]) -> str:
    """How long training took, where, and in how many processes; the CPU time is the first one's."""
    summary = described["summary"]
    cpu = f", {summary['cpu_seconds']:g} CPU s" if "cpu_seconds" in summary else ""
    many = f" in {summary['processes']} processes" if summary.get("processes", 1) > 1 else ""
    return f"{summary['seconds']:g} s{cpu} on {described.get('device', 'cpu')}{many}"


def _incidents(summary: dict[str, Any]) -> str:
    """What went wrong, and why training stopped where that was not at its last step."""
    told = summary.get("incidents")
    words = f"{summary['skipped_steps']} steps skipped" if told is None else in_words(told) or "no step skipped"
    stopped = summary.get("stopped", "steps")
    return words if stopped == "steps" else f"{words}; stopped at step {summary['steps']}: {STOPS[stopped]}"


def _settings(families: Sequence[MetaResults]) -> str:
    lines = []
    for results in families:
        for name in results.learned:
            for described in results.described(name):
                summary = described["summary"]
                recipe = described["recipe"]
                safeguard = recipe.get("options", {}).get("safeguard", {})
                patience = (
                    f"; handed over where {safeguard['patience']} evaluations leave more than {safeguard['progress']:g} of "
                    "the residual"
                    if safeguard
                    else ""
                )
                lines.append(
                    f"- {results.name}, {name}, seed {described['config']['seed']}: {described['parameters']:,} parameters "
                    f"(the model has {described['model_parameters']:,}), {recipe['steps']} steps of {recipe['segments']} × "
                    f"{recipe['unroll']} on batches of {recipe['batch']}, {_time(described)}, "
                    f"{_incidents(summary)}{patience}; commit {described['provenance']['commit']}"
                )
    return "\n".join(lines)
