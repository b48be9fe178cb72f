"""Benchmarks that make rows, and figures and reports made from rows alone."""
