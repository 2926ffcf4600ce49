"""Constants made in the graph: their axes are free, and follow what they meet."""

from __future__ import annotations

from typing import Any

import torch

from ..coupler import Coupler
from ..registry import rule

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@rule("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "linspace",
      "eye", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "scalar_tensor",
      "logspace", "tril_indices", "triu_indices", "randperm")  # fmt: skip
def factory(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    c.constant(out)


@rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
def like(c: Coupler, args: Args, kwargs: Kwargs, out: torch.Tensor) -> None:
    """A constant of the same extents: its axes go with those of the argument."""
    x = c.value(args[0])
    names = list(range(len(x.shape)))
    zeros = c.operator == "zeros_like"
    labels, _ = c.unify([(x, names)], names, lambda _: zeros)
    c.put(out, labels)
