"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig

__all__ = ["ConvCell", "ConvClassifier", "ConvClassifierConfig"]
