"""Cells f(z, x) and the models round them, one cell a file."""

from metabroyden.zoo.models.base import EquilibriumModel, LanguageModel, Memory
from metabroyden.zoo.models.causal import CausalCell
from metabroyden.zoo.models.cells import CELLS, make_cell
from metabroyden.zoo.models.conv import ConvCell, ConvClassifier, ConvClassifierConfig
from metabroyden.zoo.models.criteria import Images, NextToken, accuracy, bits_per_token, unaltered
from metabroyden.zoo.models.dense import DenseCell, DenseClassifier, DenseClassifierConfig
from metabroyden.zoo.models.episodes import Episodes, load_episodes
from metabroyden.zoo.models.families import FAMILIES, Family, get_family
from metabroyden.zoo.models.fit import EpochEnd, Training, history, load_model, save_model, train
from metabroyden.zoo.models.mlp import MLPClassifier, MLPClassifierConfig
from metabroyden.zoo.models.monotone import MonotoneCell, MonotoneConv, MonotoneDense, MonotoneMultiTier
from metabroyden.zoo.models.monotone_classifier import MonotoneClassifier, MonotoneClassifierConfig
from metabroyden.zoo.models.multiscale import MultiscaleCell, MultiscaleClassifier, MultiscaleClassifierConfig
from metabroyden.zoo.models.pretrained import load_pretrained
from metabroyden.zoo.models.transformer import DEQTransformer, DEQTransformerConfig, TransformerCell
from metabroyden.zoo.models.trellisnet import TrellisCell, TrellisNet, TrellisNetConfig
from metabroyden.zoo.models.twins import Flow, Stack, Unrolled, explicit_twin, flow_twin, unrolled_twin
