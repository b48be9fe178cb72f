"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.models.base import EquilibriumModel, LanguageModel
from metabroyden.models.causal import CausalCell
from metabroyden.models.cells import CELLS, make_cell
from metabroyden.models.compose import ComposedDEQ, PairCell, compose
from metabroyden.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig
from metabroyden.models.convert import ConvertedNetwork, StackCell, to_deq
from metabroyden.models.dense import DenseCell, DenseClassifier, DenseClassifierConfig
from metabroyden.models.fit import ClassifierTraining, accuracy, load_model, save_model, train_classifier
from metabroyden.models.mlp import MLPClassifier, MLPClassifierConfig
from metabroyden.models.multiscale import MultiscaleCell, MultiscaleClassifier, MultiscaleClassifierConfig
from metabroyden.models.twins import Flow, Stack, Unrolled, explicit_twin, flow_twin, unrolled_twin

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
    "DenseClassifier",
    "DenseClassifierConfig",
    "EquilibriumModel",
    "Flow",
    "LanguageModel",
    "MLPClassifier",
    "MLPClassifierConfig",
    "MultiscaleCell",
    "MultiscaleClassifier",
    "MultiscaleClassifierConfig",
    "PairCell",
    "Stack",
    "StackCell",
    "Unrolled",
    "accuracy",
    "compose",
    "explicit_twin",
    "flow_twin",
    "load_model",
    "make_cell",
    "save_model",
    "to_deq",
    "train_classifier",
    "unrolled_twin",
]
