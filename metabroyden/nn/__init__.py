"""What helps a deep equilibrium model train: penalties, normalisation, dropout, losses and warm starts."""

from metabroyden.nn.correction import fixed_point_correction
from metabroyden.nn.dropout import VariationalDropout, held_masks
from metabroyden.nn.jacobian import jacobian_penalty
from metabroyden.nn.normalise import normalise
from metabroyden.nn.spectral import spectral_radius
from metabroyden.nn.warm_start import EquilibriumCache

__all__ = [
    "EquilibriumCache",
    "VariationalDropout",
    "fixed_point_correction",
    "held_masks",
    "jacobian_penalty",
    "normalise",
    "spectral_radius",
]
