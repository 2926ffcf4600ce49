"""What compensation brought, layer by layer and on the whole."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerEntry:
    """What was done for one layer.

    Attributes:
        name: the parameter that was changed, the running mean of a batch normalisation, or the node with
            which a part ends that was rebuilt.
        step: ``"least squares"``, ``"statistics"`` or ``"rebuilding"``.
        before: mean square difference between the layer's outputs and what they should be, on held-out
            calibration data, as a share of the mean square of the latter.
        after: the same afterwards.
        ridge: strength of the ridge, as a share of the mean square of what the layer reads.
        reason: why nothing was changed, or empty.
    """

    name: str
    step: str
    before: float = math.nan
    after: float = math.nan
    ridge: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name}: as it was, {self.reason}"
        if self.step == "statistics":
            return f"{self.name}: statistics measured again"
        if self.step == "rebuilding":
            return f"up to {self.name}: error {self.before:.3g} -> {self.after:.3g} rebuilt"
        return f"{self.name}: error {self.before:.3g} -> {self.after:.3g} (ridge {self.ridge:g})"


@dataclass(frozen=True)
class Compensation:
    """The outcome of a compensation; ``str()`` of it is meant to be read.

    Attributes:
        before: mean square difference of the outputs from the original's on calibration data, as a share of
            their variance, of the network as it was narrowed.
        after: the same, compensated.
        layers: what was done, in the order of the graph.
        batches: number of calibration batches.
        notes: what else there is to know.
    """

    before: float
    after: float
    layers: tuple[LayerEntry, ...]
    batches: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"outputs differ from the original's by {self.before:.3g} of their variance as narrowed, by "
            f"{self.after:.3g} compensated ({self.batches} calibration batches)"
        ]
        return "\n".join([*lines, *(f"  {entry}" for entry in self.layers), *(f"  {n}" for n in self.notes)])
