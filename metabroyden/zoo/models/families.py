"""The families of fixed-point problems: a model, real data, and how it is trained. One line of `FAMILIES` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metabroyden.gradients import Implicit, Phantom
from metabroyden.solvers import Anderson, PeacemanRachford, Picard
from metabroyden.solvers.substitution import Substitution
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.fashion_mnist import load_fashion_mnist
from metabroyden.zoo.data.shakespeare import load_shakespeare
from metabroyden.zoo.models.conv import ConvClassifier
from metabroyden.zoo.models.criteria import Images, NextToken, OfFamily, unaltered
from metabroyden.zoo.models.dense import DenseClassifier
from metabroyden.zoo.models.fit import Training
from metabroyden.zoo.models.mlp import MLPClassifier
from metabroyden.zoo.models.monotone_classifier import MonotoneClassifier
from metabroyden.zoo.models.multiscale import MultiscaleClassifier
from metabroyden.zoo.models.transformer import DEQTransformer
from metabroyden.zoo.models.trellisnet import TrellisNet


@dataclass(frozen=True)
class Family:
    """One model on one data set.

    Attributes:
        model: the class, an `EquilibriumModel`.
        config: its config.
        criterion: makes the data and what is trained for; data that is missing raises, saying how to get it.
        training: of the DEQ, and of the networks beside it.
        jacobian: weight of the Jacobian penalty in the regularised variant.
        depth: layers of the unrolled and of the explicit network.
        solver: the DEQ's in training.
        backward: its gradient mode in training.
        rtol: tolerance of its solves, and what is called converged afterwards.
        max_nfe: evaluations of a sample in one of its solves.
        large: (config, training) for a GPU.
        twins: which networks are trained beside the DEQ.
        splitting: whether the cell offers what operator splitting needs.
        pictures: whether activations by depth are drawn.
    """

    model: type
    config: Any
    criterion: Callable[[], OfFamily]
    training: Training
    large: tuple[Any, Training]
    jacobian: float = 1.0
    depth: int = 10
    solver: Any = field(default_factory=lambda: Anderson(memory=5))
    backward: Any = field(default_factory=lambda: Implicit(solver=Anderson(memory=5), rtol=1e-2, max_nfe=20))
    rtol: float = 1e-3
    max_nfe: int = 40
    twins: tuple[str, ...] = ("unrolled", "explicit")
    splitting: bool = False
    pictures: bool = False

    def build(self, config: Any = None) -> Any:
        """The untrained model with the solver of training; most early solves end at the budget, which is enough there."""
        options = {"solver": self.solver, "backward": self.backward, "rtol": self.rtol, "max_nfe": self.max_nfe}
        return self.model(self.config if config is None else config, **options, warn=False)

    def enlarged(self) -> Family:
        """The preset for a GPU."""
        return replace(self, config=self.large[0], training=self.large[1])


Sizes = dict[str, Any]
Data = Callable[[], OfFamily]
# keeps image cells whose solves are hard a DEQ without a penalty (results/RESEARCH.md, 32)
_AT_EQUILIBRIUM: Sizes = {"backward": Phantom(steps=5, damping=1.0), "rtol": 1e-2, "max_nfe": 30}
_CONVERTED: Sizes = {"jacobian": 0.0, "solver": Substitution(), "rtol": 0.0, "twins": ()}
_CHARACTERS: Sizes = {"vocabulary": 81, "stem": "hashed", "reach": 8, "rows": 2**17, "recent": 512}
_WORDS: Sizes = {"vocabulary": 5001, "stem": "hashed", "reach": 3, "rows": 2**16, "recent": 512}


def _digits() -> OfFamily:
    return Images(load_digits())


def _fashion() -> OfFamily:
    return Images(load_fashion_mnist(), augment=unaltered)


def _fashion_in_parts() -> OfFamily:
    return Images(load_fashion_mnist(), augment=unaltered, batches=200, limit=2000)


def _fashion_halved() -> OfFamily:
    return Images(load_fashion_mnist(side=14), augment=unaltered, batches=160, limit=2000)


def _characters() -> OfFamily:
    return NextToken(load_shakespeare(), segments=20, limit=65_536)


def _words() -> OfFamily:
    return NextToken(load_shakespeare("word"), limit=32_768)


def _images(model: Any, criterion: Data, sizes: Sizes, large: Sizes, training: Training, **options: Any) -> Family:
    """A family of images; `large` is what its sizes are on a GPU."""
    config, twins = model.config_type(**sizes), ("unrolled", "explicit", "flow")
    preset = replace(config, **large), Training(epochs=60, batch=256)
    return Family(model, config, criterion, training, preset, **{"twins": twins, **options})


def _monotone(criterion: Data, sizes: Sizes, large: int, epochs: int, depth: int = 10) -> Family:
    """A monotone classifier, solved by the splitting that converges whatever its weights; `large` is its width on a GPU."""
    training = Training(epochs=epochs, learning_rate=5e-3)
    backward = Implicit(solver=Anderson(memory=10, damping=0.3), rtol=1e-2, max_nfe=60)
    options: dict[str, Any] = {"solver": PeacemanRachford(alpha=0.5), "backward": backward, "splitting": True}
    return _images(MonotoneClassifier, criterion, sizes, {"width": large}, training, depth=depth, **options)


def _language(model: Any, criterion: Data, sizes: Sizes, large: Sizes, training: Training, **options: Any) -> Family:
    """Most steps shallow, small and in bfloat16, the rest at the equilibrium by phantom gradients (results/RESEARCH.md)."""
    shallow: Sizes = {"pretrain": round(0.88 * training.epochs), "least": 1, "half": True}
    training = replace(training, batch=16, weight_decay=0.02, warmup=0.01, beta2=0.98, **shallow)
    on_gpu = replace(training, epochs=200, batch=64, learning_rate=1e-3, pretrain=140, depth=8)
    config = model.config_type(**sizes)
    preset = replace(config, **large), on_gpu
    return Family(model, config, criterion, training, preset, depth=5, rtol=1e-2, pictures=True, **options)


_PHANTOM_TRELLIS: Sizes = {
    "backward": Phantom(steps=4, damping=1.0),
    "solver": Picard(),  # the equilibrium is a chain of length / dilation links, which no other solver shortens
}
_MORE_CHANNELS: Sizes = {"channels": 64, "inner": 128}
_MULTI_TIER: Sizes = {"structure": "multi-tier", "width": 8}
_MIXED_DEPTHS: Sizes = {"depth": 6, "least": 2}

FAMILIES: dict[str, Family] = {
    "dense-digits": _images(
        DenseClassifier, _digits, {"n": 64}, {"n": 256}, Training(epochs=120, learning_rate=3e-3, pretrain=40)
    ),
    "dense-fashion": _images(
        DenseClassifier, _fashion, {"n": 128, "side": 28}, {"n": 512}, Training(epochs=12, pretrain=8)
    ),
    "mlp-digits": _images(
        MLPClassifier, _digits, {}, {"hidden": 256}, Training(epochs=160, learning_rate=3e-3), **_CONVERTED
    ),
    "mlp-fashion": _images(
        MLPClassifier, _fashion, {"hidden": 128, "side": 28}, {"hidden": 512}, Training(epochs=12), **_CONVERTED
    ),
    "conv-digits": _images(ConvClassifier, _digits, {}, _MORE_CHANNELS, Training(epochs=24, pretrain=12), depth=8),
    "conv-fashion": _images(
        ConvClassifier,
        _fashion_in_parts,
        {"side": 28, "stride": 2},
        {**_MORE_CHANNELS, "stride": 1},
        Training(epochs=16, pretrain=2, **_MIXED_DEPTHS),
        depth=5,
        **_AT_EQUILIBRIUM,
    ),
    "trellisnet-shakespeare": _language(
        TrellisNet,
        _characters,
        {"dilation": 4, **_CHARACTERS},
        {"channels": 512},
        Training(epochs=16, learning_rate=8e-3, depth=4),
        **_PHANTOM_TRELLIS,
    ),
    "transformer-shakespeare": _language(
        DEQTransformer,
        _characters,
        _CHARACTERS,
        {"width": 512, "heads": 8, "inner": 2048, "memory": 64},
        Training(epochs=24, learning_rate=4e-3, depth=3),
        backward=Phantom(steps=4),
    ),
    "trellisnet-words": _language(
        TrellisNet,
        _words,
        {"embedding": 48, "dilation": 2, **_WORDS},
        {"channels": 512, "embedding": 64},
        Training(epochs=10, learning_rate=5e-3, depth=4),
        **_PHANTOM_TRELLIS,
    ),
    "multiscale-digits": _images(
        MultiscaleClassifier,
        _digits,
        {},
        {"width": 64},
        Training(epochs=60, pretrain=10, **_MIXED_DEPTHS),
        depth=6,
        **_AT_EQUILIBRIUM,
    ),
    "multiscale-fashion": _images(
        MultiscaleClassifier,
        _fashion_in_parts,
        {"side": 28, "stride": 2},
        {"width": 64, "stride": 1},
        Training(epochs=24, pretrain=3, **_MIXED_DEPTHS),
        depth=6,
        **_AT_EQUILIBRIUM,
    ),
    "monotone-dense-digits": _monotone(_digits, {"structure": "dense", "width": 87}, 256, 40),
    "monotone-conv-digits": _monotone(_digits, {"structure": "conv", "width": 16}, 64, 16),
    "monotone-multitier-digits": _monotone(_digits, _MULTI_TIER, 32, 20),
    "monotone-dense-fashion": _monotone(_fashion, {"structure": "dense", "width": 87, "side": 28}, 256, 6),
    "monotone-conv-fashion": _monotone(_fashion_halved, {"structure": "conv", "width": 16, "side": 14}, 64, 8, depth=5),
    "monotone-multitier-fashion": _monotone(_fashion_halved, {**_MULTI_TIER, "side": 14}, 32, 8, depth=5),
}
"""The families by name."""


def get_family(name: str) -> Family:
    """The family of this name; ValueError for an unknown one."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}: known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def trained_model(models: Path, name: str) -> Path:
    """The file of a trained family; ValueError for an unknown one, FileNotFoundError for one that is not trained yet."""
    get_family(name)
    path = models / name / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train it with `python -m experiments models --family {name}`")
    return path
