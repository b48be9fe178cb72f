"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.models.base import EquilibriumModel, LanguageModel
from metabroyden.models.causal import CausalCell
from metabroyden.models.cells import CELLS, make_cell
from metabroyden.models.compose import ComposedDEQ, PairCell, compose
from metabroyden.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig
from metabroyden.models.convert import ConvertedNetwork, StackCell, to_deq
from metabroyden.models.dense import DenseCell
from metabroyden.models.fit import ClassifierTraining, accuracy, load_model, save_model, train_classifier
from metabroyden.models.transformer import DEQTransformer, DEQTransformerConfig, TransformerCell
from metabroyden.models.trellisnet import TrellisCell, TrellisNet, TrellisNetConfig

__all__ = [
    "CELLS",
    "CausalCell",
    "ClassifierTraining",
    "ComposedDEQ",
    "ConvCell",
    "ConvClassifier",
    "ConvClassifierConfig",
    "ConvertedNetwork",
    "DEQTransformer",
    "DEQTransformerConfig",
    "DenseCell",
    "EquilibriumModel",
    "LanguageModel",
    "PairCell",
    "StackCell",
    "TransformerCell",
    "TrellisCell",
    "TrellisNet",
    "TrellisNetConfig",
    "accuracy",
    "compose",
    "load_model",
    "make_cell",
    "save_model",
    "to_deq",
    "train_classifier",
]
