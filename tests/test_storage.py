"""What leaves a process, by file or by pickle, arrives whole."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import NamedTuple

import pytest
import torch

import metabroyden as mb
from metabroyden import storage
from metabroyden.learned.layout import Layout
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.fit import make_learned
from metabroyden.meta.schedule import StepGuard
from metabroyden.solution import State
from metabroyden.solvers.registry import list_solvers
from metabroyden.state import Packing
from metabroyden.storage import atomic_write


class Cell(torch.nn.Module):
    layout = "vector"

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


class Named(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def named(z: Named, x: torch.Tensor) -> Named:
    return Named(torch.tanh(0.3 * z.b.sum(1, keepdim=True) + x), torch.cos(0.3 * z.a).expand_as(z.b))


def solved(**options) -> mb.Solution:
    return mb.solve(Cell().requires_grad_(False), torch.zeros(3, 6), torch.ones(3, 6), solver=mb.Broyden(), **options)


def fail(_: int = 0) -> State:
    return mb.solve(lambda z: 2 * z + 1, torch.ones(3, 2), solver=mb.Picard(), max_nfe=5).z


def failure() -> mb.SolveError:
    with pytest.raises(mb.SolveError) as caught:
        fail()
    return caught.value


def learned(name: str):
    return make_learned(name, Layout("vector", (6,)))


def used_deq() -> mb.DEQ:
    deq = mb.DEQ(Cell(), solver=learned("grouped"))
    deq(torch.ones(3, 6)).sum().backward()
    return deq


CARRIED = {
    "Solution": solved,
    "Solution with snapshots": lambda: solved(snapshots=(2, 4)),
    "Trace": lambda: solved().trace,
    "SolveError": failure,
    "CheckpointError": lambda: mb.CheckpointError("a file", "and why"),
    "Status": lambda: mb.Status.STALLED,
    "Safeguard": mb.Safeguard,
    "Layout": lambda: Layout("image", (4, 3, 3)),
    "Packing": lambda: Packing.of((torch.zeros(2, 3), torch.zeros(2, 4))),
    "MetaConfig": lambda: MetaConfig(unroll=(2, 4)),
    "CoTrainConfig": mb.CoTrainConfig,
    "StepGuard": lambda: StepGuard({"loss not finite": [3]}, [1], [2], 1),
    "DEQ": lambda: mb.DEQ(Cell(), solver=learned("grouped")),
    "DEQ that was used": used_deq,
    "EquilibriumCache": lambda: mb.EquilibriumCache(4),
    "VariationalDropout": lambda: mb.VariationalDropout(0.2, (8,)),
    "FixedBudget": lambda: mb.FixedBudget(Cell(), mb.Picard(), max_nfe=4, compiled=False),
    **{mode.__name__: mode for mode in (mb.Implicit, mb.JacobianFree, mb.Phantom, mb.Unroll)},
    **{name: lambda name=name: mb.get_solver(name) for name in list_solvers(learned=False)},
    **{name: lambda name=name: learned(name) for name in list_solvers(learned=True)},
}
WAYS = {"pickle": lambda v: pickle.loads(pickle.dumps(v)), "copy": copy.copy, "deepcopy": copy.deepcopy}


def same(one, other) -> bool:
    """Whether two values are of one type and equal, tensors and modules by what they hold."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    held = contents(one)
    return one == other if held is None else same(held, contents(other))


def contents(one) -> dict | None:
    """What an object holds, by name; None for one that is compared as it is."""
    if isinstance(one, torch.nn.Module):
        return dict(one.state_dict())
    if isinstance(one, BaseException):
        return {"message": str(one), "arguments": one.args, **vars(one)}
    if isinstance(one, Enum):
        return None
    if is_dataclass(one):
        return {item.name: getattr(one, item.name) for item in fields(one)}
    return vars(one) if hasattr(one, "__dict__") else None


@pytest.mark.parametrize("name", CARRIED)
def test_what_a_program_may_send_or_copy_arrives_equal(name):
    value = CARRIED[name]()
    for way in WAYS.values():
        assert same(way(value), value)


def test_the_inverse_that_a_solve_leaves_can_be_sent():
    found, w = solved(keep_inverse=True).inverse, torch.randn(3, 6)
    again = WAYS["pickle"](found)
    assert again.known == found.known > 0
    assert torch.equal(again.rmatvec(w), found.rmatvec(w))


def test_a_solve_error_keeps_its_notes_and_its_class_and_a_pool_hands_it_on():
    class Ours(mb.SolveError):
        pass

    error = failure()
    error.add_note("on the third batch")
    assert copy.copy(error).__notes__ == ["on the third batch"]
    assert type(copy.copy(Ours("why", error.solution))) is Ours
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.map_async(fail, [0, 1])
        with pytest.raises(mb.SolveError, match="3 of 3 samples did not converge") as caught:
            result.get(timeout=30)
    assert caught.value.solution.nfe.tolist() == [5, 5, 5]


@pytest.mark.parametrize("solver", list_solvers(learned=False, splitting=False))
def test_a_named_tuple_comes_back_as_one(solver):
    z0, x = Named(torch.zeros(4, 1), torch.zeros(4, 3)), torch.randn(4, 1)
    options = {"rtol": 1e-5, "snapshots": (2,), "solver": mb.get_solver(solver)}
    solution = mb.solve(named, z0, x, **options)
    plain = mb.solve(lambda z, x: tuple(named(Named(*z), x)), tuple(z0), x, **options)
    assert type(solution.z) is type(solution.snapshots[0]) is Named
    assert type(plain.z) is tuple
    assert all(map(torch.equal, solution.z, plain.z))
    cache = mb.EquilibriumCache()
    cache.store(range(4), solution.z)
    assert torch.equal(cache.start(range(4), z0).b, solution.z.b)
    assert type(WAYS["pickle"](solution).z) is Named


# --- files


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_leaves_and_one_that_is_there_keeps_its_own(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "usual").touch()
        path, solver = atomic_write(tmp_path / "ours", "text"), mb.save_solver(mb.Picard(), tmp_path / "solver")
        assert path.stat().st_mode == solver.stat().st_mode == (tmp_path / "usual").stat().st_mode
        path.chmod(0o640)
        assert atomic_write(path, "new").stat().st_mode & 0o777 == 0o640
        assert path.read_text() == "new"
    finally:
        os.umask(before)


def test_where_no_open_file_may_be_renamed_it_is_closed_first(tmp_path, monkeypatch):
    """Windows refuses to; it has no fcntl either."""
    opened, replace = [], os.replace
    fdopen = os.fdopen

    def noted(*arguments):
        opened.append(fdopen(*arguments))
        return opened[-1]

    def refuse_open(source, target):
        assert all(file.closed for file in opened)
        replace(source, target)

    monkeypatch.setattr(storage, "fcntl", None)
    monkeypatch.setattr(storage.os, "fdopen", noted)
    monkeypatch.setattr(storage.os, "replace", refuse_open)
    for text in ("old", "new"):
        assert atomic_write(tmp_path / "a", text).read_text() == text
    assert len(opened) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("disk full")

    path = atomic_write(tmp_path / "a.txt", "old")
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "runs" / "7").mkdir(parents=True)
    atomic_write(tmp_path / "runs" / "7" / "a", "old")
    (tmp_path / "latest").symlink_to("runs/7")  # of a folder, of a file in it, and of a file that is not there yet
    (tmp_path / "a").symlink_to("latest/a")
    (tmp_path / "b").symlink_to("runs/8/b")
    for name, end in (("a", "runs/7/a"), ("b", "runs/8/b")):
        assert atomic_write(tmp_path / name, "new") == tmp_path / name
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / end).read_text() == "new"
        assert not (tmp_path / end).is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", "a", "b", "b"]


_SAVES = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("storage", sys.argv[2])  # without PyTorch, whose import takes seconds
storage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(storage)
for number in range(10**9):
    storage.atomic_write(sys.argv[1], bytes([number % 251]) * 3_000_000)
    if number == 2:
        print("going", flush=True)
"""


@contextmanager
def saving(path):
    """Another process that saves to this file again and again, until it is killed."""
    command = [sys.executable, "-c", _SAVES, str(path), storage.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_what_killed_saves_leave_behind_goes_with_the_next_one(tmp_path):
    path, names = tmp_path / "a", (".a.tmp", ".a.notes.tmp", ".b.01234567.tmp", "a.01234567.tmp", ".a.original")
    others = {tmp_path / name for name in names}
    for other in others:
        other.write_text("somebody else's")
    for late in range(30):  # until one is hit between the temporary file and its new name
        with saving(path):
            time.sleep(late / 10_000)
        data = path.read_bytes()
        assert len(data) == 3_000_000, "the file is whole, whenever the writer was killed"
        assert len(set(data)) == 1
        if set(tmp_path.iterdir()) - others - {path}:
            break
    else:
        pytest.fail("no save was hit in the middle")
    atomic_write(path, "new")
    assert set(tmp_path.iterdir()) == {path, *others}


def test_savers_of_one_file_leave_each_other_alone(tmp_path):
    path, faults = tmp_path / "a", []

    def save(text: str) -> None:
        try:
            for _ in range(40):
                atomic_write(path, text * 1000)
        except OSError as error:
            faults.append(error)

    with saving(path) as process:
        threads = [threading.Thread(target=save, args=(text,)) for text in "xyz"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert process.poll() is None, "the other process goes on saving"
    assert not faults
    assert len(set(path.read_bytes())) == 1
    atomic_write(path, "last")
    assert list(tmp_path.iterdir()) == [path]


def test_where_files_cannot_be_locked_nothing_is_taken_for_a_leftover(tmp_path, monkeypatch):
    (tmp_path / ".a.01234567.tmp").touch()
    monkeypatch.setattr(storage, "fcntl", None)
    assert atomic_write(tmp_path / "a", "new").read_text() == "new"
    assert (tmp_path / ".a.01234567.tmp").exists()
    monkeypatch.undo()
    atomic_write(tmp_path / "a", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
