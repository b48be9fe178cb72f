"""Small problems with known answers and small data sets, shared by the tests, and what a test may be skipped for.

No test is skipped but those marked `cuda`, where there is no GPU: whatever else a test needs, `make` installs or a fixture
makes. A skip of any other test is a failure (`refuse_skip`). Tests marked `learn2learn` are not selected where there is no
C compiler, since setup_env.py leaves that package out there; the run's closing lines say so.
"""

from __future__ import annotations

import gzip
import os
import random
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metabroyden.solvers.tuning import tune


@dataclass(frozen=True)
class Known:
    """f(z, x) with its start, contexts, and (where there is a closed form) its fixed points."""

    f: Callable[[Tensor, Tensor], Tensor]
    z0: Tensor
    x: Tensor
    star: Tensor | None = None


def linear(
    batch: int = 6, n: int = 12, radius: float = 0.8, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Known:
    """f(z, x) = Wz + x with ‖W‖₂ = radius: z* = (I − W)⁻¹x."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, n, generator=g, dtype=dtype)
    w = radius * w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(batch, n, generator=g, dtype=dtype)
    star = torch.linalg.lstsq(torch.eye(n, dtype=dtype) - w, x.T).solution.T
    return Known(lambda z, x: (z.unsqueeze(1) * w).sum(2) + x, torch.zeros_like(x), x, star)


def tanh(batch: int = 6, n: int = 12, gain: float = 0.95, dtype: torch.dtype = torch.float64, seed: int = 0) -> Known:
    """f(z, x) = tanh(Wz + x), ‖W‖₂ = gain. Row-wise deterministic: no BLAS call sees the batch size."""
    problem = linear(batch, n, gain, dtype, seed)
    return Known(lambda z, x: torch.tanh(problem.f(z, x)), problem.z0, problem.x)


@pytest.fixture
def contraction() -> Known:
    return linear()


@pytest.fixture
def nonlinear() -> Known:
    return tanh()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)  # learn2learn draws its tasks with it


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids of classical solvers thinned out, for commands that are to show what they write and not who wins."""
    from experiments import drop_in, gradients
    from metabroyden.solvers import classical

    def thinned(candidates: Any, *arguments: Any, **options: Any) -> Any:
        return tune(list(candidates)[::8], *arguments, **options)

    for module in (classical, drop_in, gradients):
        monkeypatch.setattr(module, "tune", thinned)


@pytest.fixture
def quick_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit_solver` measures six classical solvers in place of 32, in three rounds, for what does not turn on who is best."""
    from metabroyden.comparison import measure
    from metabroyden.solvers import classical

    every = classical.grids
    monkeypatch.setattr(classical, "grids", lambda budget: {name: grid[4::4] for name, grid in every(budget).items()})
    monkeypatch.setattr(measure, "SECONDS", 0.0)


def idx(array: np.ndarray) -> bytes:
    """Bytes of a file in MNIST's format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_images(folder: Path, name: str, images: np.ndarray, labels: np.ndarray, zipped: bool = True) -> None:
    """Two IDX files, with `name` "train" or "t10k", gzipped or plain."""
    for file, array in ((f"{name}-images-idx3-ubyte", images), (f"{name}-labels-idx1-ubyte", labels)):
        content = idx(array)
        (folder / (f"{file}.gz" if zipped else file)).write_bytes(
            gzip.compress(content, compresslevel=1, mtime=0) if zipped else content
        )


def clothes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stand-ins for Fashion-MNIST: an outline a class on black, each image shaded differently, 28×28 bytes; the classes."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, count, dtype=np.uint8)
    rows, columns = np.mgrid[-1:1:28j, -1:1:28j].astype(np.float32)
    narrow, high, flare = (
        np.array(a)[:, None, None] for a in ([4, 3, 2, 4, 3] * 2, [1] * 5 + [2] * 5, [0, 1, -1] * 3 + [0.5])
    )
    soft = np.clip(4 * (1 - narrow * columns**2 * (1 - flare * rows) - high * rows**2), 0, 1).astype(np.float32)
    level, across, along = draw.uniform((50, -30, -30), (100, 30, 30), (count, 3)).astype(np.float32).T[..., None, None]
    return (soft[labels] * (level + across * columns + along * rows)).clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="session", autouse=True)
def _small_data(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[None]:
    """Every Fashion-MNIST of the tests and the processes they start is made here, unless `--real-data` is given."""
    if pytestconfig.getoption("real_data"):
        yield
        return
    root = tmp_path_factory.mktemp("data")
    folder = root / "fashion-mnist"
    folder.mkdir()
    write_images(folder, "train", *clothes(11_000, seed=0), zipped=False)  # 10,000 of them validate
    write_images(folder, "t10k", *clothes(500, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METABROYDEN_DATA", str(root))
        yield


# --- what is run, and what may be skipped


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "Fashion-MNIST itself in place of small stand-ins, and the tests marked real_data as well"
    parser.addoption("--real-data", action="store_true", help=words)


def left_out(config: pytest.Config) -> dict[str, str]:
    """Marks whose tests are not selected, and why."""
    found = {} if config.getoption("real_data") else {"real_data": "wants --real-data: make check-data"}
    if find_spec("learn2learn") is None and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc"))):
        found["learn2learn"] = "setup_env.py leaves it out where there is no C compiler"
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without = [item for item in items if any(map(item.get_closest_marker, left_out(config)))]
    items[:] = [item for item in items if item not in without]
    config.hook.pytest_deselected(items=without)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for mark, reason in left_out(config).items():
        terminalreporter.write_line(f"Not selected: tests marked {mark} ({reason})")


def refuse_skip(report: pytest.TestReport | pytest.CollectReport, where: str) -> None:
    """Turn a skip into a failure; an expected failure is no skip."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = (
            f"{where} was skipped ({reason}). Only tests marked cuda may be: let `make` install what it needs, or make "
            "it in a fixture (tests/conftest.py)"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("cuda") is None:
        refuse_skip(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    refuse_skip(report, collector.nodeid)
    return report
