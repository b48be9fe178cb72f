"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.models.base import EquilibriumModel, LanguageModel
from metabroyden.models.causal import CausalCell
from metabroyden.models.cells import CELLS, make_cell
from metabroyden.models.compose import ComposedDEQ, PairCell, compose
from metabroyden.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig
from metabroyden.models.convert import ConvertedNetwork, StackCell, to_deq
from metabroyden.models.criteria import Images, NextToken, accuracy, bits_per_token, shift_and_mirror
from metabroyden.models.dense import DenseCell
from metabroyden.models.episodes import Episodes, load_episodes
from metabroyden.models.families import FAMILIES, Family, get_family
from metabroyden.models.fit import EpochEnd, Training, history, load_model, save_model, train

__all__ = [
    "CELLS",
    "FAMILIES",
    "CausalCell",
    "ComposedDEQ",
    "ConvCell",
    "ConvClassifier",
    "ConvClassifierConfig",
    "ConvertedNetwork",
    "DenseCell",
    "Episodes",
    "EpochEnd",
    "EquilibriumModel",
    "Family",
    "Images",
    "LanguageModel",
    "NextToken",
    "PairCell",
    "StackCell",
    "Training",
    "accuracy",
    "bits_per_token",
    "compose",
    "get_family",
    "history",
    "load_episodes",
    "load_model",
    "make_cell",
    "save_model",
    "shift_and_mirror",
    "to_deq",
    "train",
]
