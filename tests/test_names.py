"""Modules, parameters and buffers may have the names of what a ``torch.fx.GraphModule`` has of its own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Named(nn.Module):
    """A module, a parameter and a buffer with given names, and a part that differs in training mode."""

    def __init__(self, module: str, parameter: str, buffer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = module, parameter, buffer
        self.add_module(module, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)))
        self.register_parameter(parameter, nn.Parameter(torch.randn(6)))
        self.register_buffer(buffer, torch.randn(6))
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        module, parameter, buffer = (getattr(self, name) for name in self.names)
        h = module(x) * parameter + buffer
        if self.training:
            h = self.drop(h)
        out: Tensor = self.out(h)
        return out


@pytest.mark.parametrize(
    "names",
    [("graph", "code", "meta"), ("code", "meta", "graph"), ("recompile", "print_readable", "add_submodule")],
    ids=lambda names: names[0],
)
def test_names_of_a_graph_module(names: tuple[str, str, str]) -> None:
    model = Named(*names).eval()
    plan = fxprune.plan(model, X)
    pruned = plan.apply(model)
    assert isinstance(pruned, fx.GraphModule)
    assert {name for name, _ in pruned.state_dict().items()} == set(model.state_dict())
    assert pruned.out.weight.shape == (3, 3)
    assert fxprune.verify(model, pruned, plan, X).exact
    wanted = pruned(X)
    for again in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        torch.testing.assert_close(again(X), wanted)
    again.load_state_dict(pruned.state_dict())
    pruned.train()
    pruned(X).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_a_compensated_result_and_a_file() -> None:
    model = Named("graph", "code", "meta").eval()
    pruned = fxprune.prune(model, X, ratio=0.5, calibrate=[X, 2 * X])
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), pruned(X))
