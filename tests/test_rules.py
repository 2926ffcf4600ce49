"""Every operator rule against the oracle, and the parts that rules are made of against brute force."""

# The table has one case a line.
# ruff: noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops

import fxprune
from fxprune.coupling import interpreter
from fxprune.coupling.coupler import Coupler
from fxprune.coupling.registry import Rule, rule
from fxprune.coupling.rules import registered, rule_for
from fxprune.coupling.units import Axis, Label, Units, Value
from fxprune.errors import RuleError

aten = torch.ops.aten
Body = Callable[..., Any]

# The input of the network, by kind; the layer in front of the operator makes 12 channels of 3.
INPUTS = {
    "image": (2, 3, 4, 4),
    "volume": (2, 3, 4, 4, 4),
    "sequence": (2, 3, 8),
    "tokens": (2, 6, 3),
    "vector": (2, 3),
}


ROIS = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 0.0, 3.0, 3.0]])


@dataclass(frozen=True)
class Case:
    """One operator between two layers.

    Attributes:
        operators: the rules that the case is for, without ``aten.``; all of them must be applied.
        body: ``(x, *extra) -> y``.
        kind: key of :data:`INPUTS`.
        extra: shapes of further parameters that the body takes.
        buffers: shapes of further buffers (positive), after the parameters.
        shrinks: whether anything must be narrowed; False for rare forms that the rewriter does not know.
        batch: whether another batch size is possible.
        composite: the operator dissolves before it reaches the rules, unless autograd is out of the way.
        runs: whether the operator has a kernel for the processor, so that the result can be run.
        single: the operator runs in single precision only.
        parts: what a composite is to agree with, where that is not what it dissolves into.
        since: the oldest torch whose operator can be called so, and has shapes and derivatives.
    """

    operators: str
    body: Body
    kind: str = "image"
    extra: tuple[tuple[int, ...], ...] = ()
    buffers: tuple[tuple[int, ...], ...] = ()
    shrinks: bool = True
    batch: bool = True
    composite: bool = False
    runs: bool = True
    single: bool = False
    parts: Body | None = None
    since: str = "2.8"


class Between(nn.Module):
    """``first -> body -> flatten -> last``."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        shape = INPUTS[case.kind]
        layers = {"image": nn.Conv2d, "volume": nn.Conv3d, "sequence": nn.Conv1d}
        layer = layers.get(case.kind)
        self.first = layer(3, 12, 1) if layer is not None else nn.Linear(3, 12)
        self.body = case.body
        self.extra = nn.ParameterList(nn.Parameter(torch.randn(s)) for s in case.extra)
        self.tables = len(case.buffers)
        for i, size in enumerate(case.buffers):
            self.register_buffer(f"table{i}", torch.rand(size) + 0.5)
        x = torch.empty(shape, device="meta" if not case.runs else "cpu").normal_()
        self.last: nn.Module = nn.Identity()
        with torch.no_grad():
            self.to(x.device)
            self.last = nn.Linear(self(x).shape[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        tables = [getattr(self, f"table{i}") for i in range(self.tables)]
        return self.last(self.body(self.first(x), *self.extra, *tables).flatten(1))


def pick(index: list[int]) -> Tensor:
    """An index that the analysis can read."""
    return torch.tensor(index)


def line(x: Tensor, make: Callable[..., Tensor], *args: Any) -> Tensor:
    """``x`` of an image times a constant over its channels that is made in the graph."""
    return x * make(*args, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1)


def noise(x: Tensor, values: Tensor) -> Tensor:
    """``x`` plus nothing: random numbers are drawn, and do not show."""
    return x + 0 * values


REVERSED = [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]

CASES = [
    # pointwise ---------------------------------------------------------------------------------
    Case("<pointwise>", lambda x, w: torch.sigmoid(x) * 2 + w, extra=((12, 1, 1),)),
    Case("<pointwise>", lambda x: torch.where(x > 0, x, 0.5 * x)),
    Case("<pointwise>", lambda x: x.clone().mul_(2).add_(x)),
    Case("hardswish", lambda x: F.hardswish(x)),
    Case("_prelu_kernel", lambda x, w: F.prelu(x, w), extra=((12,),)),
    Case("log_sigmoid_forward", lambda x: F.logsigmoid(x)),
    Case("rsub", lambda x: torch.rsub(x, 1)),
    Case("floor_divide", lambda x: x + torch.floor_divide(x.detach(), 0.3)),
    Case("special_erfinv", lambda x: aten.special_erfinv.default(0.9 * torch.tanh(x)), composite=True),
    Case("celu", lambda x: F.celu(x)),
    Case("leaky_relu", lambda x: F.leaky_relu(x)),
    Case("rrelu_with_noise", lambda x: F.rrelu(x)),
    Case("dropout", lambda x: torch.dropout(x, 0.5, False), composite=True),
    Case("polar", lambda x: torch.polar(x, x).abs()),
    Case("complex", lambda x: torch.complex(x, 2 * x).abs()),
    Case("_conj", lambda x: (torch.complex(x, 2 * x).conj() * (1 + 1j)).abs()),
    Case("_conj_physical", lambda x: torch.conj_physical(torch.complex(x, 2 * x)).abs()),
    Case("real", lambda x: aten.real.default(x * 2), composite=True),
    Case("clone", lambda x: x.clone() + 1),
    Case("alias", lambda x: aten.alias.default(x) + 1),
    Case("detach", lambda x: x + x.detach()),
    Case("lift", lambda x: aten.lift.default(x) * 2),
    Case("lift_fresh", lambda x: aten.lift_fresh.default(x) * 2),
    Case("_to_copy", lambda x: x * x.argmax(2, keepdim=True).to(x.dtype)),
    Case("contiguous", lambda x: x.transpose(2, 3).contiguous(), composite=True),
    Case("copy", lambda x: x + aten.copy.default(x.detach(), (x * 3).detach())),
    Case("copy_", lambda x: torch.zeros_like(x).copy_(x * 3)),
    Case("fill", lambda x: x + aten.fill.Scalar(x, 0.5)),
    Case("fill_", lambda x: x * x.clone().fill_(0.5)),
    Case("fill_", lambda x: x * F.relu(x.clone().fill_(0.5)).sum(1, keepdim=True)),
    Case("zero_", lambda x: x + x.clone().zero_()),
    Case("uniform_", lambda x: noise(x, x.clone().uniform_())),
    Case("normal_", lambda x: noise(x, x.clone().normal_())),
    Case("bernoulli_", lambda x: noise(x, x.clone().bernoulli_(0.5))),
    Case("bernoulli", lambda x: noise(x, torch.bernoulli(x.sigmoid()))),
    Case("random_", lambda x: noise(x, x.clone().random_(0, 5))),
    Case("exponential_", lambda x: noise(x, x.clone().exponential_())),
    Case("native_dropout", lambda x: aten.native_dropout.default(x, 0.0, True)[0]),
    # constants ---------------------------------------------------------------------------------
    Case("arange", lambda x: line(x, torch.arange, x.shape[1])),
    Case("linspace", lambda x: line(x, torch.linspace, 0, 1, x.shape[1])),
    Case("logspace", lambda x: line(x, torch.logspace, 0, 1, x.shape[1])),
    Case("zeros", lambda x: x + line(x, torch.zeros, x.shape[1])),
    Case("ones", lambda x: line(x, torch.ones, x.shape[1])),
    Case("full", lambda x: line(x, torch.full, (x.shape[1],), 1.5)),
    Case("empty", lambda x: x * torch.empty(x.shape, dtype=x.dtype, device=x.device).fill_(1.5)),
    Case("empty_strided", lambda x: x * torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device).fill_(1.5), shrinks=False),
    Case("rand", lambda x: noise(x, line(x, torch.rand, x.shape[1]))),
    Case("randn", lambda x: noise(x, line(x, torch.randn, x.shape[1]))),
    Case("randint", lambda x: noise(x, torch.randint(5, x.shape, dtype=x.dtype, device=x.device)), shrinks=False),
    Case("randperm", lambda x: noise(x, line(x, torch.randperm, x.shape[1]))),
    Case("eye", lambda x: x @ torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), kind="tokens"),
    Case("scalar_tensor", lambda x: x * aten.scalar_tensor.default(2.0, dtype=x.dtype)),
    Case("tril_indices", lambda x: x + torch.tril_indices(x.shape[2], 3, device=x.device).sum()),
    Case("triu_indices", lambda x: x + torch.triu_indices(x.shape[2], 3, device=x.device).sum()),
    Case("new_empty", lambda x: x * x.new_empty(x.shape[1], 1, 1).fill_(1.5)),
    Case("new_zeros", lambda x: x + x.new_zeros(x.shape[1], 1, 1)),
    Case("new_ones", lambda x: x * x.new_ones(x.shape[1], 1, 1)),
    Case("new_full", lambda x: x * x.new_full((x.shape[1], 1, 1), 1.5)),
    Case("new_full", lambda x: x * x.new_full((12, 1, 1), 1.5)),
    Case("new_empty_strided", lambda x: x * x.new_empty_strided(x.size(), x.stride()).fill_(1.5), shrinks=False),
    Case("empty_like", lambda x: x * torch.empty_like(x).fill_(1.5)),
    Case("zeros_like", lambda x: x + torch.zeros_like(x)),
    Case("ones_like", lambda x: x * 2 + torch.ones_like(x)),
    Case("full_like", lambda x: x * torch.full_like(x, 1.5)),
    Case("rand_like", lambda x: noise(x, torch.rand_like(x))),
    Case("randn_like", lambda x: noise(x, torch.randn_like(x))),
    Case("randint_like", lambda x: noise(x, torch.randint_like(x, 5))),
    # movement ----------------------------------------------------------------------------------
    Case("view", lambda x: x.view(x.shape[0], 12, 16)),
    Case("view", lambda x: x.view(-1, 6, 4, 3).transpose(1, 2), kind="tokens"),
    Case("_unsafe_view", lambda x: aten._unsafe_view.default(x, (x.shape[0], 12, 16))),
    Case("reshape", lambda x: x.reshape(x.shape[0], 12, 16), composite=True),
    Case("_reshape_alias", lambda x: aten._reshape_alias.default(x, (2, 12, 16), (192, 16, 1)), batch=False,
         shrinks=False),
    Case("_reshape_copy", lambda x: aten._reshape_copy.default(x, (x.shape[0], 12, 16)), shrinks=False),
    Case("view_copy", lambda x: aten.view_copy.default(x, (x.shape[0], 12, 16))),
    Case("as_strided", lambda x: x.as_strided(x.size(), x.stride())),
    Case("as_strided_", lambda x: x.clone().as_strided_(x.size(), x.stride())),
    Case("t", lambda x: x.t().t(), kind="vector"),
    Case("transpose", lambda x: x.transpose(1, -1)),
    Case("transpose_copy", lambda x: aten.transpose_copy.int(x, 1, -1)),
    Case("swapaxes", lambda x: x.swapaxes(1, -1), composite=True),
    Case("permute", lambda x: x.permute(0, 2, 3, 1)),
    Case("permute_copy", lambda x: aten.permute_copy.default(x, (0, 2, -1, 1))),
    Case("unsqueeze", lambda x: x.unsqueeze(-1).unsqueeze(1)),
    Case("unsqueeze_copy", lambda x: aten.unsqueeze_copy.default(x, 1)),
    Case("squeeze", lambda x: x[:, None].squeeze(1)),
    Case("squeeze_copy", lambda x: aten.squeeze_copy.dim(x[:, None], 1)),
    Case("expand", lambda x: x[:, None].expand(-1, 3, -1, -1, -1)),
    Case("expand", lambda x: x[:, None].expand(x.shape[0], 3, 12, 4, 4)),
    Case("expand_copy", lambda x: aten.expand_copy.default(x[:, None], (-1, 3, -1, -1, -1))),
    Case("slice", lambda x: x[:, 2:9]),
    Case("slice", lambda x: x[:, 1::3]),
    Case("slice_copy", lambda x: aten.slice_copy.Tensor(x, 1, 2, 9), shrinks=False),
    Case("select", lambda x: x[:, 3]),
    Case("select", lambda x: x.select(2, 1)),
    Case("select_copy", lambda x: aten.select_copy.int(x, 2, 1)),
    Case("unbind", lambda x: x.unbind(2)[1]),
    Case("unbind_copy", lambda x: aten.unbind_copy.int(x, 2)[1]),
    Case("split", lambda x: x.split(5, 1)[1]),
    Case("split", lambda x: torch.cat(x.split(5, 1)[::-1], 1)),
    Case("split_copy", lambda x: aten.split_copy.Tensor(x, 5, 1)[1], shrinks=False),
    Case("split_with_sizes", lambda x: x.split([5, 4, 3], 1)[1]),
    Case("unsafe_split", lambda x: torch.cat(x.unsafe_split(6, 1)[::-1], 1)),
    Case("unsafe_split_with_sizes", lambda x: x.unsafe_split_with_sizes([5, 4, 3], 1)[1]),
    Case("split_with_sizes_copy", lambda x: aten.split_with_sizes_copy.default(x, [5, 4, 3], 1)[1], shrinks=False),
    Case("chunk", lambda x: x.chunk(5, 1)[1], composite=True),
    Case("flip", lambda x: x.flip(1, 3)),
    Case("roll", lambda x: x.roll(5, 1)),
    Case("roll", lambda x: x.roll((1, 2), (1, 2))),
    Case("roll", lambda x: x.roll(3), shrinks=False, batch=False),
    Case("glu", lambda x: F.glu(x, 1)),
    Case("glu", lambda x: F.glu(x, 2)),
    Case("repeat", lambda x: x.repeat(1, 3, 1, 1)),
    Case("repeat", lambda x: x.repeat(1, 1, 1, 2)),
    Case("index_select", lambda x: x.index_select(1, pick([3, 1, 7, 7]))),
    Case("take_along_dim", lambda x: torch.take_along_dim(x, pick([[[[3], [1]]]]), 2)),
    Case("take_along_dim", lambda x: torch.take_along_dim(x, pick([[[[3]], [[1]]]]), 1), shrinks=False),
    Case("take_along_dim", lambda x: torch.take_along_dim(x, pick([3, 1])).expand(2, 2), shrinks=False, batch=False),
    Case("index", lambda x: x[:, pick(REVERSED)]),
    Case("index", lambda x: x[:, :, pick([0, 1]), pick([1, 3])]),
    Case("_unsafe_index", lambda x: aten._unsafe_index.Tensor(x, [None, pick([3, 1, 7, 7])])),
    Case("cat", lambda x: torch.cat([x, x[:, 3:5], 2 * x], 1)),
    Case("cat", lambda x: torch.cat([x, 2 * x], 2)),
    Case("concat", lambda x: torch.concat([x, x[:, 3:5]], 1), composite=True),
    Case("stack", lambda x: torch.stack([x, 2 * x], 1)),
    Case("constant_pad_nd", lambda x: F.pad(x, (1, 1))),
    Case("constant_pad_nd", lambda x: F.pad(x, (2, 3), value=0.5), kind="tokens"),
    Case("reflection_pad1d", lambda x: F.pad(x, (2, 1), "reflect"), kind="sequence"),
    Case("reflection_pad2d", lambda x: F.pad(x, (2, 1, 1, 1), "reflect")),
    Case("reflection_pad3d", lambda x: F.pad(x, (2, 1, 1, 1, 0, 1), "reflect"), kind="volume"),
    Case("replication_pad1d", lambda x: F.pad(x, (2, 1), "replicate"), kind="sequence"),
    Case("replication_pad2d", lambda x: F.pad(x, (2, 1, 1, 1), "replicate")),
    Case("replication_pad3d", lambda x: F.pad(x, (2, 1, 1, 1, 0, 1), "replicate"), kind="volume"),
    Case("pixel_shuffle", lambda x, w: F.conv2d(F.pixel_shuffle(x, 2), w), extra=((4, 3, 1, 1),)),
    Case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2)),
    Case("channel_shuffle", lambda x: F.channel_shuffle(x, 3)),
    Case("native_channel_shuffle", lambda x: torch.native_channel_shuffle(x, 3), composite=True,
         parts=lambda x: torch.channel_shuffle(x, 3)),
    Case("slice_scatter", lambda x, w: torch.slice_scatter(x, w.expand(x.shape[0], -1, 4, 4), 1, 4, 6),
         extra=((1, 2, 1, 1),)),
    Case("select_scatter", lambda x, w: torch.select_scatter(x, w.expand(x.shape[0], 4, 4), 1, 4), extra=((1, 1, 1),)),
    # contraction -------------------------------------------------------------------------------
    Case("mm", lambda x, w: torch.mm(x, w), kind="vector", extra=((12, 7),)),
    Case("bmm", lambda x, w: torch.bmm(x, w.expand(x.shape[0], -1, -1)), kind="tokens", extra=((1, 12, 7),)),
    Case("bmm", lambda x: torch.bmm(x, x.transpose(1, 2)), kind="tokens"),
    Case("mv", lambda x, w: torch.mv(x, w)[:, None], kind="vector", extra=((12,),)),
    Case("dot", lambda x, a, b: x * torch.dot(a, b), extra=((7,), (7,))),
    Case("vdot", lambda x, a, b: x * torch.vdot(a, b), extra=((7,), (7,))),
    Case("addmm", lambda x, b, w: torch.addmm(b, x, w), kind="vector", extra=((7,), (12, 7))),
    Case("addmv", lambda x, b, w: torch.addmv(b, x, w)[:, None], kind="vector", extra=((1,), (12,))),
    Case("baddbmm", lambda x, b, w: torch.baddbmm(b, x, w.expand(x.shape[0], -1, -1)), kind="tokens",
         extra=((1, 1, 7), (1, 12, 7))),
    Case("addbmm", lambda x, b, w: torch.addbmm(b, x, w), kind="tokens", extra=((6, 7), (2, 12, 7)), batch=False),
    Case("linear", lambda x, w, b: F.linear(x, w, b), kind="tokens", extra=((7, 12), (7,)), composite=True),
    Case("convolution", lambda x, w, b: F.conv2d(x, w, b, padding=1), extra=((7, 12, 3, 3), (7,))),
    Case("convolution", lambda x, w, b: F.conv2d(x, w, b, groups=3), extra=((6, 4, 1, 1), (6,))),
    Case("convolution", lambda x, w, b: F.conv2d(x, w, b, groups=12), extra=((24, 1, 3, 3), (24,))),
    Case("convolution", lambda x, w, b: F.conv_transpose2d(x, w, b), extra=((12, 7, 3, 3), (7,))),
    Case("convolution", lambda x, w, b: F.conv_transpose2d(x, w, b, groups=3), extra=((12, 2, 3, 3), (6,))),
    Case("_convolution", lambda x, w, b: aten._convolution.default(
        x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, False, False, False, False), extra=((7, 12, 3, 3), (7,)), since="2.14"),
    Case("embedding", lambda x, w: F.embedding(x.argmax(1), w), kind="tokens", extra=((6, 8),)),
    Case("_grouped_mm", lambda x, w: aten._grouped_mm(
        F.pad(x, (0, 4)).bfloat16(), w.bfloat16(), aten.arange.default(2, dtype=torch.int32) + 1).float(),
         kind="vector", extra=((2, 16, 8),), batch=False, runs=False),
    # normalisation and reduction ---------------------------------------------------------------
    Case("_fft_r2c _fft_c2r", lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=x.shape[-2:])),
    Case("_fft_c2c", lambda x: torch.fft.fft2(torch.fft.ifft2(x.to(torch.complex128)) * 2).abs()),
    Case("view_as_complex view_as_real",
         lambda x: torch.view_as_real(torch.view_as_complex(torch.stack([x, x * 2], -1)) * 2).sum(-1)),
    Case("topk", lambda x: aten.topk.default(x, 2, 2)[0], kind="sequence", batch=False),
    Case("sort", lambda x: aten.sort.default(x, 2)[0] + aten.sort.stable(x, stable=True, dim=2)[0], kind="sequence"),
    Case("kthvalue", lambda x: aten.kthvalue.default(x, 2, 2)[0], kind="sequence"),
    Case("median.dim", lambda x: aten.median.dim(x, 2)[0], kind="sequence"),
    Case("mode", lambda x: aten.mode.default(x, 2)[0], kind="sequence"),
    Case("native_batch_norm", lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, training=True),
         extra=((12,), (12,)), buffers=((12,), (12,))),
    Case("native_batch_norm", lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b),
         extra=((12,), (12,)), buffers=((12,), (12,))),
    Case("cudnn_batch_norm", lambda x, w, b, m, v: aten.cudnn_batch_norm.default(x, w, b, m, v, True, 0.1, 1e-5)[0],
         extra=((12,), (12,)), buffers=((12,), (12,)), runs=False),
    Case("_native_batch_norm_legit",
         lambda x, w, b, m, v: aten._native_batch_norm_legit.default(x, w, b, m, v, True, 0.1, 1e-5)[0],
         extra=((12,), (12,)), buffers=((12,), (12,))),
    Case("_native_batch_norm_legit_functional",
         lambda x, w, b, m, v: aten._native_batch_norm_legit_functional.default(x, w, b, m, v, True, 0.1, 1e-5)[0],
         extra=((12,), (12,)), buffers=((12,), (12,))),
    Case("_native_batch_norm_legit_no_training",
         lambda x, w, b, m, v: aten._native_batch_norm_legit_no_training.default(x, w, b, m, v, 0.1, 1e-5)[0],
         extra=((12,), (12,)), buffers=((12,), (12,))),
    Case("_batch_norm_with_update",
         lambda x, w, b, m, v: aten._batch_norm_with_update.default(x, w, b, m, v, 0.1, 1e-5)[0],
         extra=((12,), (12,)), buffers=((12,), (12,))),
    Case("_batch_norm_no_update",
         lambda x, w, b, m, v: aten._batch_norm_no_update.default(x, w, b, m, v, 0.1, 1e-5)[0],
         extra=((12,), (12,)), buffers=((12,), (12,))),
    Case("native_layer_norm", lambda x, w, b: F.layer_norm(x, (12,), w, b), kind="tokens", extra=((12,), (12,))),
    Case("native_layer_norm", lambda x: F.layer_norm(x, (12,)), kind="tokens"),
    Case("_fused_rms_norm", lambda x, w: aten._fused_rms_norm.default(x, (12,), w, 1e-5)[0], kind="tokens",
         extra=((12,),), composite=True, since="2.11"),
    Case("rms_norm", lambda x, w: F.rms_norm(x, (12,), w), kind="tokens", extra=((12,),), composite=True),
    Case("_embedding_bag_forward_only", lambda x, w: x + F.embedding_bag(pick([[1, 2]]), w), kind="vector", extra=((5, 12),)),
    Case("_embedding_bag", lambda x, w: x + aten._embedding_bag.default(w, pick([1, 2]), pick([0]))[0], kind="vector",
         extra=((5, 12),)),
    Case("embedding_renorm_", lambda x, w: x + F.embedding(pick([[1, 2]]), w, max_norm=0.5).mean(1), kind="vector",
         extra=((5, 12),)),
    Case("_trilinear", lambda x, w, b: F.bilinear(x, 2 * x, w, b), kind="vector", extra=((8, 12, 12), (8,))),
    Case("col2im", lambda x: F.fold(x.flatten(2), (5, 5), 2)),
    Case("_weight_norm_interface", lambda x, v, g: F.conv2d(x, aten._weight_norm_interface.default(v, g, 0)[0]),
         extra=((12, 12, 1, 1), (12, 1, 1, 1))),
    Case("_weight_norm", lambda x, v, g: torch._weight_norm(v, g, 0), extra=((12, 8), (12, 1)), composite=True),
    Case("native_group_norm", lambda x, w, b: F.group_norm(x, 3, w, b), extra=((12,), (12,))),
    Case("native_group_norm", lambda x: F.group_norm(x, 1)),
    Case("_softmax", lambda x: F.softmax(x, 2)),
    Case("_softmax", lambda x: F.softmax(x, 1)),
    Case("softmax", lambda x: F.softmax(x, 2), composite=True),
    Case("_log_softmax", lambda x: F.log_softmax(x, 2)),
    Case("log_softmax", lambda x: F.log_softmax(x, 2), composite=True),
    Case("_safe_softmax", lambda x: aten._safe_softmax.default(x, 2)),
    Case("cumsum", lambda x: x.cumsum(2)),
    Case("cumsum", lambda x: x.cumsum(1)),
    Case("cumprod", lambda x: x.cumprod(2)),
    Case("logcumsumexp", lambda x: x.logcumsumexp(2)),
    Case("sum", lambda x: x.sum(2)),
    Case("sum", lambda x: x * x.sum(1, keepdim=True)),
    Case("mean", lambda x: x.mean((2, 3))),
    Case("mean", lambda x: x - x.mean(1, keepdim=True)),
    Case("amax", lambda x: x.amax(2)),
    Case("amin", lambda x: x.amin(2)),
    Case("amax", lambda x: x - x.amax(1, keepdim=True)),
    Case("var", lambda x: x.var(2)),
    Case("var", lambda x: x / x.var(1, keepdim=True)),
    Case("std", lambda x: x.std(2)),
    Case("var_mean", lambda x: torch.var_mean(x, 2)[0]),
    Case("std_mean", lambda x: torch.std_mean(x, 2)[0]),
    Case("prod", lambda x: x.prod(2)),
    Case("norm", lambda x: aten.norm.ScalarOpt_dim(x, 2, [2])),
    Case("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, dim=2)),
    Case("linalg_vector_norm", lambda x: F.normalize(x, dim=1)),
    Case("logsumexp", lambda x: x.logsumexp(2)),
    Case("any", lambda x: x * (x > 0).any(2, keepdim=True)),
    Case("all", lambda x: x * (x > 0).all(2, keepdim=True)),
    Case("max.dim", lambda x: x.max(2)[0]),
    Case("min.dim", lambda x: x.min(2)[0]),
    Case("max.default", lambda x: x - x.max()),
    Case("min.default", lambda x: x - x.min()),
    Case("aminmax", lambda x: torch.aminmax(x, dim=2)[0], since="2.14"),
    Case("argmax", lambda x: x.argmax(2) * x[:, :, 0]),
    Case("argmin", lambda x: x.argmin(2) * x[:, :, 0]),
    Case("argmax", lambda x: x.argmax(1, keepdim=True) * x, shrinks=False),
    # quantisation ------------------------------------------------------------------------------
    Case("fake_quantize_per_tensor_affine_cachemask", lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 255)),
    Case("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", lambda x, s: torch.fake_quantize_per_tensor_affine(x, s, s.int(), 0, 255), buffers=((1,),), single=True),
    Case("fake_quantize_per_channel_affine_cachemask", lambda x, s: torch.fake_quantize_per_channel_affine(x, s, s.int(), 1, 0, 255), buffers=((12,),), single=True),
    Case("_fake_quantize_learnable_per_tensor_affine", lambda x, s, z: torch._fake_quantize_learnable_per_tensor_affine(x, s, z, 0, 255), extra=((1,), (1,)), single=True),
    Case("_fake_quantize_learnable_per_channel_affine", lambda x, s, z: torch._fake_quantize_learnable_per_channel_affine(x, s, z, 1, 0, 255), extra=((12,), (12,)), single=True),
    Case("_fused_moving_avg_obs_fq_helper", lambda x, on, low, high, s, z: torch.fused_moving_avg_obs_fake_quant(x, on, on, low, high, s, z.int(), 0.1, 0, 255, 1, True), buffers=((1,), *(4 * [(12,)])), single=True),
    # looked up, scattered ----------------------------------------------------------------------
    Case("gather", lambda x: x.gather(2, x.argsort(2))),
    Case("gather", lambda x: x.gather(3, pick([1, 0, 3, 3])[None, None, None].expand(*x.shape[:3], -1)), since="2.11"),
    Case("gather", lambda x: x * x.gather(1, x.argmax(1, keepdim=True)), shrinks=False),
    Case("scatter", lambda x: x.scatter(2, x.argsort(2), 2 * x)),
    Case("scatter", lambda x: x.scatter(3, x.argmax(3, keepdim=True), 0.5)),
    Case("scatter", lambda x: x.scatter(1, x.argmax(1, keepdim=True), 0.5), shrinks=False),
    Case("scatter_add", lambda x: torch.zeros_like(x).scatter_add_(2, x.argsort(2), x)),
    Case("scatter_add", lambda x, w: x * w.scatter_add(0, pick([[0], [0]]).expand(-1, 12), w)[0], kind="tokens",
         extra=((2, 12),)),
    Case("scatter_reduce", lambda x: x.scatter_reduce(2, x.argsort(2), x, "amax", include_self=False)),
    Case("index_add", lambda x: torch.zeros_like(x).index_add(2, pick([3, 1, 1, 0]), x)),
    Case("index_add", lambda x: x.index_add(1, pick([3]), x[:, :1]), shrinks=False),
    Case("index_copy", lambda x: x.index_copy(3, pick([3, 1]), x[..., :2])),
    Case("index_reduce", lambda x: x.index_reduce(3, pick([3, 1, 0, 0]), x, "mean")),
    Case("index_fill", lambda x: x.index_fill(3, pick([3, 1]), 0.5)),
    Case("index_put", lambda x: x.index_put((pick([0, 1]),), x[:2]), batch=False),
    Case("index_put", lambda x: aten.index_put.default(x, [None, None, pick([0, 2])], x[:, :, :2]), batch=False),
    Case("index_put", lambda x: aten.index_put.default(x, [None, None, pick([0]), pick([2])], x[:, :, 0, :1])),
    Case("index_put", lambda x: aten.index_put.default(x, [pick([0]), None, pick([2])], x[:1, :, 0]), batch=False),
    Case("index_put", lambda x, w: aten.index_put.default(x, [None, pick([5])], w), extra=((1, 4, 4),), shrinks=False),
    Case("index_put", lambda x: x.index_put((x > 0.2,), torch.tensor(0.5, dtype=x.dtype))),
    Case("index_put", lambda x, w: x.index_put((x[..., 0] > 0.2,), w), kind="tokens", extra=((12,),)),
    Case("_index_put_impl_", lambda x: aten._index_put_impl_.default(x.clone(), [pick([1])], x[:1]), batch=False),
    Case("grid_sampler_2d", lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False)),
    Case("grid_sampler_2d", lambda x, w: F.grid_sample(x, w.expand(x.shape[0], -1, -1, -1), align_corners=True),
         extra=((1, 3, 5, 2),)),
    Case("grid_sampler_3d", lambda x, w: F.grid_sample(x, w.expand(x.shape[0], -1, -1, -1, -1), align_corners=False),
         kind="volume", extra=((1, 2, 2, 2, 3),)),
    Case("bucketize", lambda x, b: x * torch.bucketize(x, b), buffers=((3,),)),
    Case("searchsorted", lambda x, b: x * torch.searchsorted(b, x), buffers=((3,),)),
    Case("tril", lambda x: x.tril()),
    Case("triu", lambda x: x.triu(1)),
    Case("tril", lambda x: x.tril(), kind="tokens", shrinks=False),
    Case("diagonal", lambda x: x.diagonal(dim1=2, dim2=3)),
    Case("diagonal", lambda x: x.diagonal(1, 2, 1), shrinks=False),
    Case("diag_embed", lambda x: torch.diag_embed(x[..., 0])),
    Case("diag_embed", lambda x: torch.diag_embed(x[..., 0], 1, 1, 3)),
    Case("rot90", lambda x: x.rot90(1, (2, 3))),
    Case("rot90", lambda x: x.rot90(2, (1, 3)), shrinks=False),
    Case("unfold", lambda x: x.unfold(2, 2, 1)),
    Case("unfold", lambda x: x.unfold(1, 3, 3), shrinks=False),
    Case("cummax", lambda x: x.cummax(2)[0]),
    Case("cummin", lambda x: x * x.cummin(2)[1]),
    Case("cummax", lambda x: x.cummax(1)[0], shrinks=False),
    # matrices ----------------------------------------------------------------------------------
    Case("linalg_inv_ex _linalg_check_errors", lambda x: torch.linalg.inv(x + 9 * torch.eye(4, dtype=x.dtype))),
    Case("_linalg_solve_ex", lambda x: torch.linalg.solve(x + 9 * torch.eye(4, dtype=x.dtype), x[..., :2])),
    Case("_linalg_solve_ex", lambda x: torch.linalg.solve(x + 9 * torch.eye(4, dtype=x.dtype), x[..., 0])),
    Case("linalg_matrix_exp", lambda x: torch.linalg.matrix_exp(0.1 * x)),
    Case("_linalg_det", lambda x: torch.linalg.det(x)),
    Case("_linalg_slogdet", lambda x: torch.linalg.slogdet(x)[0]),
    Case("_linalg_eigh", lambda x: torch.linalg.eigvalsh(x @ x.mT)),
    Case("_linalg_svd", lambda x: torch.linalg.svdvals(x)),
    Case("linalg_qr", lambda x: torch.linalg.qr(x + 9 * torch.eye(4, dtype=x.dtype))[1].abs()),
    Case("linalg_cholesky_ex", lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(4, dtype=x.dtype))),
    Case("linalg_inv_ex", lambda x, w: x @ torch.linalg.inv(w), kind="tokens", extra=((12, 12),), shrinks=False),
    Case("linalg_cross", lambda x: torch.linalg.cross(x[..., :3], x[..., 1:], dim=3)),
    Case("_cdist_forward", lambda x: torch.cdist(x, 2 * x[:, :, :2])),
    Case("_cdist_forward", lambda x, w: torch.cdist(x, w), kind="tokens", extra=((5, 12),)),
    Case("_cdist_forward", lambda x, w: torch.cdist(x.sigmoid(), w), kind="tokens", extra=((5, 12),)),
    Case("nansum", lambda x: x.nansum(2)),
    Case("nansum", lambda x: x * x.nansum(1, keepdim=True)),
    Case("count_nonzero", lambda x: x * x.count_nonzero(2)[:, :, None]),
    Case("count_nonzero", lambda x: x * x.count_nonzero(1)[:, None]),
    # pooling and resampling --------------------------------------------------------------------
    Case("avg_pool1d", lambda x: F.avg_pool1d(x, 2), kind="sequence", composite=True),
    Case("avg_pool2d", lambda x: F.avg_pool2d(x, 2)),
    Case("avg_pool3d", lambda x: F.avg_pool3d(x, 2), kind="volume"),
    Case("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), kind="sequence", composite=True),
    Case("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 3), composite=True),
    Case("_adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 3)),
    Case("_adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 3), kind="volume"),
    Case("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 3)),
    Case("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 3), kind="volume"),
    # An image of 4 with an output of 3 leaves the random offsets no choice.
    Case("fractional_max_pool2d", lambda x: F.fractional_max_pool2d(x, 2, output_size=3)),
    Case("fractional_max_pool3d", lambda x: F.fractional_max_pool3d(x, 3, output_size=1), kind="volume"),
    Case("max_unpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
    Case("max_unpool3d", lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), kind="volume"),
    Case("mse_loss", lambda x: x * F.mse_loss(x, x.tanh())),
    Case("mse_loss", lambda x: x * F.mse_loss(x, x.tanh(), reduction="sum")),
    Case("mse_loss", lambda x: F.mse_loss(x, x.tanh(), reduction="none")),
    Case("smooth_l1_loss", lambda x: x * F.smooth_l1_loss(x, x.sigmoid(), reduction="sum")),
    Case("huber_loss", lambda x: F.huber_loss(x, x.tanh(), reduction="none")),
    Case("binary_cross_entropy", lambda x: x * F.binary_cross_entropy(x.sigmoid(), x.sigmoid().detach())),
    Case("binary_cross_entropy_with_logits", lambda x: x * F.binary_cross_entropy_with_logits(x, x.sigmoid(), reduction="sum")),
    Case("max_pool1d", lambda x: F.max_pool1d(x, 2), kind="sequence", composite=True),
    Case("max_pool2d", lambda x: F.max_pool2d(x, 2), composite=True),
    Case("max_pool2d_with_indices", lambda x: F.max_pool2d(x, 2)),
    Case("max_pool3d_with_indices", lambda x: F.max_pool3d(x, 2), kind="volume"),
    Case("upsample_nearest1d", lambda x: F.interpolate(x, scale_factor=2), kind="sequence"),
    Case("upsample_nearest2d", lambda x: F.interpolate(x, scale_factor=2)),
    Case("upsample_nearest3d", lambda x: F.interpolate(x, scale_factor=2), kind="volume"),
    Case("_upsample_nearest_exact1d", lambda x: F.interpolate(x, 5, mode="nearest-exact"), kind="sequence"),
    Case("_upsample_nearest_exact2d", lambda x: F.interpolate(x, 5, mode="nearest-exact")),
    Case("_upsample_nearest_exact3d", lambda x: F.interpolate(x, 5, mode="nearest-exact"), kind="volume"),
    Case("upsample_linear1d", lambda x: F.interpolate(x, 5, mode="linear"), kind="sequence"),
    Case("upsample_bilinear2d", lambda x: F.interpolate(x, 5, mode="bilinear")),
    Case("_upsample_bilinear2d_aa", lambda x: F.interpolate(x, (3, 3), mode="bilinear", antialias=True)),
    Case("upsample_bicubic2d", lambda x: F.interpolate(x, 5, mode="bicubic")),
    Case("_upsample_bicubic2d_aa", lambda x: F.interpolate(x, (3, 3), mode="bicubic", antialias=True)),
    Case("upsample_trilinear3d", lambda x: F.interpolate(x, 5, mode="trilinear"), kind="volume"),
    Case("im2col", lambda x: F.unfold(x, 2)),
    Case("torchvision.roi_align", lambda x: ops.roi_align(x, ROIS.type_as(x), 2), batch=False),
    Case("torchvision.roi_pool", lambda x: ops.roi_pool(x, ROIS.type_as(x), 2), batch=False),
    Case("torchvision.ps_roi_align", lambda x: ops.ps_roi_align(x, ROIS.type_as(x), 2), batch=False),
    Case("torchvision.ps_roi_pool", lambda x: ops.ps_roi_pool(x, ROIS.type_as(x), (1, 3)), batch=False),
    Case("index", lambda x: x.permute(0, 2, 3, 1)[x[:, 0] > -9].mean(0, keepdim=True), batch=False),
    Case("nonzero index", lambda x: x.flatten(2)[..., (x[0, 0].flatten() > -9).nonzero()[:, 0]]),
    Case("torchvision.nms", lambda x: x[torch.ops.torchvision.nms(ROIS[:, 1:].type_as(x), x[:, 0, 0, 0], 0.3)], batch=False),
    Case("torchvision.deform_conv2d", lambda x, w, o: ops.deform_conv2d(x, o, w), extra=((8, 12, 3, 3), (2, 18, 2, 2)), batch=False),
    Case("torchvision.deform_conv2d", lambda x, w, o, m, b: ops.deform_conv2d(x, o, w, b, mask=m), extra=((8, 12, 3, 3), (2, 18, 2, 2), (2, 9, 2, 2), (8,)), batch=False),
    Case("torchvision.deform_conv2d", lambda x, w, o: ops.deform_conv2d(x, o, w), extra=((9, 4, 2, 2), (2, 8, 3, 3)), batch=False),
    Case("torchvision.deform_conv2d", lambda x, w, o: ops.deform_conv2d(x, o, w), extra=((8, 12, 2, 2), (2, 16, 3, 3)), batch=False),
]  # fmt: skip


def _ids() -> list[str]:
    seen: dict[str, int] = {}
    ids = []
    for case in CASES:
        seen[case.operators] = seen.get(case.operators, 0) + 1
        ids.append(case.operators + (f" {seen[case.operators]}" if seen[case.operators] > 1 else ""))
    return ids


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the rules that the analysis applies during the test."""
    names: set[str] = set()

    def recording(operator: Any) -> Rule | None:
        found = rule_for(operator)
        if found is not None:
            names.add(found.operator.removeprefix("aten."))
        return found

    monkeypatch.setattr(interpreter, "rule_for", recording)
    return names


@pytest.mark.parametrize("case", CASES, ids=_ids())
def test_rule(case: Case, applied: set[str]) -> None:
    """One operator between two layers: the rule is applied, and the oracle agrees with it."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < tuple(map(int, case.since.split("."))):
        pytest.skip(f"needs torch {case.since}")
    model, x = Between(case), torch.randn(INPUTS[case.kind])
    if not case.runs:
        with torch.device("meta"):
            groups = fxprune.analyze(model, x.to("meta")).groups
        assert any(group.name == "first.weight[0]" for group in groups)
    elif case.composite:
        assert set(case.operators.split()) <= agree(case)
        return
    elif case.single:
        plan = fxprune.plan(model, x)
        pruned = plan.apply(model)
        assert pruned.first.out_channels == 6
        fxprune.verify(model, pruned, plan, x, dtype=torch.float32, tolerance=1e-2)
    else:
        check(model, x, shrinks=case.shrinks, batch_dim=0 if case.batch else None)
    assert set(case.operators.split()) <= applied


class Apply(TorchDispatchMode):
    """Applies the rules to whatever arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.coupler = Coupler()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = rule_for(func)
        assert found is not None, f"{func} has no rule"
        self.coupler.operator = func._schema.name.removeprefix("aten::")
        found.apply(self.coupler, args, kwargs or {}, out)
        self.names.add(found.operator.removeprefix("aten."))
        return out


def agree(case: Case) -> set[str]:
    """Names of the rules applied to a composite; its rule must do what its parts do together."""
    shape = list(INPUTS[case.kind])
    channel = len(shape) - 1 if case.kind in ("tokens", "vector") else 1
    shape[channel] = 12
    results = []
    for whole in (True, False):
        mode = Apply()
        with torch.inference_mode(whole), torch.no_grad():
            tensors = [torch.empty(size, device="meta") for size in (shape, *case.extra)]
            for tensor in tensors:
                value = mode.coupler.value(tensor)
                for dim, size in enumerate(tensor.shape):
                    if size > 1 and (tensor is not tensors[0] or dim == channel):
                        value.labels[dim] = Label(mode.coupler.units.fresh(size), (), Axis("input", dim))
            known = np.arange(mode.coupler.units.count)
            with mode:
                out = (case.body if whole or case.parts is None else case.parts)(*tensors)
        outs = [mode.coupler.value(t) for t in (out if isinstance(out, tuple) else (out,))]
        find = mode.coupler.units.find
        labels = [
            None if label is None else (find(label.ids).tolist(), label.over, label.zero)
            for value in outs
            for label in (value.label(d) for d in range(len(value.shape)))
        ]
        inexact = [find(event.ids).tolist() for event in mode.coupler.inexact]
        frozen = sorted({u for event in mode.coupler.frozen for u in find(event.ids).reshape(-1).tolist()})
        results.append((labels, find(known).tolist(), bool(inexact), frozen))
        if whole:
            names = mode.names
    assert results[0] == results[1]
    return names


def test_inference_mode_changes_nothing() -> None:
    """Operators stay whole in inference mode; the groups must be the same."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 4)
    )
    x = torch.randn(2, 3, 4, 4)
    plans = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            plans.append(fxprune.plan(model, x))  # on one line, which the notes name
    assert plans[0].removed
    assert plans[0] == plans[1]


def test_a_shuffle_before_a_flatten_is_a_permutation() -> None:
    """A channel shuffle ties nothing, whatever view comes next."""

    def shuffle(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 3, 4, 4, 4).transpose(1, 2).reshape(x.shape[0], 12, 4, 4)

    _, pruned = check(Between(Case("view", shuffle)), torch.randn(2, 3, 4, 4))
    assert pruned.get_parameter("first.weight").shape[0] == 6
    plan = fxprune.plan(Between(Case("view", shuffle)), torch.randn(2, 3, 4, 4))
    assert plan.sizes == {"first.weight[0]": 12}


_OF_OTHER_LIBRARIES = {"transformers.grouped_mm_fallback"}
"""Operators that are there once a library has been imported that these tests do without."""


def _is_loaded(name: str) -> bool:
    """Whether the library of an operator is there; some rules are for libraries that tests do without."""
    library, operator, *_ = name.split(".")
    return operator.startswith("<") or hasattr(getattr(torch.ops, library), operator)


def _mixed(x: Tensor, weight: Tensor) -> Tensor:
    """Numbers that are computed from all channels, as many as the weight has columns."""
    return x.mean((2, 3)) @ weight


@pytest.mark.parametrize(
    ("body", "columns", "reason"),
    [
        (lambda x, w: ops.roi_align(x, _mixed(x, w), 2), 5, "coordinates of regions"),
        (lambda x, w: ops.ps_roi_align(x, _mixed(x, w), 2), 5, "coordinates of regions"),
        (lambda x, w: x[torch.ops.torchvision.nms(_mixed(x, w), x[:, 0, 0, 0], 0.5)], 4, "boxes that are compared"),
        (lambda x, w: x + torch.ops.torchvision.nms(x[0, 0], _mixed(x, w)[0], 0.5).sum(), 4, "scores of boxes"),
        (lambda x, w: _deformed(x, _mixed(x, w)), 18, "offsets"),
        (lambda x, w: _deformed(x, x.new_zeros(2, 18, 4, 4), _mixed(x, w)), 9, "places"),
    ],
    ids=["roi_align", "ps_roi_align", "nms", "nms scores", "deform_conv2d", "deform_conv2d mask"],
)  # fmt: skip
def test_coordinates_stay(body: Body, columns: int, reason: str) -> None:
    """What torchvision's operators read as coordinates keeps its width, and says why."""
    with torch.device("meta"):
        model = Between.__new__(Between)
        nn.Module.__init__(model)
        model.first, model.last = nn.Conv2d(3, 12, 1), nn.Identity()
        model.body, model.tables = body, 0
        model.extra = nn.ParameterList([nn.Parameter(torch.empty(12, columns))])
        frozen = {str(f.axis): f.reason for f in fxprune.analyze(model, torch.empty(INPUTS["image"])).frozen}
    assert reason in frozen["extra.0[1]"]


def _deformed(x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
    """A deformable convolution with a kernel of ones, whose offsets or weights are the same everywhere."""
    offset = offset if offset.dim() == 4 else offset[:, :, None, None].expand(-1, -1, 4, 4)
    mask = mask if mask is None else mask[:, :, None, None].expand(-1, -1, 4, 4)
    return ops.deform_conv2d(x, offset, x.new_ones(8, 12, 3, 3), padding=1, mask=mask)


def test_every_rule_has_a_case() -> None:
    """A rule without a case in the table above must not be registered."""
    covered = {name for case in CASES for name in case.operators.split()}
    known = {
        name.removeprefix("aten.")
        for name, own in registered().items()
        if own.family != "custom" and name not in _OF_OTHER_LIBRARIES and _is_loaded(name)
    }
    assert known - covered == set()
    assert covered - known == set()


def test_a_second_rule_is_refused() -> None:
    """Registering twice names both places."""
    with pytest.raises(RuleError, match=r"aten.mm has two rules.*contraction.*test_rules"):
        rule("mm")(lambda c, args, kwargs, out: None)


def test_in_place_operators_share_the_rule_of_their_base() -> None:
    """``add_`` has no rule of its own, and ``unsqueeze_`` has that of ``unsqueeze``."""
    assert rule_for(aten.add_.Tensor) is rule_for(aten.add.Tensor)
    assert rule_for(aten.unsqueeze_.default) is registered()["aten.unsqueeze"]
    assert rule_for(aten.fft_fft.default) is None


# -- units ------------------------------------------------------------------------------------------


class Naive:
    """Union-find in the plainest form: a set for each class."""

    def __init__(self, count: int) -> None:
        self.classes = [{i} for i in range(count)]

    def find(self, unit: int) -> int:
        return min(next(c for c in self.classes if unit in c))

    def merge(self, a: int, b: int) -> None:
        first, second = (next(c for c in self.classes if unit in c) for unit in (a, b))
        if first is not second:
            self.classes.remove(second)
            first |= second


COUNT = 12
pairs = st.lists(st.tuples(st.integers(0, COUNT), st.integers(0, COUNT)), min_size=1, max_size=8)


@given(st.lists(pairs, max_size=6))
def test_units_agree_with_a_naive_union_find(batches: list[list[tuple[int, int]]]) -> None:
    """Merging batches of pairs gives the same classes, and units that meet FIXED are reported, not merged."""
    units, naive = Units(), Naive(COUNT + 1)
    units.fresh(COUNT)
    for batch in batches:
        a, b = (np.array(side) for side in zip(*batch, strict=True))
        met, collided = units.merge(a, b)
        for x, y in batch:
            if x and y:
                naive.merge(x, y)
        assert sorted(met.tolist()) == sorted(max(x, y) for x, y in batch if (x == 0) != (y == 0))
        assert not collided
        everything = np.arange(COUNT + 1)
        assert units.find(everything).tolist() == [naive.find(i) for i in range(COUNT + 1)]
        assert units.roots().tolist() == units.find(everything).tolist()


@given(st.lists(pairs, max_size=6), st.integers(1, 5))
def test_anchors_that_meet_collide(batches: list[list[tuple[int, int]]], anchors: int) -> None:
    """A collision is reported exactly when two anchors land in one class, and never merges them."""
    units, naive = Units(anchors), Naive(COUNT + 1)
    units.fresh(COUNT - anchors)
    for batch in batches:
        a, b = (np.array(side) for side in zip(*batch, strict=True))
        _, collided = units.merge(a, b)
        for x, y in batch:
            if x and y:
                naive.merge(x, y)
        expected = any(sum(0 < unit <= anchors for unit in c) > 1 for c in naive.classes)
        assert collided == expected
        assert len(set(units.find(np.arange(1, anchors + 1)).tolist())) == anchors
        if expected:
            return


def test_units_grow() -> None:
    """More units than were allocated at first."""
    units = Units()
    many = units.fresh(100, 100)
    units.merge(many[:1], many)
    assert (units.find(many) == many[:1]).all()


# -- movements --------------------------------------------------------------------------------------


@st.composite
def movements(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[tuple[str, tuple[int, ...]]]]:
    """A shape, a labelled dimension of it, and a few reshapes and permutations."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    steps: list[tuple[str, tuple[int, ...]]] = []
    shape = tuple(factors)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            order = tuple(draw(st.permutations(range(len(shape)))))
            steps.append(("permute", order))
            shape = tuple(shape[d] for d in order)
        else:
            shape = _regrouped(draw, math.prod(shape))
            steps.append(("reshape", shape))
    return tuple(factors), draw(st.integers(0, len(factors) - 1)), steps


def _regrouped(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    shape = []
    while total > 1:
        divisors = [d for d in range(2, total + 1) if total % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        total //= shape[-1]
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape) or (1,)


class Moved(nn.Module):
    """Channels of a layer along one dimension, movements with a function of values between them, a layer."""

    def __init__(self, shape: tuple[int, ...], dim: int, steps: list[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__()
        self.narrow = [n if d == dim else 1 for d, n in enumerate(shape)]
        self.others = nn.Parameter(torch.randn([1 if d == dim else n for d, n in enumerate(shape)]))
        self.steps = steps
        for name, target in steps:
            shape = target if name == "reshape" else tuple(shape[d] for d in target)
        self.first, self.last = nn.Linear(5, self.narrow[dim]), nn.Linear(shape[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).reshape(len(x), *self.narrow) * self.others
        for name, target in self.steps:
            y = y.reshape(len(x), *target) if name == "reshape" else y.permute(0, *[d + 1 for d in target])
            y = y.tanh()
        return self.last(y).reshape(len(x), -1).sum(1)


@settings(deadline=None, max_examples=60)
@given(movements())
def test_movements_stay_exact(drawn: tuple[tuple[int, ...], int, list[tuple[str, tuple[int, ...]]]]) -> None:
    """Whatever moves where: the plan can be applied, and every node equals that of the masked original."""
    torch.manual_seed(0)
    model, x = Moved(*drawn).eval(), torch.randn(2, 5)
    plan = fxprune.plan(model, x, ratio=0.5)
    assert fxprune.verify(model, plan.apply(model), plan, x).error < 1e-8


@given(movements(), st.randoms(use_true_random=False))
def test_row_units_stand_for_their_cells(
    drawn: tuple[tuple[int, ...], int, list[tuple[str, tuple[int, ...]]]], random: Any
) -> None:
    """A rectangle that a reshape leaves behind has one row unit for each row of different cells."""
    shape, dim, steps = drawn
    c = Coupler()
    ids = c.units.fresh(shape[dim])
    value = Value(
        shape, [Label(ids, (), Axis("x", dim)) if d == dim and n > 1 else None for d, n in enumerate(shape)]
    )
    for name, target in steps:
        if name == "reshape":
            value = Value(target, c.reshape(value, target))
    for rectangle in c.rectangles:
        rows, columns = rectangle.cells.shape
        assert rectangle.rows.shape == (rows,)
        made_of = {}
        for row, cells in zip(rectangle.rows.tolist(), c.units.find(rectangle.cells).tolist(), strict=True):
            assert made_of.setdefault(row, cells) == cells
        assert len({tuple(cells) for cells in made_of.values()}) == len(made_of)
        assert rows > 1
        assert columns > 1
