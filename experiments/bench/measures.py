"""Size of the repository by room, of this commit and of others: `python -m experiments.bench.measures REV HEAD`."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = {
    "zoo": ("metabroyden/zoo/", "metabroyden/models/", "metabroyden/data/", "metabroyden/testbed/"),
    "measuring, reporting, experiments": ("experiments/", "metabroyden/evaluation/"),
    "tests": ("tests/",),
    "library without the zoo": ("metabroyden/",),
}
"""Rooms by the paths of their Python files; the first that fits counts."""
MOST = {
    "library without the zoo": "9,000 lines",
    "zoo": "3,800 lines",
    "measuring, reporting, experiments": "4,500 lines",
    "tests": "10,500 lines",
    "README.md": "250 lines, 14 KB",
    "results/": "45 MB",
    "clone of depth 1": "35 MB",
    "functions over complexity 8": "0",
}
"""Row names and what each may be at most."""


def measures(folder: Path) -> dict[str, str]:
    """Every row of `MOST` for the checkout in a folder."""
    lines = dict.fromkeys(ROOMS, 0)
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder).as_posix()
        for room in [room for room, starts in ROOMS.items() if name.startswith(starts)][:1]:
            lines[room] += len(path.read_text().splitlines())
    readme = (folder / "README.md").read_text()
    results = sum(path.stat().st_size for path in (folder / "results").rglob("*") if path.is_file())
    check = shlex.split(
        "ruff check --isolated --select C901 --output-format concise --config lint.mccabe.max-complexity=8 ."
    )
    found = subprocess.run([sys.executable, "-m", *check], cwd=folder, capture_output=True, text=True)
    return {
        **{room: f"{count:,} lines" for room, count in lines.items()},
        "README.md": f"{len(readme.splitlines())} lines, {len(readme.encode()) / 1e3:.0f} KB",
        "results/": f"{results / 1e6:.0f} MB",
        "functions over complexity 8": str(found.stdout.count("C901")),
    }


def of_revision(revision: str) -> dict[str, str]:
    """The measures of a commit, from its files alone."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", "--format=tar", f"--output={folder}/tree.tar", revision], cwd=ROOT, check=False
        )
        if archive.returncode:
            raise SystemExit(f"no commit {revision!r} in this clone: a full clone has it (git fetch --unshallow)")
        tree = Path(folder, "tree")
        with tarfile.open(f"{folder}/tree.tar") as packed:
            packed.extractall(tree, filter="data")
        return {**measures(tree), "clone of depth 1": f"{_packed(tree, Path(folder, 'clone.git')) / 1e6:.0f} MB"}


def _packed(tree: Path, git: Path) -> int:
    """Bytes of a repository that holds these files alone, in one commit."""
    base = ["git", f"--git-dir={git}", f"--work-tree={tree}", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "-Af"], ["commit", "-qm", "all"], ["gc", "-q"]):
        subprocess.run([*base, *command], check=True)
    return sum(path.stat().st_size for path in git.rglob("*") if path.is_file())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.measures", description=__doc__)
    parser.add_argument("revisions", nargs="*", default=["HEAD"], help="commits, one a column")
    columns = {revision: of_revision(revision) for revision in parser.parse_args().revisions}
    print("| |", " | ".join(columns), "| at most |")
    print("|---" * (len(columns) + 2) + "|")
    for row, most in MOST.items():
        print(f"| {row} |", " | ".join(found[row] for found in columns.values()), f"| {most} |")


if __name__ == "__main__":
    main()
