"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig
from metabroyden.models.fit import ClassifierTraining, accuracy, load_model, save_model, train_classifier

__all__ = [
    "ClassifierTraining",
    "ConvCell",
    "ConvClassifier",
    "ConvClassifierConfig",
    "accuracy",
    "load_model",
    "save_model",
    "train_classifier",
]
