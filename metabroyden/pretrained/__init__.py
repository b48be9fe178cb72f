"""Trained solvers shipped with the package, as safetensors files."""
