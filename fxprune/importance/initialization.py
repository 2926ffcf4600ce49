"""Criteria for networks that were not trained yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..capture.patches import PlainAttention
from ..coupling.graph import CouplingGraph
from ..errors import ImportanceError
from ..random_numbers import drawn
from .base import Entries, Measure, MemberCriterion
from .gradient import LossCriterion, by_name, times_weight


@dataclass(frozen=True, eq=False)
class SNIP(LossCriterion):
    """Connection sensitivity: the share of a weight in what the loss feels of all weights.

    ``s_m(u) = sum over entries w of m at u of |w * g| / Z``, ``g = mean over batches of dloss/dw``, ``Z`` the
    sum of ``|w * g|`` over all parameters. Lee et al., ICLR 2019, https://arxiv.org/abs/1810.02340.
    """

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """One gradient for each batch."""
        gradients = self.mean_gradients(model, seed)
        entries = times_weight(model, {name: gradient.abs() for name, gradient in gradients.items()}, 1)
        total = sum(float(entry.sum(dtype=torch.float64)) for entry in entries.values())
        return by_name(model, {name: entry / (total or 1.0) for name, entry in entries.items()})


@dataclass(frozen=True)
class SynFlow(MemberCriterion):
    """Synaptic flow: how much of the sum of all paths through the network goes through a weight; no data.

    ``s_m(u) = sum over entries w of m at u of |w| * dR/d|w|``, where ``R`` is the sum of the outputs of the
    network with the absolute values of its parameters and buffers on an input of ones, in double precision.
    Tanaka et al., NeurIPS 2020, https://arxiv.org/abs/2006.05467. The captured graph is run in evaluation
    mode on inputs of the example's shapes; integer inputs (tokens) are zeros.
    """

    def measure(self, graph: CouplingGraph, model: nn.Module, seed: int) -> Measure:
        """One backward pass through a copy."""
        program = graph.captured.program
        tensors = {**program.tensors, **program.extras}
        if any(tensor.device.type == "meta" for tensor in tensors.values()):
            raise ImportanceError(
                "SynFlow has to run the model, which is on the meta device: load weights first."
            )
        made: dict[int, torch.Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) not in made:
                made[id(tensor)] = _positive(tensor)
        copied = replace(
            program,
            tensors={name: made[id(tensor)] for name, tensor in program.tensors.items()},
            extras={name: made[id(tensor)] for name, tensor in program.extras.items()},
        )
        device = next((tensor.device for tensor in program.tensors.values()), torch.device("cpu"))
        inputs = pytree.tree_map_only(torch.Tensor, lambda t: _ones(t, device), graph.inputs)
        with drawn(), torch.enable_grad(), PlainAttention():
            outputs = copied.module().eval()(*inputs)
            leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
            flows = [leaf.sum() for leaf in leaves if leaf.is_floating_point() and leaf.requires_grad]
            if not flows:
                raise ImportanceError("SynFlow: the outputs do not depend on the model's parameters.")
            weights = {key: tensor for key, tensor in made.items() if tensor.requires_grad}
            gradients: Any = torch.autograd.grad(flows, list(weights.values()), allow_unused=True)
        through = {
            key: torch.zeros_like(weight) if gradient is None else weight.detach() * gradient
            for (key, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        names = {id(tensor): name for name, tensor in program.tensors.items()}
        for key, value in through.items():
            if not bool(torch.isfinite(value).all()):
                raise ImportanceError(
                    f"SynFlow met NaN or infinity at the parameter {names[key]!r}: with all weights positive "
                    f"the network grows beyond double precision, or divides by zero. Use SNIP or 'l2'."
                )
        return Entries(lambda member: through.get(id(member.tensor)))


def _positive(tensor: torch.Tensor) -> torch.Tensor:
    """Absolute values in double precision; parameters ask for gradients."""
    if not tensor.is_floating_point():
        return tensor.detach()
    value = tensor.detach().to(torch.float64).abs()
    return nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value


def _ones(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.ones(tensor.shape, dtype=torch.float64, device=device)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
