"""What helps a deep equilibrium model train: penalties, normalisation, dropout, losses and warm starts."""

from metabroyden.training.correction import fixed_point_correction
from metabroyden.training.dropout import VariationalDropout, held_masks
from metabroyden.training.jacobian import jacobian_penalty
from metabroyden.training.normalise import normalise
from metabroyden.training.spectral import spectral_radius
from metabroyden.training.warm_start import EquilibriumCache

__all__ = [
    "EquilibriumCache",
    "VariationalDropout",
    "fixed_point_correction",
    "held_masks",
    "jacobian_penalty",
    "normalise",
    "spectral_radius",
]
