"""Makes .venv with everything in requirements.txt and this package: `python setup_env.py`, on Linux, macOS and Windows.

It needs Python 3.11 or 3.12 and its standard library. Run by make; safe to run again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
COMPILED = "learn2learn"
"""The requirement that is installed apart: it is made of C sources, and of its dependencies only some are wanted."""


def python_of(venv: Path, system: str = os.name) -> Path:
    """The interpreter of a virtual environment; `system` as in `os.name`."""
    return venv / "Scripts" / "python.exe" if system == "nt" else venv / "bin" / "python"


def has_compiler() -> bool:
    """Whether there is a C compiler: the one that CC names, cc, gcc or Microsoft's."""
    named = shlex.split(os.environ.get("CC", ""))[:1]
    return any(shutil.which(name) for name in (*named, "cc", "gcc", *(["cl"] if os.name == "nt" else [])))


def parts(requirements: str) -> tuple[str, str]:
    """The lines of a requirements file without those of `COMPILED`, and those."""
    lines = requirements.splitlines(keepends=True)
    compiled = [line for line in lines if line.startswith(COMPILED)]
    return "".join(line for line in lines if line not in compiled), "".join(compiled)


def installs(venv: Path, compiler: bool) -> list[list[str]]:
    """Arguments of `pip install`, one list a call, with the requirements as they lie in the virtual environment."""
    plain, compiled = (str(venv / name) for name in ("requirements.txt", f"{COMPILED}.txt"))
    found = [["-r", plain], ["--no-deps", "-r", compiled], ["--no-deps", "--editable", str(ROOT)]]
    return found if compiler else [found[0], found[2]]


def main() -> None:
    """Make the virtual environment, or bring it up to date."""
    # The library runs on 3.13 as well; silva-networks forbids numpy 2, which is what 3.13 has wheels of.
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        version = ".".join(map(str, sys.version_info[:3]))
        remedy = "run this script with one of them, or make with PYTHON=python3.12"
        sys.exit(f"The tests and experiments need Python 3.11 or 3.12, and {sys.executable} is {version}: {remedy}")
    python = python_of(VENV)
    print(f"Making {VENV}: some 2 GB, two minutes.", flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    plain, compiled = parts((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    (VENV / "requirements.txt").write_text(plain, encoding="utf-8")
    (VENV / f"{COMPILED}.txt").write_text(compiled, encoding="utf-8")
    compiler = has_compiler()
    if not compiler:
        left_out = "its task sets will not work; everything else is installed"
        print(f"There is no C compiler here, so {COMPILED} is left out and {left_out}.", file=sys.stderr)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    # pip's isolated build: learn2learn's old C sources are generated anew
    environment = {**os.environ, "PIP_USE_PEP517": "1"}
    for arguments in installs(VENV, compiler):
        subprocess.run([*pip, *arguments], check=True, cwd=ROOT, env=environment)
    (VENV / "ready").touch()
    print(f"Done: everything is in {VENV}.")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # refuses words that it does not know
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{shlex.join(map(str, error.cmd))} failed, with code {error.returncode}")
