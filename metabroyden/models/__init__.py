"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.models.base import EquilibriumModel, LanguageModel, Memory
from metabroyden.models.causal import CausalCell
from metabroyden.models.cells import CELLS, make_cell
from metabroyden.models.compose import ComposedDEQ, PairCell, compose
from metabroyden.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig
from metabroyden.models.convert import ConvertedNetwork, StackCell, to_deq
from metabroyden.models.criteria import Images, NextToken, accuracy, bits_per_token, unaltered
from metabroyden.models.dense import DenseCell, DenseClassifier, DenseClassifierConfig
from metabroyden.models.episodes import Episodes, load_episodes
from metabroyden.models.families import FAMILIES, Family, get_family
from metabroyden.models.fit import EpochEnd, Training, history, load_model, save_model, train
from metabroyden.models.mlp import MLPClassifier, MLPClassifierConfig
from metabroyden.models.monotone import MonotoneCell, MonotoneConv, MonotoneDense, MonotoneMultiTier
from metabroyden.models.monotone_classifier import MonotoneClassifier, MonotoneClassifierConfig
from metabroyden.models.multiscale import MultiscaleCell, MultiscaleClassifier, MultiscaleClassifierConfig
from metabroyden.models.packed import Packed
from metabroyden.models.transformer import DEQTransformer, DEQTransformerConfig, TransformerCell
from metabroyden.models.trellisnet import TrellisCell, TrellisNet, TrellisNetConfig
from metabroyden.models.twins import Flow, Stack, Unrolled, explicit_twin, flow_twin, unrolled_twin

__all__ = [
    "CELLS",
    "FAMILIES",
    "CausalCell",
    "ComposedDEQ",
    "ConvCell",
    "ConvClassifier",
    "ConvClassifierConfig",
    "ConvertedNetwork",
    "DEQTransformer",
    "DEQTransformerConfig",
    "DenseCell",
    "DenseClassifier",
    "DenseClassifierConfig",
    "Episodes",
    "EpochEnd",
    "EquilibriumModel",
    "Family",
    "Flow",
    "Images",
    "LanguageModel",
    "MLPClassifier",
    "MLPClassifierConfig",
    "Memory",
    "MonotoneCell",
    "MonotoneClassifier",
    "MonotoneClassifierConfig",
    "MonotoneConv",
    "MonotoneDense",
    "MonotoneMultiTier",
    "MultiscaleCell",
    "MultiscaleClassifier",
    "MultiscaleClassifierConfig",
    "NextToken",
    "Packed",
    "PairCell",
    "Stack",
    "StackCell",
    "Training",
    "TransformerCell",
    "TrellisCell",
    "TrellisNet",
    "TrellisNetConfig",
    "Unrolled",
    "accuracy",
    "bits_per_token",
    "compose",
    "explicit_twin",
    "flow_twin",
    "get_family",
    "history",
    "load_episodes",
    "load_model",
    "make_cell",
    "save_model",
    "to_deq",
    "train",
    "unaltered",
    "unrolled_twin",
]
