"""`python -m experiments NAME [options]`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

import tyro

from experiments.registry import EXPERIMENTS

USAGE = "usage: python -m experiments NAME [options]\n\nThe experiments, each with its options:\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one experiment; with no name, or --help in its place, show all of them with their options."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        for name, (config_type, _) in EXPERIMENTS.items():
            with contextlib.suppress(SystemExit):  # tyro leaves once it has shown its help
                tyro.cli(config_type, args=["--help"], prog=f"python -m experiments {name}")
        return
    if given[0] not in EXPERIMENTS:
        sys.exit(f"unknown experiment {given[0]!r}: known are {', '.join(EXPERIMENTS)}")
    config_type, run = EXPERIMENTS[given[0]]
    run(tyro.cli(config_type, args=given[1:], prog=f"python -m experiments {given[0]}"))


if __name__ == "__main__":
    main()
