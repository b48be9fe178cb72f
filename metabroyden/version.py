"""The version of the package."""

from importlib import metadata

SOURCE = "0.1.0"  # as pyproject.toml has it: for sources that are used without being installed


def found() -> str:
    """The version of the installed package, else that of the sources."""
    try:
        return metadata.version("metabroyden")
    except metadata.PackageNotFoundError:
        return SOURCE


__version__ = found()
