"""`python -m experiments.gpu`: the command where there is no tyro; its options are those of `python -m experiments gpu`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.gpu import Gpu, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu", description=Gpu.__doc__)
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; auto: a GPU where there is one")
    parser.add_argument("--smoke", action="store_true", help="the same in small, to see whether it runs")
    parser.add_argument("--minutes", type=float, default=Gpu.minutes, help="after which nothing new is begun")
    parser.add_argument("--results", type=Path, default=Gpu.results, help="where results go")
    parser.add_argument("--runs", type=Path, default=Gpu.runs, help="where finished pieces of work are kept")
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    run(Gpu(**vars(parser.parse_args())))
