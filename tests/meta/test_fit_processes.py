"""`fit_solver` in two processes. This file is also what torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import metabroyden as mb
from metabroyden.meta import prospect
from tests.helpers import ConvTanh, contexts, same_parameters


def easy(z, x):
    return x - 0.2 * z


def fits(folder: Path, rank: int) -> dict:
    """What each process does, as a user's script would: it joins no process group and reads its own shuffle of the data."""
    torch.manual_seed(rank)
    loader = DataLoader(TensorDataset(contexts(60)), batch_size=16, shuffle=True)
    told: list[int] = []
    kept = {"checkpoint": folder / "training.safetensors", "log_dir": folder / "log"}
    solver, report = mb.fit_solver(
        ConvTanh(), loader, steps=4, fallback=False, batch_size=6, return_report=True, **kept,
        callback=lambda step: (told.append(step.step), step.step == 3)[1],
    )  # fmt: skip
    mb.save_solver(solver, folder / f"{rank}.safetensors")
    found = {
        "told": told,
        "summary": solver.summary,
        "report": report.summary(),
    }
    usual = prospect.timed
    if rank:
        prospect.timed = lambda *_, **__: 1 / 0  # others do not measure
    classical = mb.fit_solver(easy, torch.randn(40, 4), progress=False)
    prospect.timed = usual
    cell = ConvTanh()
    cell.conv.weight.data.add_(rank)
    errors = []
    for f, options in ((cell, {}), (ConvTanh(), {"batch_size": 5}), (lambda z, x: z[:, :1], {})):
        try:
            mb.fit_solver(f, contexts(40), steps=1, progress=False, **options)
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
    return {**found, "classical": repr(classical), "errors": errors}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, list[dict], str, str]:
    """(folder, what each process found, what they printed, what they warned of)."""
    folder = tmp_path_factory.mktemp("together")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return folder, found, done.stdout, done.stderr


def test_all_processes_end_with_the_same_solver_whatever_they_read(together):
    folder, (one, other), _, _ = together
    first, second = (mb.load_solver(folder / f"{rank}.safetensors") for rank in range(2))
    assert same_parameters(first, second)
    assert one["summary"]["processes"] == 2
    assert one["report"] == other["report"]
    assert one["summary"]["held_out"] == other["summary"]["held_out"]


def test_the_first_process_decides_prints_writes_and_is_told(together):
    folder, (one, other), printed, warned = together
    assert (one["told"], other["told"]) == ([1, 2, 3], [])
    assert one["summary"]["stopped"] == other["summary"]["stopped"] == "callback"
    assert printed.count("12 problems to 0.001, at most 60 evaluations") == 1
    assert len(list((folder / "log").iterdir())) == 1
    assert (folder / "training.safetensors").exists()
    assert one["classical"] == other["classical"]
    assert one["classical"].startswith(("Picard", "Anderson", "Broyden"))
    assert warned.count("there is nothing to gain") == 1
    assert warned.count("UserWarning: ") == 1
    assert "FutureWarning" not in warned


def test_what_is_wrong_is_said_in_every_process(together):
    _, (one, other), _, _ = together
    assert one["errors"] == other["errors"]
    weights, shares, shape = one["errors"]
    assert weights.startswith("processes differ from the first in the weights of f")
    assert shares == "a batch of 5 cannot be shared out equally by 2 processes"
    assert "f must return what z is shaped like" in shape


def main(folder: Path) -> None:
    """What torchrun starts."""
    rank = int(os.environ["RANK"])
    found = fits(folder, rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
