"""Calibration data: batches of inputs, and what is kept between two stretches of a network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import CalibrationError, ExampleInputsError
from ..importance.calibration import kind, progress
from ..inputs import normalize
from ..program import Program

Pick = Callable[[Any], Any]
"""From a batch to the inputs of the model: a tensor, a tuple of positional inputs, a dict of keyword
inputs."""

Values = dict[fx.Node, Any]

_IN_MEMORY = 1 << 29
"""Bytes of values that are kept in memory; on a GPU a quarter of what is free. More go to a temporary
folder."""


def read(program: Program, batches: Iterable[Any], pick: Pick | None, device: Any) -> Iterator[list[Any]]:
    """For each batch the values of the program's placeholders, on ``device``.

    Raises:
        CalibrationError: for what is no series of batches, without a batch, for one that does not fit.
    """
    count = 0
    for batch in progress(series(batches), "calibration data"):
        inputs = batch if pick is None else pick(batch)
        try:
            args, kwargs = normalize(tuple(inputs) if type(inputs) is list else inputs, True)
            values = program.bind(args, kwargs)
        except (ExampleInputsError, TypeError) as error:
            raise CalibrationError(
                f"batch {count} of the calibration data, a {kind(batch)}, cannot be given to the model: "
                f"{error}. Where a batch holds targets, too, say what the inputs are: "
                f"pick=lambda batch: batch[0]. Where the example was fxprune.Calls, each batch is one, too."
            ) from error
        yield pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to(device), values)
        count += 1
    if not count:
        raise CalibrationError(
            "the calibration data hold no batch. An iterator that was gone through before is empty, too: "
            "give a list or a data loader."
        )


def series(batches: Any) -> Iterable[Any]:
    """Calibration data that are a series of batches.

    Raises:
        CalibrationError: for others.
    """
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibration data are gone through batch by batch: give a list of batches or a data loader, got "
            f"{kind(batches)}. A single batch is given as a list that holds it."
        )
    return batches


def _room(values: list[Any]) -> int:
    """Bytes that may be kept where the first of these tensors is."""
    device = next((value.device for value in values if isinstance(value, torch.Tensor)), None)
    if device is None or device.type != "cuda":
        return _IN_MEMORY
    return max(_IN_MEMORY, torch.cuda.mem_get_info(device)[0] // 4)


class BatchValues(AbstractContextManager["BatchValues"]):
    """The values of both networks for each batch; in a temporary folder where they are many."""

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._most = 0

    def __exit__(self, *error: Any) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, values: tuple[Values, ...]) -> None:
        """Keep the values of one more batch."""
        self._held.append(None)
        self.put(len(self) - 1, values)

    def put(self, number: int, values: tuple[Values, ...]) -> None:
        """Keep the values of a batch in place of its earlier ones."""
        if self._folder is None:
            leaves = pytree.tree_leaves([list(part.values()) for part in values])
            storages = {
                leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
                for leaf in leaves
                if isinstance(leaf, torch.Tensor)
            }
            self._most = self._most or _room(leaves)
            if sum(storages.values()) * len(self) <= self._most:  # batches are alike
                self._held[number] = values
                return
            self._folder = tempfile.TemporaryDirectory(prefix="fxprune-")
            for other, held in enumerate(self._held):
                if held is not None and other != number:
                    self._write(other, held)
        self._write(number, values)

    def get(self, number: int) -> tuple[Values, ...]:
        """The values of a batch."""
        held = self._held[number]
        if not isinstance(held, Path):
            values: tuple[Values, ...] = held
            return values
        nodes, parts = self._nodes[number], torch.load(held, weights_only=False)
        return tuple(
            {node: part[node.name] for node in own if node.name in part}
            for own, part in zip(nodes, parts, strict=True)
        )

    def _write(self, number: int, values: tuple[Values, ...]) -> None:
        assert self._folder is not None
        path = Path(self._folder.name) / str(number)
        torch.save([{node.name: value for node, value in part.items()} for part in values], path)
        self._held[number] = path
        self._nodes[number] = [list(part) for part in values]

    @property
    def _nodes(self) -> dict[int, list[list[fx.Node]]]:
        found: dict[int, list[list[fx.Node]]] = self.__dict__.setdefault("_by_number", {})
        return found
