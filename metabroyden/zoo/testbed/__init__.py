"""Fixed-point problems with known answers, for tests and benchmarks. Importing this package registers them all."""

from metabroyden.zoo.testbed import cells, hard, linear, nonlinear, powerflow, riccati
from metabroyden.zoo.testbed.base import PROBLEMS, KnownProblem, make_problem

__all__ = ["PROBLEMS", "KnownProblem", "cells", "hard", "linear", "make_problem", "nonlinear", "powerflow", "riccati"]
