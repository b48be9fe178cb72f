"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.models.causal import CausalCell
from metabroyden.models.cells import CELLS, make_cell
from metabroyden.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig
from metabroyden.models.dense import DenseCell
from metabroyden.models.fit import ClassifierTraining, accuracy, load_model, save_model, train_classifier

__all__ = [
    "CELLS",
    "CausalCell",
    "ClassifierTraining",
    "ConvCell",
    "ConvClassifier",
    "ConvClassifierConfig",
    "DenseCell",
    "accuracy",
    "load_model",
    "make_cell",
    "save_model",
    "train_classifier",
]
