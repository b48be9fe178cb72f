"""Cells, models, data and problem sets that the experiments and tests use; nothing of the library imports it."""
