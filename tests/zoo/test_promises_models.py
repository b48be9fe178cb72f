"""What holds of every model and its twins: it comes back from its file, has other widths, and refuses nonsense."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

import metabroyden as mb
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models import (
    CausalCell,
    ConvClassifierConfig,
    DenseCell,
    DenseClassifier,
    DenseClassifierConfig,
    DEQTransformerConfig,
    Episodes,
    Images,
    MLPClassifierConfig,
    MonotoneClassifierConfig,
    MonotoneConv,
    MonotoneDense,
    MonotoneMultiTier,
    MultiscaleCell,
    MultiscaleClassifierConfig,
    Stack,
    Training,
    TransformerCell,
    TrellisCell,
    TrellisNet,
    TrellisNetConfig,
    Unrolled,
    explicit_twin,
    flow_twin,
    get_family,
    load_model,
    make_cell,
    save_model,
    unrolled_twin,
)
from metabroyden.zoo.models.base import MODELS, LanguageConfig, ModelConfig
from metabroyden.zoo.models.circular import resolvent
from metabroyden.zoo.models.stem import STEMS, TokenStem

TOKENS = 11
WORDS = {"vocabulary": TOKENS, "embedding": 5, "recent": 20}
CONFIGS: list[ModelConfig] = [
    DenseClassifierConfig(n=12, side=5, image_channels=3, classes=4),
    MLPClassifierConfig(hidden=9, depth=3),
    ConvClassifierConfig(channels=8, inner=8, side=7, stride=2),
    MultiscaleClassifierConfig(width=8, scales=3),
    *(MonotoneClassifierConfig(structure, 6, m=0.5) for structure in ("dense", "conv", "multi-tier")),
    *(TrellisNetConfig(channels=6, stem=stem, **WORDS) for stem in STEMS),
    *(DEQTransformerConfig(width=8, heads=2, inner=10, memory=5, stem=stem, **WORDS) for stem in STEMS),
]
OPTIONS = {"solver": mb.Anderson(), "rtol": 1e-4, "max_nfe": 30, "warn": False}


def model_of(config: ModelConfig, **options):
    (model_class,) = (cls for cls in MODELS.values() if cls.config_type is type(config))
    return model_class(config, **options).eval()


def inputs_of(config) -> torch.Tensor:
    if isinstance(config, LanguageConfig):
        return torch.randint(TOKENS, (3, 9))
    return torch.rand(3, config.image_channels, config.side, config.side)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_model_and_its_twins_come_back_from_their_files(config, tmp_path):
    model, inputs = model_of(config, **OPTIONS), inputs_of(config)
    nets = [model]
    if not isinstance(config, MLPClassifierConfig):
        nets += [
            unrolled_twin(model, 3),
            flow_twin(model, 0.5, 2),
            explicit_twin(type(model), config, 3, tolerance=0.3),
        ]
    for net in nets:
        options = OPTIONS if net is model else {}
        path = save_model(net, tmp_path / "model.safetensors", {"epochs": 1})
        again = load_model(path, **options)
        assert (type(again), again.config) == (type(net), net.config)
        assert torch.equal(again(inputs), net.eval()(inputs))
        if net is model:
            assert (again.deq.rtol, again.deq.max_nfe) == (1e-4, 30)
            continue
        assert type(again.deq) is type(net.deq)
        assert again.deq.describe() == net.deq.describe()
        with pytest.raises(TypeError, match=r"holds a twin .*'max_nfe'"):
            load_model(path, max_nfe=5)


@pytest.mark.parametrize(
    ("config", "width", "other"),
    [
        (ConvClassifierConfig(16, 32), 10, {"channels": 10, "inner": 20, "groups": 2}),
        (MonotoneClassifierConfig("multi-tier", 4, side=10, tiers=3), 2, {"width": 2}),
        (CONFIGS[-6], 4, {"channels": 4}),
        (CONFIGS[-1], 4, {"width": 4, "inner": 5}),
        (DEQTransformerConfig(width=96, heads=6, inner=192), 50, {"width": 54, "inner": 108}),  # even, and whole heads
        (DEQTransformerConfig(width=96, heads=6, inner=192), 96, {}),
    ],
)
def test_a_narrowed_model_has_another_state_and_all_else_the_same(config, width, other):
    narrow = config.narrowed(width)
    assert asdict(narrow) == asdict(config) | other
    if config in CONFIGS:
        assert model_of(narrow, warn=False)(inputs_of(narrow)).shape == (3, 9, TOKENS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_cell("dens"), "unknown cell 'dens': known are dense, conv, causal"),
        (lambda: get_family("conv"), "unknown family 'conv': known are dense-digits"),
        (lambda: CausalCell(6, width=1), "width must be at least 2 and dilation at least 1"),
        (lambda: CausalCell(6, dilation=0), "width must be at least 2 and dilation at least 1"),
        (lambda: MultiscaleCell((4,)), r"at least two widths, got \(4,\)"),
        (lambda: TrellisCell(4, 0), "must be at least 1, got 4 and 0"),
        (lambda: TransformerCell(9, 3), "even and divided by heads, got 9 and 3"),
        (lambda: TransformerCell(8, 3), "even and divided by heads, got 8 and 3"),
        (lambda: TrellisNet(TrellisNetConfig(stem="convolution")), "got 'convolution'"),
        *(
            (lambda wrong=wrong: TokenStem(TOKENS, 5, 6, 7, "hashed", **wrong), "of a hashed stem cannot be")
            for wrong in ({"reach": 1}, {"rows": 0}, {"recent": -1})
        ),
        (lambda: MonotoneDense(4, 0), "m must be positive, got 0"),
        (lambda: MonotoneConv(4, 1), "side must be at least 2, got 1"),
        *(
            (lambda c=c, s=s: MonotoneMultiTier(c, s), rf"side must be .*, got side {s} and {len(c)} tiers")
            for c, s in (((), 8), ((2, 2), 5), ((2, 2, 2), 4))
        ),
        (lambda: resolvent(lambda z: z, [(1, 5, 5), (1, 2, 2)], 1.0, torch.zeros(1)), r"of the last, got \[5, 2\]"),
        (lambda: MonotoneClassifierConfig(structure="convolution"), "structure must be one of .*, got 'convolution'"),
        (lambda: MonotoneClassifierConfig(margin=-1), "got -1, 2 and 87"),
        *(
            (lambda twin=twin, depth=depth: twin(depth), "depth must be an integer")
            for depth in (0, 2.5)
            for twin in (
                lambda depth: explicit_twin(DenseClassifier, DenseClassifierConfig(), depth),
                lambda depth: Unrolled(DenseCell(4), depth),
            )
        ),
        (lambda: Stack([]), "at least one cell"),
        *(
            (lambda wrong=wrong: Training(**wrong), "must be at")
            for wrong in ({"epochs": 0}, {"batch": 0}, {"pretrain": -1}, {"epochs": 3, "pretrain": 4})
        ),
        (lambda: Training(least=9), "least must be from 1 to the depth 8, got 9"),
        (lambda: Images(load_digits()).steps(1300), "a batch of 1300 is more than the 1200 training images"),
        (lambda: Episodes(3, 4), "count must be from 1 to the 3 epochs, got 4"),
        (lambda: load_digits(test=5000), "must be positive and leave some of 1797"),
    ],
)
def test_what_makes_no_sense_is_refused_with_clear_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()
