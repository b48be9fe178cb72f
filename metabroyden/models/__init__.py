"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.models.base import EquilibriumModel, LanguageModel
from metabroyden.models.causal import CausalCell
from metabroyden.models.cells import CELLS, make_cell
from metabroyden.models.compose import ComposedDEQ, PairCell, compose
from metabroyden.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig
from metabroyden.models.convert import ConvertedNetwork, StackCell, to_deq
from metabroyden.models.dense import DenseCell
from metabroyden.models.fit import ClassifierTraining, accuracy, load_model, save_model, train_classifier
from metabroyden.models.monotone import MonotoneCell, MonotoneConv, MonotoneDense, MonotoneMultiTier
from metabroyden.models.monotone_classifier import MonotoneClassifier, MonotoneClassifierConfig

__all__ = [
    "CELLS",
    "CausalCell",
    "ClassifierTraining",
    "ComposedDEQ",
    "ConvCell",
    "ConvClassifier",
    "ConvClassifierConfig",
    "ConvertedNetwork",
    "DenseCell",
    "EquilibriumModel",
    "LanguageModel",
    "MonotoneCell",
    "MonotoneClassifier",
    "MonotoneClassifierConfig",
    "MonotoneConv",
    "MonotoneDense",
    "MonotoneMultiTier",
    "PairCell",
    "StackCell",
    "accuracy",
    "compose",
    "load_model",
    "make_cell",
    "save_model",
    "to_deq",
    "train_classifier",
]
