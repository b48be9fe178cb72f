"""Experiments: one file each, a frozen dataclass config and `run(config)`. `python -m experiments --help`."""
