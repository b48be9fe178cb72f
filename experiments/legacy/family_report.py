"""report.md and figures of one family of problems, over one seed or several, from rows and descriptions alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.runner import read_rows
from experiments.legacy import report
from metabroyden.storage import atomic_write


def read_folders(folders: list[Path]) -> list[dict[str, Any]]:
    """The rows of several results folders."""
    return [row for folder in folders for row in read_rows(folder / "rows.jsonl")]


@dataclass(frozen=True)
class FamilyReport:
    """What a family's report is about.

    Attributes:
        title, about: its heading, and half a sentence on the model and data.
        learned: names of the learned solvers, the main one first.
        classical: names among which the best classical solver is sought (those without rows are left out).
        shown: solvers in the figures.
        reference: the solver that ratios refer to.
        short: the budget of evaluations at which accuracy is held against the converged one.
    """

    title: str
    about: str
    learned: tuple[str, ...]
    classical: tuple[str, ...]
    shown: tuple[str, ...]
    reference: str = "Broyden"
    short: int = 8

    def claims(self, results: report.Results, learned: str | None = None) -> str:
        """The table that holds a learned solver (default: the main one) against the classical ones."""
        classical = [name for name in self.classical if name in results.solvers]
        return report.claims_table(results, learned or self.learned[0], classical, self.reference)

    def write(self, folder: Path, seeds: list[Path]) -> Path:
        """Write report.md and the figures into a folder, from the rows and config.json of each seed's folder."""
        results = report.Results(read_folders(seeds))
        figures = report.write_figures(
            results, folder, main=self.shown, learned=self.learned[0], reference=self.reference
        )
        described = [json.loads((seed / "config.json").read_text()) for seed in seeds]
        shown = {path.stem: f"![{path.stem}]({path.name})" for path in figures}
        sections = [
            *self._head(results, described),
            *self._evaluations(results, shown),
            *self._clock(results, shown),
            *self._equilibrium(results),
            *self._accuracy(results, shown),
            "## Setting",
            "\n".join(_setting(item) for item in described),
        ]
        return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")

    def _head(self, results: report.Results, described: list[dict[str, Any]]) -> list[str]:
        commands = "\n".join(item["command"] for item in described)
        return [
            f"# {self.title}",
            f"{self.about}; {len(results.seeds)} seed(s) of DEQ and meta-training; held-out test samples, read once a "
            "run. A sample that does not get there within the budget counts as the budget. Made by",
            f"```\n{commands}\n```",
        ]

    def _evaluations(self, results: report.Results, shown: dict[str, str]) -> list[str]:
        sections = [
            "## Evaluations to a tolerance\n\nMedian / 90th percentile / success rate.",
            report.evaluations_table(results),
            shown["residual_by_evaluations"],
            shown["evaluations_to_tolerance"],
            "## Learned against classical\n\nMedian evaluations (success rate).",
        ]
        return [*sections, *(self.claims(results, name) for name in self.learned), shown["reduction_by_image"]]

    def _clock(self, results: report.Results, shown: dict[str, str]) -> list[str]:
        batch = results.of("clock")[0]["batch"]
        sections = [
            f"## Wall-clock\n\nThe whole batch of {batch}, interleaved repeats in one process, medians; in brackets the "
            f"ratio to {self.reference}, below one is faster. torchdeq stops a batch when its worst sample is done.",
        ]
        for rtol in sorted({row["rtol"] for row in results.of("clock")}, reverse=True):
            sections += [f"To {rtol:g}:", report.clock_table(results, rtol)]
        return [
            *sections,
            shown["residual_by_time"],
            "What each learned part costs on the whole batch (start: initializer, once a solve; init: gates, once a "
            "solve; step: once an evaluation). An f-equivalent is the time of one evaluation of f on the same batch.",
            report.parts_table(results),
        ]

    def _equilibrium(self, results: report.Results) -> list[str]:
        return [
            "## Same equilibrium\n\nRelative distance to the float64 equilibrium of what each solver returned when asked "
            "for the tightest tolerance; whether the class is the one predicted there; accuracy; samples the safeguard "
            "handed to Broyden.",
            report.equilibrium_table(results),
        ]

    def _accuracy(self, results: report.Results, shown: dict[str, str]) -> list[str]:
        budgets = sorted({row["nfe"] for row in results.of("accuracy")})
        return [
            "## Accuracy against evaluations",
            report.accuracy_table(results, budgets),
            shown["accuracy_by_evaluations"],
            f"With {self.short} evaluations allowed, against the converged one:",
            report.short_budget_table(results, self.learned, self.reference, self.short),
        ]


def _setting(item: dict[str, Any]) -> str:
    """A seed's line: tuned baselines, equilibria found, training time, commit."""
    seconds = ", ".join(f"{value:g} s ({name})" for name, value in item["meta_training_seconds"].items())
    commit, _, mark = item["provenance"]["commit"].partition(" ")
    return (
        f"- seed {item['config']['seed']}: tuned {', '.join(item['tuned'].values())}; float64 equilibrium found for "
        f"{100 * item['equilibria_known']:.1f}% of {item['test_samples']} test samples; meta-training took {seconds}; "
        f"commit {commit[:12]} {mark}, {item['provenance']['cores']} cores"
    )
