"""results/specialise/report.md and its figure, from rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from experiments.bench.runner import read_rows, row_files
from experiments.legacy.plots import new_axes, save_figure
from experiments.legacy.transfer import Transfer
from metabroyden.storage import atomic_write

_ORDER = {"before": "#999999", "after": "#D55E00"}


def write(folder: Path) -> Path:
    """Write report.md and specialise.png over all families and seeds in a folder."""
    sections = [
        "# Specialisation",
        "`python -m experiments specialise --family NAME`: a few outer steps on a DEQ's training contexts. Median "
        "evaluations to 1e-2 on its test contexts (share solved), ratio to Broyden's with full memory; before: the solver "
        "that was adapted.",
    ]
    rows = []
    for path in row_files(folder, "*/*/rows.jsonl"):
        described = json.loads((path.parent / "config.json").read_text())
        config = described["config"]
        name = f"{config['family']}, {config['steps']} steps from {config['start']}, seed {config['seed']}"
        found = read_rows(path)
        rows += [{**row, "tested": name} for row in found]
        commit = described["provenance"]["commit"]
        sections.append(f"- {name}: `{described['command']}`, {described['parameters']:,} parameters, commit {commit}")
    results = Transfer(rows, "specialised")
    figure = _bars(results, folder / "specialise.png")
    sections += [results.table(), f"![{figure.stem}]({figure.name})"]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def _bars(results: Transfer, path: Path) -> Path:
    figure, axes = new_axes(max(6.4, 1.2 * len(results.problems)))
    for number, (name, colour) in enumerate(_ORDER.items()):
        ratios = [results.ratio(name, problem) for problem in results.problems]
        axes.bar(np.arange(len(ratios)) + 0.4 * number - 0.2, ratios, 0.38, color=colour, label=name)
    axes.axhline(1, color="0.4", linewidth=1)
    axes.set_xticks(
        range(len(results.problems)), [name.split(",")[0] for name in results.problems], rotation=30, ha="right"
    )
    axes.set(ylabel="evaluations to 1e-2 over Broyden's")
    axes.legend(frameon=False)
    return save_figure(figure, path)
