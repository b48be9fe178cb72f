"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.models.compose import ComposedDEQ, PairCell, compose
from metabroyden.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig
from metabroyden.models.convert import ConvertedNetwork, StackCell, to_deq
from metabroyden.models.fit import ClassifierTraining, accuracy, load_model, save_model, train_classifier

__all__ = [
    "ClassifierTraining",
    "ComposedDEQ",
    "ConvCell",
    "ConvClassifier",
    "ConvClassifierConfig",
    "ConvertedNetwork",
    "PairCell",
    "StackCell",
    "accuracy",
    "compose",
    "load_model",
    "save_model",
    "to_deq",
    "train_classifier",
]
