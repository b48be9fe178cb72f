"""Other libraries' models with our solvers. Importing this imports none of those libraries."""

from metabroyden.integrations import torchdeq

__all__ = ["torchdeq"]
