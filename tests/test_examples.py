"""Scripts of examples/ run, and the notebooks beside them are theirs, with what they print and draw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
each_example = pytest.mark.parametrize("name", NAMES)


def test_there_are_nine_and_each_is_a_script_and_a_notebook():
    assert NAMES == [
        "deq_transformer", "graph_network", "inside_torchdeq", "masked_encoder", "meta_training", "own_deq",
        "plotting_reductions", "reconstruction", "sudoku",
    ]  # fmt: skip
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == NAMES


@each_example
def test_the_notebook_has_the_source_of_the_script(name):
    script, notebook = (jupytext.read(EXAMPLES / f"{name}.{kind}") for kind in ("py", "ipynb"))
    sources = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (script, notebook)]
    assert sources[0] == sources[1], "run `make notebooks`"


@each_example
def test_the_notebook_is_whole(name):
    path = EXAMPLES / f"{name}.ipynb"
    cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 400_000


@each_example
def test_the_script_runs_on_a_small_budget(name, tmp_path):
    environment = os.environ | {"METABROYDEN_EXAMPLES": "quick", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning:__main__", str(EXAMPLES / f"{name}.py")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert run.stdout
