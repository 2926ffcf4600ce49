"""Every axis of every parameter is in a group, or is said to stay and why."""

from __future__ import annotations

from typing import Any

import torch
from test_products import CASES, HEADS, NormedHeads
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune


class TableByHead(nn.Module):
    """A bias for each head, columns of heads that are picked by number, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o, self.unused = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x).view(*x.shape[:2], 4, 4)
        y = y + y[..., :1] * self.table[:, None]
        return self.o(y.flatten(2))


class Correlation(nn.Module):
    """Cross-correlation: one branch gives the kernels for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 2, 1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.out(F.conv2d(self.net(x), self.net(z)))


class Shapes(nn.Module):
    """A parameter of which the size alone is read, another that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 2, 3)
        self.size, self.returned = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.a(x)) * self.size.shape[0], self.returned


OTHERS: dict[str, tuple[Any, Any]] = {
    "table_by_head": (TableByHead, torch.randn(2, 5, 6)),
    "correlation": (Correlation, (torch.randn(1, 3, 6, 6), torch.randn(1, 3, 9, 9))),
    "shapes": (Shapes, torch.randn(2, 3, 8)),
    "group_norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        torch.randn(2, 3, 6, 6),
    ),
    "encoder": (
        lambda: nn.Sequential(
            nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), nn.Linear(16, 3)
        ),
        torch.randn(2, 5, 6),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 8), nn.GRU(8, 6)),
        torch.zeros(2, 5, dtype=torch.long),
    ),
    **{name: case[:2] for name, case in {**CASES, **HEADS}.items()},
}


def test_what_goes_by_rows_alone_says_so() -> None:
    frozen = {str(f.axis): f.reason for f in fxprune.analyze(TableByHead(), torch.randn(2, 5, 6)).frozen}
    assert "no graph node uses this parameter" in frozen["unused.weight[0]"]
    graph = fxprune.analyze(NormedHeads(), torch.randn(2, 5, 16))
    assert "q.weight[0]" not in {str(f.axis) for f in graph.frozen}
