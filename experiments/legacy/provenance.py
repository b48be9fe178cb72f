"""What is written beside every result: config, seed, versions, machine, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from experiments.bench.runner import write_rows
from metabroyden.storage import atomic_write

_PACKAGES = (
    "metabroyden",
    "torch",
    "higher",
    "numpy",
    "scikit-learn",
    "torchdeq",
    "silva-networks",
    "xitorch",
    "scipy",
    "pypower",
)


def config_hash(config: Any) -> str:
    """Eight hex digits that change when a value of the config dataclass does."""
    return _digest(asdict(config))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON holds it, paths as strings."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def command_line(name: str, config: Any, places: Iterable[str]) -> str:
    """The command that runs an experiment with this config: its options but for those that say where things are.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Config:
    ...     some_steps: int = 3
    ...     names: tuple[str, ...] = ("a",)
    ...     widths: bool = True
    >>> command_line("race", Config(4, ("a", "b"), False), ())
    'python -m experiments race --some-steps 4 --names a b --no-widths'
    """
    words = [f"python -m experiments {name}"]
    for item in fields(config):
        value, option = getattr(config, item.name), item.name.replace("_", "-")
        if item.name in places or value == item.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words.append(f"--{option} {shlex.join(map(str, values))}")
    return " ".join(words)


def results_folder(folder: Path, config: Any, free: Iterable[str]) -> Path:
    """Where a run with this config publishes: `folder` if its options but the `free` ones are the usual ones, else a trial-
    folder in it, named by those options, so that a trial replaces no published figure."""
    chosen = {item.name: getattr(config, item.name) for item in fields(config) if item.name not in free}
    if all(item.default == chosen.get(item.name, item.default) for item in fields(config)):
        return folder
    return folder / f"trial-{_digest(chosen)}"


def write_results(folder: Path, rows: Iterable[dict[str, Any]], described: dict[str, Any]) -> None:
    """Write config.json and rows.jsonl.gz into a folder: where there are rows, how they were made is there."""
    atomic_write(folder / "config.json", json.dumps(described, indent=2) + "\n")
    write_rows(folder / "rows.jsonl.gz", rows)


def provenance() -> dict[str, Any]:
    """Versions, processor, threads and commit (with a mark where the tree had changes)."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        # what an experiment itself writes below results/ is no change of the code
        changed = ["git", "status", "--porcelain", "--", ".", ":!results"]
        dirty = subprocess.run(changed, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" with changes" if dirty else "")
