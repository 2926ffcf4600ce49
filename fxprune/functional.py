"""Single layers, narrowed by hand: the functions that users of Torch-Pruning know, without mutation.

Each function takes a layer and the channels to remove, and returns a new layer; the given one is not changed.
``out`` channels are those that the layer gives, ``in`` channels those that it takes. Where they are the
same (normalisation, PReLU, embedding, depthwise convolution, attention, a bare parameter), so are the
two functions. Whoever uses one of them sees to it that the neighbours of the layer are narrowed, too;
:func:`fxprune.plan` does so for whole networks.

All raise :class:`~fxprune.errors.ChannelError` if the layer is of another kind, if a channel is named that it
does not have or twice, if none would remain, and if the groups or heads would become unequally wide. New
layers keep dtype, device, memory format, ``requires_grad`` and the train/eval flag; they have no gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from .errors import ChannelError
from .graph_module import clone_module
from .nn import MultiheadAttention
from .passes.base import Kept, Mask
from .passes.modules import free_attention
from .passes.parameters import pick, restride

_Layer = TypeVar("_Layer", bound=nn.Module)
_Conv = TypeVar("_Conv", bound=_ConvNd)


def prune_conv_out_channels(layer: _Conv, idxs: Iterable[int]) -> _Conv:
    """Remove output channels of a convolution, of one to three dimensions, transposed or not.

    A grouped convolution loses equally many channels of each of its groups, each group its own; see
    :func:`prune_depthwise_conv_out_channels` for those of one channel a group.

    Args:
        layer: weight ``(out, in / groups, *kernel)``; transposed ``(in, out / groups, *kernel)``.
        idxs: positions among ``layer.out_channels``.
    """
    _expect(layer, _ConvNd)
    keep = _balanced(layer, idxs, layer.out_channels, layer.groups, "output channels")
    tensors = {"weight": _channels(layer, keep, second=layer.transposed)}
    if layer.bias is not None:
        tensors["bias"] = pick(layer.bias, {0: Kept(keep, ())})
    return _new(layer, tensors, out_channels=int(keep.sum()))


def prune_conv_in_channels(layer: _Conv, idxs: Iterable[int]) -> _Conv:
    """Remove input channels of a convolution; as :func:`prune_conv_out_channels` otherwise.

    Args:
        layer: weight ``(out, in / groups, *kernel)``; transposed ``(in, out / groups, *kernel)``.
        idxs: positions among ``layer.in_channels``.
    """
    _expect(layer, _ConvNd)
    keep = _balanced(layer, idxs, layer.in_channels, layer.groups, "input channels")
    return _new(
        layer, {"weight": _channels(layer, keep, second=not layer.transposed)}, in_channels=int(keep.sum())
    )


def prune_depthwise_conv_out_channels(layer: _Conv, idxs: Iterable[int]) -> _Conv:
    """Remove output channels of a depthwise convolution, with the input channels that they are made of.

    Where each input channel makes several output channels, these can only go together.

    Args:
        layer: ``groups == in_channels``; weight ``(out, 1, *kernel)``; transposed
            ``(in, out / in, *kernel)``.
        idxs: positions among ``layer.out_channels``.
    """
    _expect_depthwise(layer)
    times = layer.out_channels // layer.groups
    keep = _keep(idxs, layer.out_channels, layer, "output channels").reshape(-1, times)
    torn = np.flatnonzero(keep.any(axis=1) & ~keep.all(axis=1))
    if torn.size:
        first = int(torn[0]) * times
        raise ChannelError(
            f"{layer} makes {times} output channels of each input channel, which go together; of "
            f"{list(range(first, first + times))} only some are to be removed. Name all or none of them."
        )
    return _depthwise(layer, np.asarray(keep.all(axis=1)))


def prune_depthwise_conv_in_channels(layer: _Conv, idxs: Iterable[int]) -> _Conv:
    """Remove input channels of a depthwise convolution, with the output channels that are made of them.

    Args:
        layer: as for :func:`prune_depthwise_conv_out_channels`.
        idxs: positions among ``layer.in_channels``.
    """
    _expect_depthwise(layer)
    return _depthwise(layer, _keep(idxs, layer.in_channels, layer, "input channels"))


def prune_batchnorm_out_channels(layer: _Layer, idxs: Iterable[int]) -> _Layer:
    """Remove channels of a batch norm, running statistics included.

    Args:
        layer: weight, bias, running_mean, running_var ``(num_features,)``, where it has them.
        idxs: positions among ``layer.num_features``.
    """
    return _norm(layer, idxs, _BatchNorm)


def prune_linear_out_channels(layer: nn.Linear, idxs: Iterable[int]) -> nn.Linear:
    """Remove output features of a linear layer.

    Args:
        layer: weight ``(out_features, in_features)``, bias ``(out_features,)`` or none.
        idxs: positions among ``layer.out_features``.
    """
    _expect(layer, nn.Linear)
    keep = _keep(idxs, layer.out_features, layer, "output features")
    return _new(layer, _along(layer, keep, weight=0, bias=0), out_features=int(keep.sum()))


def prune_linear_in_channels(layer: nn.Linear, idxs: Iterable[int]) -> nn.Linear:
    """Remove input features of a linear layer.

    Args:
        layer: weight ``(out_features, in_features)``.
        idxs: positions among ``layer.in_features``.
    """
    _expect(layer, nn.Linear)
    keep = _keep(idxs, layer.in_features, layer, "input features")
    return _new(layer, _along(layer, keep, weight=1), in_features=int(keep.sum()))


def prune_prelu_out_channels(layer: nn.PReLU, idxs: Iterable[int]) -> nn.PReLU:
    """Remove channels of a PReLU; one whose single slope serves all channels is copied as it is.

    Args:
        layer: weight ``(num_parameters,)``.
        idxs: positions among ``layer.num_parameters``.
    """
    _expect(layer, nn.PReLU)
    if layer.num_parameters == 1:
        return _new(layer, {})
    keep = _keep(idxs, layer.num_parameters, layer, "channels")
    return _new(layer, _along(layer, keep, weight=0), num_parameters=int(keep.sum()))


def prune_layernorm_out_channels(layer: _Layer, idxs: Iterable[int]) -> _Layer:
    """Remove features of a layer norm or an RMS norm, along the last of its normalised dimensions.

    Its statistics run over what remains.

    Args:
        layer: weight and bias of the shape ``normalized_shape``, where it has them.
        idxs: positions among ``layer.normalized_shape[-1]``.
    """
    _expect(layer, nn.LayerNorm, nn.RMSNorm)
    shape: tuple[int, ...] = tuple(layer.normalized_shape)  # type: ignore[arg-type]
    keep = _keep(idxs, shape[-1], layer, "features")
    last = len(shape) - 1
    new = (*shape[:-1], int(keep.sum()))
    return _new(layer, _along(layer, keep, weight=last, bias=last), normalized_shape=new)


def prune_embedding_out_channels(layer: nn.Embedding, idxs: Iterable[int]) -> nn.Embedding:
    """Remove features of an embedding; its entries stay.

    Args:
        layer: weight ``(num_embeddings, embedding_dim)``.
        idxs: positions among ``layer.embedding_dim``.
    """
    _expect(layer, nn.Embedding)
    keep = _keep(idxs, layer.embedding_dim, layer, "features")
    return _new(layer, _along(layer, keep, weight=1), embedding_dim=int(keep.sum()))


def prune_parameter_out_channels(layer: Tensor, idxs: Iterable[int], dim: int = -1) -> Tensor:
    """Remove indices of a bare parameter or tensor along one dimension.

    Args:
        layer: a parameter or a tensor of at least one dimension.
        idxs: positions along ``dim``.
        dim: the dimension.
    """
    _expect(layer, Tensor)
    if not -layer.dim() <= dim < layer.dim():
        raise ChannelError(f"there is no dimension {dim} in a parameter of shape {tuple(layer.shape)}.")
    keep = _keep(idxs, layer.shape[dim], f"a parameter of shape {tuple(layer.shape)}", "indices")
    return pick(layer, {dim % layer.dim(): Kept(keep, ())})


def prune_multihead_attention_out_channels(
    layer: nn.MultiheadAttention | MultiheadAttention, idxs: Iterable[int]
) -> MultiheadAttention:
    """Remove channels of multi-head attention: of its queries, keys and values, and of its output.

    Every head loses equally many channels, each its own, and the scale ``1 / sqrt(head_dim)`` stays what
    it was; so the result is a :class:`fxprune.nn.MultiheadAttention`. The inputs are narrowed along with
    it: all three where their weights are packed, and the queries where they are separate, as then the
    keys and values have widths of their own.

    Args:
        layer: ``embed_dim`` channels ``E`` in ``num_heads`` heads; in_proj_weight ``(3 E, E)``, or
            q/k/v_proj_weight ``(E, E)``, ``(E, kdim)``, ``(E, vdim)``; out_proj ``(E, E)``.
        idxs: positions among ``E``.
    """
    _expect(layer, nn.MultiheadAttention, MultiheadAttention)
    width = layer.out_proj.in_features
    if layer.out_proj.out_features != width or getattr(layer, "qk_width", width) != width:
        raise ChannelError(
            f"{type(layer).__name__} has different widths within and without (inner {width}, outer "
            f"{layer.out_proj.out_features}), so its channels cannot be named by one number. Use a plan."
        )
    keep = _balanced("the attention layer", idxs, width, layer.num_heads, "channels", "head")
    one, three = Kept(keep, ()), Kept(np.tile(keep, 3), ())
    axes: dict[str, dict[int, Kept]] = {
        "in_proj_weight": {0: three, 1: one},
        "in_proj_bias": {0: three},
        "q_proj_weight": {0: one, 1: one},
        "k_proj_weight": {0: one},
        "v_proj_weight": {0: one},
        "bias_k": {2: one},
        "bias_v": {2: one},
        "out_proj.weight": {0: one, 1: one},
        "out_proj.bias": {0: one},
    }
    own = dict(layer.named_parameters())
    new = _new(layer, {name: pick(own[name], kept) for name, kept in axes.items() if name in own})
    left = int(keep.sum())
    if isinstance(new, nn.MultiheadAttention):
        return free_attention(new, {name: tuple(p.shape) for name, p in new.named_parameters()})
    new.__dict__.update(qk_width=left, v_width=left)
    new.out_proj.__dict__.update(in_features=left, out_features=left)
    return new


def prune_groupnorm_out_channels(layer: nn.GroupNorm, idxs: Iterable[int]) -> nn.GroupNorm:
    """Remove channels of a group norm, equally many of each group; its statistics run over what remains.

    Where every group is a single channel, the groups go with their channels.

    Args:
        layer: weight and bias ``(num_channels,)``, where it has them.
        idxs: positions among ``layer.num_channels``.
    """
    _expect(layer, nn.GroupNorm)
    single = layer.num_groups == layer.num_channels
    keep = _balanced(layer, idxs, layer.num_channels, 1 if single else layer.num_groups, "channels")
    left = int(keep.sum())
    groups = left if single else layer.num_groups
    return _new(layer, _along(layer, keep, weight=0, bias=0), num_channels=left, num_groups=groups)


def prune_instancenorm_out_channels(layer: _Layer, idxs: Iterable[int]) -> _Layer:
    """Remove channels of an instance norm; as :func:`prune_batchnorm_out_channels`.

    Args:
        layer: weight, bias, running_mean, running_var ``(num_features,)``, where it has them.
        idxs: positions among ``layer.num_features``.
    """
    return _norm(layer, idxs, _InstanceNorm)


prune_batchnorm_in_channels = prune_batchnorm_out_channels
prune_prelu_in_channels = prune_prelu_out_channels
prune_layernorm_in_channels = prune_layernorm_out_channels
prune_embedding_in_channels = prune_embedding_out_channels
prune_parameter_in_channels = prune_parameter_out_channels
prune_multihead_attention_in_channels = prune_multihead_attention_out_channels
prune_groupnorm_in_channels = prune_groupnorm_out_channels
prune_instancenorm_in_channels = prune_instancenorm_out_channels


def _expect(layer: Any, *kinds: type) -> None:
    """Refuse layers of another kind, and those whose weight is computed."""
    if not isinstance(layer, kinds):
        names = " or ".join(kind.__name__.lstrip("_") for kind in kinds)
        raise ChannelError(f"expected a layer of the kind {names}, got {type(layer).__name__}.")
    if getattr(layer, "weight", None) is not None and "weight" not in vars(layer).get("_parameters", ()):
        raise ChannelError(
            f"{layer} computes its weight (a parametrization or a hook), so it cannot be narrowed by itself."
        )


def _expect_depthwise(layer: Any) -> None:
    _expect(layer, _ConvNd)
    if layer.groups != layer.in_channels:
        raise ChannelError(
            f"{layer} is not depthwise: it has {layer.groups} groups for {layer.in_channels} input channels. "
            f"Use prune_conv_out_channels or prune_conv_in_channels."
        )


def _keep(idxs: Iterable[int], size: int, layer: Any, what: str) -> Mask:
    """``(size,)``, false for what goes."""
    try:
        gone = [int(i) for i in np.asarray(torch.as_tensor(list(idxs), dtype=torch.int64))]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ChannelError(f"the {what} to remove must be whole numbers, got {idxs!r}.") from error
    wrong = [i for i in gone if not 0 <= i < size]
    if wrong:
        raise ChannelError(f"{layer} has the {what} 0 to {size - 1}; there are no {wrong} among them.")
    twice = sorted({i for i in gone if gone.count(i) > 1}) if len(set(gone)) < len(gone) else []
    if twice:
        raise ChannelError(f"the {what} {twice} of {layer} are named twice.")
    if len(gone) == size:
        raise ChannelError(f"all {size} {what} of {layer} would go; at least one must stay.")
    keep: Mask = np.ones(size, dtype=np.bool_)
    keep[gone] = False
    return keep


def _balanced(layer: Any, idxs: Iterable[int], size: int, rows: int, what: str, row: str = "group") -> Mask:
    """As :func:`_keep`, where every one of the ``rows`` must lose equally many."""
    keep = _keep(idxs, size, layer, what)
    counts = (~keep.reshape(rows, -1)).sum(axis=1)
    if (counts != counts[0]).any():
        hint = ""
        if isinstance(layer, _ConvNd) and layer.groups == layer.in_channels:
            hint = " Use prune_depthwise_conv_out_channels to remove groups as a whole."
        raise ChannelError(
            f"each of the {rows} {row}s of {layer} must lose equally many of its {size // rows} {what}; to "
            f"be removed are {counts.tolist()}.{hint}"
        )
    return keep


def _channels(layer: _ConvNd, keep: Mask, second: bool) -> Tensor:
    """The weight of a convolution with these channels left, along its first or second dimension."""
    rows = keep.reshape(layer.groups, -1)
    if not second or layer.groups == 1:
        return pick(layer.weight, {int(second): Kept(keep, ())})
    grouped = pick(layer.weight.unflatten(0, (layer.groups, -1)), {2: Kept(rows, (0,))})
    return nn.Parameter(restride(grouped.flatten(0, 1), layer.weight), layer.weight.requires_grad)


def _depthwise(layer: _Conv, keep: Mask) -> _Conv:
    times = layer.out_channels // layer.groups
    outputs = Kept(np.repeat(keep, times), ())
    tensors = {"weight": pick(layer.weight, {0: Kept(keep, ()) if layer.transposed else outputs})}
    if layer.bias is not None:
        tensors["bias"] = pick(layer.bias, {0: outputs})
    left = int(keep.sum())
    return _new(layer, tensors, in_channels=left, out_channels=times * left, groups=left)


def _norm(layer: _Layer, idxs: Iterable[int], kind: type) -> _Layer:
    _expect(layer, kind)
    size: Any = layer.num_features
    keep = _keep(idxs, size, layer, "channels")
    tensors = _along(layer, keep, weight=0, bias=0, running_mean=0, running_var=0)
    return _new(layer, tensors, num_features=int(keep.sum()))


def _along(layer: nn.Module, keep: Mask, **axes: int) -> dict[str, Tensor]:
    """The tensors that the layer has of these names, picked along one axis each."""
    own = {**layer._parameters, **layer._buffers}
    found = ((name, own.get(name), axis) for name, axis in axes.items())
    return {name: pick(tensor, {axis: Kept(keep, ())}) for name, tensor, axis in found if tensor is not None}


def _new(layer: _Layer, tensors: Mapping[str, Tensor], **attributes: Any) -> _Layer:
    """A copy of ``layer`` with other tensors and attributes."""
    new: Any = clone_module(layer, lambda name, old: tensors.get(name, pick(old, {})))
    new.__dict__.update(attributes)
    return new
