"""Which layers of a feedforward network may be part of a DEQ, and why others may not; shapes without an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def _named(names: str) -> frozenset[type[nn.Module]]:
    return frozenset(getattr(nn, name) for name in names.split())


def _in_1d_to_3d(names: str) -> frozenset[type[nn.Module]]:
    return frozenset(getattr(nn, f"{name}{axes}d") for name in names.split() for axes in (1, 2, 3))


MIXING = _in_1d_to_3d("Conv ConvTranspose") | {nn.Linear}
_BATCH_NORMS, _INSTANCE_NORMS = _in_1d_to_3d("BatchNorm"), _in_1d_to_3d("InstanceNorm")
_DROPOUTS = _in_1d_to_3d("Dropout") | _named("Dropout AlphaDropout FeatureAlphaDropout")
_SUPPORTED = MIXING | _BATCH_NORMS | _INSTANCE_NORMS | _DROPOUTS
_SUPPORTED |= _in_1d_to_3d("AdaptiveAvgPool AdaptiveMaxPool AvgPool LPPool MaxPool")
_SUPPORTED |= _in_1d_to_3d("CircularPad ConstantPad ReflectionPad ReplicationPad ZeroPad")
_SUPPORTED |= _named(
    "LayerNorm GroupNorm RMSNorm LocalResponseNorm Flatten Identity PixelShuffle PixelUnshuffle Unflatten Upsample "
    "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax Mish PReLU RReLU ReLU "
    "ReLU6 SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
)
# With one axis fewer torch takes the first for the channels, or the pixels, of a single sample.
_SPATIAL = MIXING - {nn.Linear} | _INSTANCE_NORMS | {nn.Softmax2d, nn.PixelShuffle, nn.PixelUnshuffle}
_ALONG = dict.fromkeys(_named("Softmax Softmin LogSoftmax GLU Unflatten"), "dim") | {nn.Flatten: "start_dim"}

Layers = list[tuple[str, nn.Module]]


def class_of(layer: nn.Module) -> Any:
    """The class of a layer, parametrizations of its tensors apart."""
    return parametrize.type_before_parametrizations(layer)


def flatten(network: nn.Sequential, prefix: str = "") -> Layers:
    """The layers of a Sequential, nested ones opened, with their names; TypeError for a foreign container."""
    if not isinstance(network, nn.Sequential) or type(network).forward is not nn.Sequential.forward:
        raise TypeError(
            f"network must be an nn.Sequential with nn.Sequential's own forward, got {type(network).__name__}"
            f"{f' at {prefix[:-1]}' if prefix else ''}"
        )
    layers: Layers = []
    for name, layer in network._modules.items():  # named_children() leaves out repeats
        assert layer is not None
        layers += flatten(layer, f"{prefix}{name}.") if isinstance(layer, nn.Sequential) else [(prefix + name, layer)]
    return layers


def check_layer(name: str, layer: nn.Module) -> None:
    """Refuse a layer that can be no part of a DEQ: TypeError for its class, ValueError for its settings or its mode."""
    cls = class_of(layer)
    if cls not in _SUPPORTED:
        raise TypeError(_refusal(name, layer, _why_not(cls)))
    _refuse_if(name, layer, _settings(layer))
    check_mode(name, layer)


def check_mode(name: str, layer: nn.Module) -> None:
    """Refuse a layer that is, in its present mode, no fixed function of each sample (ValueError)."""
    _refuse_if(name, layer, _changes(layer))


def has_modes(layer: nn.Module) -> bool:
    """Whether `check_mode` may judge the layer differently after train() or eval()."""
    return class_of(layer) in _BATCH_NORMS | _INSTANCE_NORMS | _DROPOUTS | {nn.RReLU} or _spectral(layer)


def output_shape(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer makes of x, a tensor on the meta device, with no hook run and nothing computed.

    ValueError where it cannot take x, or would reach across the first axis, the samples.
    """
    shape = tuple(x.shape)
    reason = _across(layer, x.dim())
    _refuse_if(name, layer, reason and f"for an input of shape {shape} {reason}")
    try:
        y = class_of(layer).forward(_skeleton(layer), x)
    except (RuntimeError, IndexError, ValueError) as error:
        cls = class_of(layer).__name__
        raise ValueError(f"layer {name} ({cls}) cannot take an input of shape {shape}: {error}") from error
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(_refusal(name, layer, f"it turns an input of shape {shape} into one of {tuple(y.shape)}"))
    return y


def _refusal(name: str, layer: nn.Module, reason: str) -> str:
    return f"layer {name} ({class_of(layer).__name__}) cannot be part of a DEQ: {reason}"


def _refuse_if(name: str, layer: nn.Module, reason: str) -> None:
    if reason:
        raise ValueError(_refusal(name, layer, reason))


def _changes(layer: Any) -> str:
    """Why the layer is no fixed function of each sample in the mode it is in; empty where it is one."""
    cls = class_of(layer)
    if cls in _BATCH_NORMS and (layer.training or layer.running_mean is None):
        return "it takes its statistics over the batch, which ties samples together; track statistics and call .eval()"
    if not layer.training:
        return ""
    if cls in _INSTANCE_NORMS and layer.running_mean is not None:
        return "in training mode each evaluation would move its running statistics; call .eval()"
    if cls in _DROPOUTS and layer.p > 0:
        return "in training mode it draws anew at each evaluation, so there is no fixed point; call .eval()"
    if cls is nn.RReLU:
        return "in training mode it draws its slope anew at each evaluation; call .eval()"
    return (
        "in training mode spectral norm changes the weight at each evaluation; call .eval()" if _spectral(layer) else ""
    )


def _why_not(cls: type[nn.Module]) -> str:
    if issubclass(cls, (nn.RNNBase, nn.RNNCellBase)):
        return "a recurrent layer has a state of its own and returns it"
    if issubclass(cls, nn.MultiheadAttention) or cls.__name__.startswith("Transformer"):
        return "attention takes several inputs or masks; write a cell f(z, x) for it"
    if issubclass(cls, nn.modules.lazy.LazyModuleMixin):
        return "it has no parameters yet; run the network once before it is converted"
    return "it cannot be known to treat samples apart, with one tensor in and one out; write a cell f(z, x) for it"


def _settings(layer: nn.Module) -> str:
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.dtype not in (torch.float32, torch.float64) and (tensor.is_floating_point() or tensor.is_complex()):
            return f"its parameters are {tensor.dtype}, and a state is float32 or float64"
    if getattr(layer, "return_indices", False):
        return "with return_indices it returns a pair"
    if class_of(layer) in _ALONG and getattr(layer, _ALONG[class_of(layer)]) is None:
        return "its dim is not given"
    return _across(layer, None)


def _across(layer: Any, axes: int | None) -> str:
    """Why the layer would reach across samples, given the number of axes of its input (None: not known yet)."""
    cls, along = class_of(layer), "it works along the first axis, the samples"
    if cls in _ALONG and getattr(layer, _ALONG[cls]) in (0, None if axes is None else -axes):
        return along
    if axes is None:
        return ""
    if cls is nn.Linear and axes < 2:
        return along
    if cls in (nn.LayerNorm, nn.RMSNorm) and len(layer.normalized_shape) >= axes:
        return "it normalises along the first axis, the samples"
    if "Pad" in cls.__name__ and len(layer.padding) // 2 >= axes:
        return "it pads the first axis, the samples"
    wanted = 2 + int(cls.__name__[-2]) if cls in _SPATIAL and cls.__name__.endswith("d") else 4
    return f"it wants {wanted} axes, the samples first" if cls in _SPATIAL and axes != wanted else ""


def _spectral(layer: nn.Module) -> bool:
    parts = (*layer.modules(), *layer._forward_pre_hooks.values())  # either of torch's two ways to attach it
    return any(type(part).__name__.endswith("SpectralNorm") for part in parts)


def _skeleton(layer: Any) -> nn.Module:
    """The layer without hooks and parametrizations, with the shapes of its tensors on the meta device."""
    cls = class_of(layer)
    skeleton = cls.__new__(cls)
    skeleton.__dict__.update(layer.__dict__)
    nn.Module.__init__(skeleton)  # forgets parameters, buffers and hooks; the settings stay
    skeleton.training = layer.training
    plain = [key for key, value in layer.__dict__.items() if isinstance(value, Tensor)]
    parametrized = layer.parametrizations if parametrize.is_parametrized(layer) else ()
    with torch.no_grad():
        for key in (*layer._parameters, *layer._buffers, *parametrized, *plain):
            value = getattr(layer, key)
            skeleton.__dict__[key] = None if value is None else value.to("meta")
    return skeleton
