"""`python -m experiments NAME [options]`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any, get_type_hints

import tyro

from experiments.registry import EXPERIMENTS

USAGE = "usage: python -m experiments NAME [options]\n\nThe experiments, each with its options:\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one experiment; with no name, or --help in its place, show all of them with their options."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        for name in EXPERIMENTS:
            with contextlib.suppress(SystemExit):  # tyro leaves once it has shown its help
                _options(name, ["--help"])
    elif given[0] not in EXPERIMENTS:
        sys.exit(f"unknown experiment {given[0]!r}: known are {', '.join(EXPERIMENTS)}")
    else:
        EXPERIMENTS[given[0]](_options(given[0], given[1:]))


def _options(name: str, words: Sequence[str]) -> Any:
    """The config of an experiment from the words behind its name."""
    config_type = get_type_hints(EXPERIMENTS[name])["config"]
    return tyro.cli(config_type, args=words, prog=f"python -m experiments {name}")


if __name__ == "__main__":
    main()
