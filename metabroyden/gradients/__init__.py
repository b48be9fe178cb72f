"""How gradients pass through a solved fixed point: one mode a file."""

from metabroyden.gradients.implicit import Implicit
from metabroyden.gradients.phantom import JacobianFree, Phantom
from metabroyden.gradients.unroll import Unroll

__all__ = ["Implicit", "JacobianFree", "Phantom", "Unroll"]
