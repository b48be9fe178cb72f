"""Other networks as DEQs: `to_deq` for a feedforward network, `compose` for DEQs that read one another."""

from metabroyden.convert.compose import ComposedDEQ, PairCell, compose
from metabroyden.convert.network import ConvertedNetwork, StackCell, to_deq

__all__ = ["ComposedDEQ", "ConvertedNetwork", "PairCell", "StackCell", "compose", "to_deq"]
