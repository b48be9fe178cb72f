"""Solvers and models that come with the package, from results/: `python -m experiments.bench.shipped` writes their folders.

The solver of each digits family is that of meta-seed 0, whatever the others' figures.
"""

from __future__ import annotations

from pathlib import Path

from metabroyden.checkpoint import SHIPPED, load_solver, read
from metabroyden.zoo.models import FAMILIES, load_model
from metabroyden.zoo.models.pretrained import PLACE

RESULTS = Path(__file__).resolve().parents[2] / "results"
SOLVERS = {
    "universal": RESULTS / "generalise" / "universal.safetensors",
    **{
        name: RESULTS / "meta" / name / "meta-broyden-seed0" / "solver.safetensors"
        for name in FAMILIES
        if name.endswith("-digits")
    },
}
"""Files of the solvers, by the names that they are shipped under."""
MODELS = {name: RESULTS / "models" / name / "model.safetensors" for name in SOLVERS if name in FAMILIES}
"""Files of the models that they belong to."""


def main(folder: Path = SHIPPED) -> None:
    """Write a folder for each solver, the folder of its model in it."""
    for name, path in SOLVERS.items():
        load_solver(path).save_pretrained(folder / name)
    for name, path in MODELS.items():
        load_model(path).save_pretrained(folder / name / PLACE, read(path)[1]["summary"])


if __name__ == "__main__":
    main()
