"""Layers narrowed by hand: each against the masked layer, or against slices written out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import difference, snapshot, stir
from torch import nn
from torch.nn.utils import parametrizations

import fxprune.nn
from fxprune import functional
from fxprune.errors import ChannelError

Prune = Callable[..., Any]


def without(size: int, idxs: list[int]) -> list[int]:
    return [i for i in range(size) if i not in idxs]


def pruned(kind: str, side: str, layer: Any, idxs: Any, **options: Any) -> Any:
    """The layer without the channels, after checks that hold for all of them."""
    before = snapshot(layer) if isinstance(layer, nn.Module) else layer.detach().clone()
    new = getattr(functional, f"prune_{kind}_{side}_channels")(layer, idxs, **options)
    if isinstance(layer, nn.Module):
        assert snapshot(layer) == before
        assert new.training == layer.training
        again = pickle.loads(pickle.dumps(new))
        assert difference(again.state_dict(), new.state_dict()) == 0
        kept = dict(new.named_parameters())
        for name, parameter in layer.named_parameters():
            assert kept[name].dtype == parameter.dtype
            assert kept[name].requires_grad == parameter.requires_grad
            assert kept[name].data_ptr() != parameter.data_ptr()
            assert isinstance(kept[name], nn.Parameter)
    else:
        assert torch.equal(layer, before)
        assert type(new) is type(layer)
    return new


def test_all_functions_are_there() -> None:
    kinds = "conv depthwise_conv batchnorm linear prelu layernorm embedding parameter multihead_attention"
    names = [
        f"prune_{k}_{s}_channels" for k in f"{kinds} groupnorm instancenorm".split() for s in ("out", "in")
    ]
    assert len(names) == 22
    assert all(callable(getattr(functional, name)) for name in names)
    assert {name for name in dir(functional) if name.startswith("prune_")} == set(names)


CONVS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {}),
    "2d": (nn.Conv2d, {"stride": 2, "padding": 1}),
    "3d": (nn.Conv3d, {"bias": False}),
    "transposed": (nn.ConvTranspose2d, {"stride": 2, "output_padding": 1}),
    "grouped": (nn.Conv2d, {"groups": 2}),
    "transposed-grouped": (nn.ConvTranspose2d, {"groups": 2}),
}


@pytest.mark.parametrize("name", CONVS)
def test_conv(name: str) -> None:
    """Against the layer itself on its surviving inputs and outputs."""
    build, options = CONVS[name]
    layer = build(6, 8, 3, **options).double().eval()
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 6, *[7] * (layer.weight.dim() - 2), dtype=torch.float64)
    gone = [1, 2, 4, 7]  # two of each half, not the same two
    new = pruned("conv", "out", layer, torch.tensor(gone))
    assert (new.in_channels, new.out_channels, new.groups) == (6, 4, layer.groups)
    assert difference(new(x), layer(x)[:, without(8, gone)]) < 1e-12
    gone = [2, 3]
    new = pruned("conv", "in", layer, gone)
    assert (new.in_channels, new.out_channels, new.groups) == (4, 8, layer.groups)
    x[:, gone] = 0
    assert difference(new(x[:, without(6, gone)]), layer(x)) < 1e-12


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("build", [nn.Conv2d, nn.ConvTranspose2d])
def test_depthwise_conv(build: Any, times: int) -> None:
    layer = build(5, 5 * times, 3, groups=5).double()
    x = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    outputs = [i * times + t for i in (0, 3) for t in range(times)]
    wanted = layer(x)[:, without(5 * times, outputs)]
    for new in (
        pruned("depthwise_conv", "in", layer, [0, 3]),
        pruned("depthwise_conv", "out", layer, outputs),
    ):
        assert (new.in_channels, new.out_channels, new.groups) == (3, 3 * times, 3)
        assert difference(new(x[:, [1, 2, 4]]), wanted) < 1e-12


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("batchnorm", nn.BatchNorm2d(6)),
        ("batchnorm", nn.BatchNorm2d(6, affine=False)),
        ("batchnorm", nn.BatchNorm2d(6, track_running_stats=False)),
        ("instancenorm", nn.InstanceNorm2d(6)),
        ("instancenorm", nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
        ("groupnorm", nn.GroupNorm(6, 6)),
        ("prelu", nn.PReLU(6)),
        ("prelu", nn.PReLU()),
    ],
    ids=str,
)
def test_channel_by_channel(kind: str, side: str, layer: nn.Module) -> None:
    """Layers that treat each channel by itself, in both modes."""
    layer = stir(copy.deepcopy(layer)).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    for mode in (False, True):
        layer.train(mode)
        new = pruned(kind, side, layer, [5, 0, 2])
        assert "6" not in repr(new)
        assert difference(new(x[:, [1, 3, 4]]), layer(x)[:, [1, 3, 4]]) < 1e-12


@pytest.mark.parametrize("side", ["in", "out"])
def test_norms_over_several_channels(side: str) -> None:
    """Their statistics run over what remains."""
    x = torch.randn(2, 6, 4)
    grouped = stir(nn.GroupNorm(2, 6))
    new = pruned("groupnorm", side, grouped, [1, 3])
    wanted = nn.functional.group_norm(
        x[:, [0, 2, 4, 5]], 2, grouped.weight[[0, 2, 4, 5]], grouped.bias[[0, 2, 4, 5]], grouped.eps
    )
    assert (new.num_channels, new.num_groups) == (4, 2)
    assert torch.equal(new(x[:, [0, 2, 4, 5]]), wanted)
    for layer in (nn.LayerNorm((6, 4)), nn.LayerNorm((6, 4), elementwise_affine=False), nn.RMSNorm((6, 4))):
        stir(layer)
        new = pruned("layernorm", side, layer, [1])
        assert tuple(new.normalized_shape) == (6, 3)
        assert new(x[..., [0, 2, 3]]).shape == (2, 6, 3)
        if layer.weight is not None:
            assert torch.equal(new.weight, layer.weight[:, [0, 2, 3]])
        if getattr(layer, "bias", None) is not None:
            assert torch.equal(new.bias, layer.bias[:, [0, 2, 3]])


def test_linear_embedding_parameter() -> None:
    linear = nn.Linear(5, 4).to(torch.bfloat16)
    new = pruned("linear", "out", linear, [0])
    assert torch.equal(new.weight, linear.weight[1:])
    assert torch.equal(new.bias, linear.bias[1:])
    new = pruned("linear", "in", linear, (i for i in (4, 1)))
    assert (new.in_features, new.out_features) == (3, 4)
    assert torch.equal(new.weight, linear.weight[:, [0, 2, 3]])
    assert torch.equal(new.bias, linear.bias)
    assert torch.equal(pruned("linear", "in", linear, []).weight, linear.weight)
    embedding = nn.Embedding(7, 4, padding_idx=2)
    for side in ("in", "out"):
        new = pruned("embedding", side, embedding, [3])
        assert (new.embedding_dim, new.padding_idx) == (3, 2)
        assert torch.equal(new.weight, embedding.weight[:, :3])
        token = nn.Parameter(torch.randn(1, 4, 3), requires_grad=False)
        assert torch.equal(pruned("parameter", side, token, [1]), token[..., [0, 2]])
        assert torch.equal(pruned("parameter", side, token.data, [0, 2], dim=1), token.data[:, [1, 3]])


def test_memory_format_and_flags() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2).to(memory_format=torch.channels_last).eval()
    for side in ("in", "out"):
        new = pruned("conv", side, layer, [1, 6])
        assert new.weight.is_contiguous(memory_format=torch.channels_last)
        assert not new.weight.is_contiguous()


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "batch_first": True}, {"add_bias_kv": True}, {"kdim": 5}, {"kdim": 5, "vdim": 3}],
    ids=str,
)
def test_multihead_attention(side: str, options: dict[str, Any]) -> None:
    """Each head loses a channel of its own; queries, keys and values are each cut from their own weights."""
    layer = stir(nn.MultiheadAttention(8, 2, **options)).double()
    gone, kept = [1, 6], [0, 2, 3, 4, 5, 7]
    new = pruned("multihead_attention", side, layer, gone)
    assert isinstance(new, fxprune.nn.MultiheadAttention)
    original = dict(layer.named_parameters())
    for name, part in new.named_parameters():
        if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            rows = original[name][kept]
            assert torch.equal(part, rows[:, kept] if name == "q_proj_weight" else rows)
    query = torch.randn(3, 3, 8, dtype=torch.float64)
    key = torch.randn(3, 3, layer.kdim, dtype=torch.float64)
    value = torch.randn(3, 3, layer.vdim, dtype=torch.float64)
    packed = layer.in_proj_weight is not None
    narrow = [t[..., kept] if packed or t is query else t for t in (query, key, value)]
    if packed:
        key, value = key.clone(), value.clone()
        key[..., gone], value[..., gone] = 0, 0
    query[..., gone] = 0
    with torch.no_grad():
        twin = copy.deepcopy(layer)  # the removed entries are zero
        for name, parameter in twin.named_parameters():
            if name in ("bias_k", "bias_v"):
                parameter[..., gone] = 0
            else:
                rows = [g + 8 * part for g in gone for part in range(parameter.shape[0] // 8)]
                parameter[rows] = 0
        wanted, weights = twin(query, key, value)
        got, other = new(*narrow)
    assert difference(got, wanted[..., kept]) < 1e-12
    assert difference(other, weights) < 1e-12
    again = pruned("multihead_attention", side, new, [0, 3])
    assert (again.qk_width, again.out_proj.in_features) == (4, 4)
    assert again.scale == layer.head_dim**-0.5
    assert torch.equal(again.out_proj.weight, new.out_proj.weight[[1, 2, 4, 5]][:, [1, 2, 4, 5]])


CONV, LINEAR = nn.Conv2d(4, 8, 3, groups=2), nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("function", "layer", "idxs", "message"),
    [
        ("linear_out", LINEAR, [3], r"has the output features 0 to 2; there are no \[3\] among them"),
        ("linear_in", LINEAR, [-1], r"has the input features 0 to 3; there are no \[-1\]"),
        ("linear_in", LINEAR, [1, 2, 1], r"\[1\] of Linear.* are named twice"),
        ("linear_out", LINEAR, [0, 1, 2], "all 3 output features .* at least one must stay"),
        ("linear_out", LINEAR, ["a"], "must be whole numbers"),
        ("linear_out", CONV, [0], "expected a layer of the kind Linear, got Conv2d"),
        ("conv_out", LINEAR, [0], "expected a layer of the kind ConvNd, got Linear"),
        ("conv_out", CONV, [0, 1], r"each of the 2 groups .* of its 4 output channels; .* \[2, 0\]"),
        ("conv_in", CONV, [3], r"each of the 2 groups .* \[0, 1\]"),
        ("conv_in", nn.Conv1d(3, 3, 1, groups=3), [0], "Use prune_depthwise_conv_out_channels"),
        ("depthwise_conv_in", CONV, [0], "is not depthwise: it has 2 groups for 4 input channels"),
        ("depthwise_conv_out", nn.Conv1d(3, 6, 1, groups=3), [2], r"2 output .* of \[2, 3\] only some"),
        ("batchnorm_out", nn.InstanceNorm1d(3), [0], "kind BatchNorm, got InstanceNorm1d"),
        ("groupnorm_in", nn.GroupNorm(2, 4), [0], r"each of the 2 groups"),
        ("layernorm_in", nn.LayerNorm((4, 2)), [2], "has the features 0 to 1"),
        ("embedding_out", nn.Embedding(9, 2), [5], "has the features 0 to 1"),
        ("parameter_in", torch.zeros(2, 3), [3], r"shape \(2, 3\) has the indices 0 to 2"),
        ("parameter_in", torch.zeros(()), [0], "no dimension -1"),
        ("multihead_attention_in", nn.MultiheadAttention(8, 2), [0, 1], r"2 heads .* equally many of its 4"),
        ("linear_out", parametrizations.weight_norm(nn.Linear(2, 2)), [0], "computes its weight"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be(function: str, layer: Any, idxs: Any, message: str) -> None:
    with pytest.raises(ChannelError, match=message):
        getattr(functional, f"prune_{function}_channels")(layer, idxs)
