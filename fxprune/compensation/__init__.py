"""Compensation: what is left of a network makes up for what went, from unlabelled data and without training.

- :mod:`.batches`: calibration data;
- :mod:`.walk`: two networks side by side over all batches, each node run once;
- :mod:`.moments`: what is measured of a layer, and the least-squares problem;
- :mod:`.choice`: what is given up, and how much of each group;
- :mod:`.judge`: what the outputs lose by a decision;
- :mod:`.depth`: which residual branches go as a whole;
- :mod:`.layers`: statistics and least squares, layer after layer;
- :mod:`.rebuild`: an optional fit by gradients, part by part;
- :mod:`.outputs`: comparing outputs;
- :mod:`.report`: what it brought.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from ..coupling.graph import CouplingGraph
from ..errors import CalibrationError
from ..graph_module import clone_module
from ..nn import MultiheadAttention
from ..passes import rewrite
from ..passes.modules import free_attention
from ..program import Program, named_modules, named_tensors
from .batches import BatchValues, Pick, read
from .choice import Reconstruction
from .layers import Layers
from .outputs import Difference, own, private
from .rebuild import Rebuild, free
from .report import Compensation, LayerEntry
from .walk import quiet

__all__ = ["Compensation", "LayerEntry", "Pick", "Reconstruction", "compensated"]

_PROBES = 4
"""Batches on which the outputs are compared before and afterwards."""


def compensated(
    module: nn.Module,
    graph: CouplingGraph,
    removed: Mapping[str, Sequence[int]],
    batches: Iterable[Any],
    pick: Pick | None = None,
    least_squares: bool = True,
    rebuild: int = 0,
    seed: int = 0,
) -> Compensation:
    """Compensate a narrowed network, in place.

    Args:
        module: the narrowed network, in whatever form; its tensors are changed.
        graph: the analysis of the original.
        removed: the units that went, by group.
        batches: calibration data.
        pick: see :data:`.batches.Pick`.
        least_squares: see :class:`Layers`.
        rebuild: steps of :class:`.rebuild.Rebuild` for each part.
        seed: see :class:`Layers`.

    Raises:
        CalibrationError: for data that do not fit, and for a model without weights.
    """
    program = graph.captured.program
    if any(tensor.is_meta for tensor in program.tensors.values()):
        raise CalibrationError(
            "to compensate, the model has to be run, and it is on the meta device: load weights."
        )
    if len(program.pieces()) > 1 or "" not in program.pieces():
        note = "a network that could be captured in parts only is not compensated"
        return Compensation(float("nan"), float("nan"), (), 0, (note,))
    device = next((t.device for t in program.tensors.values()), torch.device("cpu"))
    rewritten = rewrite(graph, removed)
    narrow = rewritten.materialize()
    dense = _alike(private(graph.whole.captured.program), narrow).module().eval()
    target = dict(named_tensors(module))
    for name, tensor in named_tensors(narrow):
        tensor.detach().copy_(target[name])
    assert isinstance(narrow, fx.GraphModule)
    plain = copy.deepcopy(narrow).eval()
    layers = Layers(dense, narrow.eval(), rewritten.narrowing, least_squares, seed)
    probes: list[list[Any]] = []
    with quiet(), BatchValues() as state, BatchValues() as again:
        for number, values in enumerate(read(program, batches, pick, device)):
            state.add((layers.dense.start(own(values)), layers.narrow.start(own(values))))
            if rebuild:
                again.add((layers.dense.start(own(values)), layers.narrow.start(own(values))))
            if number < _PROBES or number % 4 == 3:  # those that are held out, where there are enough
                probes = [*probes, values][-_PROBES:]
        entries = tuple(layers.run(state))
        count = len(state)
        if rebuild:
            names = free(narrow, layers.readers)
            parts = Rebuild(layers.dense, layers.narrow, rewritten.narrowing, rebuild, names, seed)
            entries = (*entries, *parts.run(again))
        plainly, fitted = Difference(), Difference()
        for values in probes:
            wanted = dense.forward(*own(values))
            plainly.add(wanted, plain.forward(*own(values)))
            fitted.add(wanted, narrow.forward(*own(values)))
        before, after = plainly.divergence(), fitted.divergence()
    if not after <= before:
        note = f"taken back: with the compensation the outputs differ by {after:.3g}"
        return Compensation(before, before, entries, count, (note,))
    for name, tensor in named_tensors(narrow):
        target[name].detach().copy_(tensor)
    return Compensation(before, after, entries, count)


def _alike(program: Program, narrow: nn.Module) -> Program:
    """The program with attention layers that compute as those of ``narrow`` do, step by step."""
    modules = dict(program.modules)
    for path, leaf in program.modules.items():
        inner = {
            name: free_attention(module, {k: tuple(p.shape) for k, p in module.named_parameters()})
            for name, module in named_modules(leaf)
            if type(module) is nn.MultiheadAttention
            and isinstance(narrow.get_submodule(f"{path}.{name}" if name else path), MultiheadAttention)
        }
        if inner:
            modules[path] = inner.get("") or clone_module(leaf, lambda _, tensor: tensor, share=True)
            for name, attention in inner.items():
                if name:
                    modules[path].set_submodule(name, attention)
    return replace(program, modules=modules)
