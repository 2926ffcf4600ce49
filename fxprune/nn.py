"""Small modules that a rewritten graph may contain beside those of the original model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.node import has_side_effect
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .errors import PinnedError
from .trees import Structure, flatten


class TrainingFlag(nn.Module):
    """Returns its own ``training`` flag.

    Symbolic tracing would burn ``F.dropout(x, p, self.training)`` into the graph as a constant. With
    this module in the graph, functional dropout follows ``train()`` and ``eval()`` as it did in the model.
    """

    def forward(self) -> bool:
        return self.training


class Apply(nn.Module):
    """Calls a ``torch.autograd.Function``, so that its gradient stays the one that it defines.

    Attributes:
        function: the function's class.
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)

    def extra_repr(self) -> str:
        return self.function.__qualname__


def stop_gradient(tree: Any) -> Any:
    """The same values without a gradient: what enters and leaves a block under ``torch.no_grad``."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


@has_side_effect
def keep(kept: Tensor, value: Tensor) -> None:
    """Keep a tensor for the next call, as a forward does that assigns to one of its buffers."""
    if kept.shape != value.shape:
        raise RuntimeError(
            f"forward replaces a tensor that it keeps, of shape {tuple(kept.shape)}, by one of shape "
            f"{tuple(value.shape)}; what is kept between calls must not change its shape"
        )
    kept.copy_(value)


@has_side_effect
def assign(tensor: Tensor, value: Tensor) -> None:
    """``tensor.data = value``, as a forward does that merges branches or averages weights."""
    tensor.data = value


def numpy_function(name: str, *args: Any, **kwargs: Any) -> Any:
    """``np.log(n)`` for ``name = "log"``: a function of NumPy on numbers, whose result is a plain number."""
    result = getattr(np, name)(*args, **kwargs)
    return result.item() if isinstance(result, np.generic) else result


class Unpack(nn.Module):
    """The tensors inside of one nested input, which must be built as it was when the model was captured."""

    def __init__(self, name: str, structure: Structure) -> None:
        super().__init__()
        self.name = name
        self.structure = structure

    def forward(self, tree: Any) -> list[Tensor]:
        tensors, structure = flatten(tree)
        if structure != self.structure:
            raise PinnedError(
                f"the input {self.name!r} was {self.structure} when the model was captured; got {structure}. "
                f"Next: analyse the model again with an example like this one."
            )
        return tensors


class Pack(nn.Module):
    """The model's nested output, built from its tensors.

    Attributes:
        state: numbers of the tensors that are state which the model hands out and takes in again (a
            key/value cache): as wide as the narrowed network makes them, not as the original did.
    """

    def __init__(self, structure: Structure, state: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.structure = structure
        self.state = state

    def forward(self, *tensors: Tensor) -> Any:
        return self.structure.rebuild(tensors)


class Fill(nn.Module):
    """Gives an output its shape back, with zeros in place of what was removed.

    Args:
        dims: the dimensions that became narrower; none as long as nothing was removed.
    """

    def __init__(self, dims: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.dims = dims

    def extra_repr(self) -> str:
        return f"dims={self.dims}"

    def forward(self, narrow: Tensor, *places: Tensor) -> Tensor:
        """The whole tensor.

        Shapes, for each of ``dims``: ``narrow: (..., n, ...)``, its ``places: (N)``, the result
        ``(..., N, ...)``. A place says which of the ``n`` entries stands there, ``n`` that none does.
        """
        for dim, place in zip(self.dims, places, strict=True):
            one_zero = [0, 0] * (narrow.dim() - 1 - dim) + [0, 1]
            narrow = F.pad(narrow, one_zero).index_select(dim, place)
        return narrow


class Nothing(nn.Module):
    """Stands in a model of its own class where layers of a removed residual branch were: computes nothing.

    Args:
        names: of the positional inputs of the module that it stands for.
        follows: for each tensor that it returns the input whose shape, type and device that has.
        outputs: what is returned, around these tensors.
        passes: return these inputs themselves, not zeros like them.
    """

    def __init__(
        self, names: tuple[str, ...], follows: tuple[str, ...], outputs: Structure, passes: bool = False
    ) -> None:
        super().__init__()
        self.names, self.follows, self.outputs, self.passes = names, follows, outputs, passes

    def extra_repr(self) -> str:
        return "returns its input" if self.passes else "returns zeros"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tensors = [given[name] for name in self.follows]
        return self.outputs.rebuild(tensors if self.passes else [torch.zeros_like(t) for t in tensors])


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projections: Sequence[Tensor],
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    num_heads: int,
    qk_width: int,
    v_width: int,
    scale: float,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    add_zero_attn: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward`` with free inner widths and scale.

    Shapes (``E_*``: widths of query, key and value; ``I``: inner width, ``V``: inner width of values):
        query, key, value: ``(L, N, E_q)``, ``(S, N, E_k)``, ``(S, N, E_v)``; ``N`` first with
            ``batch_first``, or without ``N``.
        projections: one ``(I + I + V, E)``, or ``(I, E_q)``, ``(I, E_k)``, ``(V, E_v)``.
        in_bias: ``(I + I + V)`` or None.
        out_weight, out_bias: ``(E_out, V)``, ``(E_out)`` or None.
        bias_k, bias_v: ``(1, 1, I)``, ``(1, 1, V)`` or None.
        key_padding_mask: ``(N, S)``. attn_mask: ``(L, S)``, or ``(N * num_heads, L, S)``.

    Returns:
        Output ``(L, N, E_out)``; weights ``(N, L, S)``, or ``(N, num_heads, L, S)`` without average, or None.
    """
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(0 if batch_first else 1) for x in (query, key, value))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    batch, widths = query.shape[0], [qk_width, qk_width, v_width]
    parts = projections[0].split(widths) if len(projections) == 1 else projections
    biases = in_bias.split(widths) if in_bias is not None else (None, None, None)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True))
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(batch, 1, -1)], dim=1)
        v = torch.cat([v, bias_v.expand(batch, 1, -1)], dim=1)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    q, k, v = (x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2) for x in (q, k, v))
    mask = _one_mask(attn_mask, key_padding_mask, batch, num_heads, k.shape[2], q)
    dropout = dropout if training else 0.0
    weights = None
    if need_weights:
        scores = (q * scale) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    out = F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)
    if not batch_first:
        out = out.transpose(0, 1)
    if not batched:
        out = out.squeeze(0 if batch_first else 1)
        weights = weights.squeeze(0) if weights is not None else None
    return out, weights


def _one_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    num_heads: int,
    keys: int,
    like: Tensor,
) -> Tensor | None:
    """One additive mask of shape ``(batch or 1, heads or 1, queries or 1, keys)``, or None."""
    masks = []
    if attn_mask is not None:
        shape = (1, 1) if attn_mask.dim() == 2 else (batch, num_heads)
        masks.append(attn_mask.reshape(*shape, *attn_mask.shape[-2:]))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    total: Tensor | None = None
    for mask in masks:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
        mask = F.pad(mask, (0, keys - mask.shape[-1]))
        total = mask if total is None else total + mask
    return total


class MultiheadAttention(nn.Module):
    """Multi-head attention whose inner widths and scale are free.

    ``torch.nn.MultiheadAttention`` ties the width of its input to ``num_heads * head_dim`` and its scale
    to ``head_dim``; a narrowed one has neither tie. Parameter names, call signature and results are those
    of the module that it replaces (https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html).

    Parameters (``E_*``: widths of query, key and value; ``I``: inner width, ``V``: inner width of values):
        in_proj_weight: ``(I + I + V, E_q)``, or q/k/v_proj_weight: ``(I, E_q)``, ``(I, E_k)``, ``(V, E_v)``.
        in_proj_bias: ``(I + I + V)`` or None.
        bias_k, bias_v: ``(1, 1, I)``, ``(1, 1, V)`` or None.
        out_proj: linear ``V -> E_out``.
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    q_proj_weight: Any
    k_proj_weight: Any
    v_proj_weight: Any
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, source: nn.MultiheadAttention, qk_width: int, v_width: int, scale: float) -> None:
        super().__init__()
        self._qkv_same_embed_dim = False  # keeps torch.nn.Transformer* off their fused path
        self.num_heads = source.num_heads
        self.dropout = source.dropout
        self.batch_first = source.batch_first
        self.add_zero_attn = source.add_zero_attn
        self.qk_width = qk_width
        self.v_width = v_width
        self.scale = scale
        self.training = source.training
        for name, parameter in source.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "bias_k", "bias_v"):
            if name not in self._parameters:
                self.register_parameter(name, None)
        self.out_proj = source.out_proj

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, qk_width={self.qk_width}, v_width={self.v_width}, "
            f"scale={self.scale:g}, dropout={self.dropout}, batch_first={self.batch_first}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        packed = self.in_proj_weight
        return multi_head_attention(
            query,
            key,
            value,
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else (packed,),
            self.in_proj_bias,
            self.out_proj.weight,
            self.out_proj.bias,
            num_heads=self.num_heads,
            qk_width=self.qk_width,
            v_width=self.v_width,
            scale=self.scale,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            dropout=self.dropout,
            training=self.training,
            batch_first=self.batch_first,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
        )
