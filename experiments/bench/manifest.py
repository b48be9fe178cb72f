"""results/MANIFEST.json: size and sha256 of what lies under results/. `python -m experiments.bench.manifest [--check]`."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from metabroyden.storage import atomic_write

ROOT = Path(__file__).resolve().parents[2]
NAME = "results/MANIFEST.json"


def files() -> list[Path]:
    """What git has or would take under results/, but for texts, whose changes it shows."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "results"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [ROOT / name for name in found if name and name != NAME and not name.endswith(".md")]
    return sorted(path for path in paths if path.exists())


def described(path: Path) -> dict[str, Any]:
    """Path, size and hash of a file."""
    data = path.read_bytes()
    return {"path": str(path.relative_to(ROOT)), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def differences() -> list[str]:
    """Paths that are missing, new, or other than the manifest says."""
    kept = {item["path"]: item for item in json.loads((ROOT / NAME).read_text())}
    found = {item["path"]: item for item in map(described, files())}
    return sorted(path for path in kept.keys() | found.keys() if kept.get(path) != found.get(path))


def main() -> None:
    """Write the manifest, or with --check say what differs from it."""
    if sys.argv[1:] == ["--check"]:
        sys.exit("\n".join(differences()) or 0)
    lines = ",\n".join(json.dumps(described(path)) for path in files())
    atomic_write(ROOT / NAME, f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
