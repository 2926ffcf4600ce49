"""The coupler that looks at a rewritten program, where every axis has its labels already.

An analysis finds out which indices are coupled; a check asks whether the rules still say the same of what is
left. Rows of which one cell is left, and axes of which one index is left, are not what they seem: they are
still rows and axes, as they were before. That is all that differs, and rules do not know of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .coupler import Coupler
from .units import Axis, Ids, Label, Value


class CheckingCoupler(Coupler):
    """A coupler for the check of a rewritten program; its units have anchors (see :class:`.units.Units`)."""

    def multiply(self, cells: Ids, rows: Ids, columns: Ids, axis: Axis) -> None:
        """Cells whose row and column are known must have these."""
        known = self.units.factors(cells)
        if known is None:
            super().multiply(cells, rows, columns, axis)
        else:
            self.merge(known[1], np.broadcast_to(columns, cells.shape), axis, axis)

    def is_one_cell(self, size: int) -> bool:
        """Never said: a row of one cell may have had several."""
        return False

    def picks_from_table(self, index: Value, value: Value, dim: int) -> bool:
        """An index that has labels picked from a table before, whatever is left of that."""
        labelled = index.state is not None and any(label is not None for label in index.state.axes)
        return labelled or super().picks_from_table(index, value, dim)

    def _columns(self, ids: Ids, rows: Ids | None, gone: Sequence[int], axis: Axis) -> Ids | None:
        """Columns that are known stay columns where one row is left."""
        known = self.units.factors(ids)
        return (
            super()._columns(ids, rows, gone, axis) if known is None else self._joined(known[1], gone, axis)
        )

    def _along_one_unit(self, label: Label, array: Ids) -> list[int]:
        """The one dimension that is left, of whose several units one remained."""
        wide = [at for at in range(array.ndim) if array.shape[at] > 1]
        return wide if not label.over and len(wide) == 1 else []
