"""Writing a network as ``.pt2``.

Checked before the work starts, and never half written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from .. import files
from ..errors import OutputError
from ..files import first_line

__all__ = ["Exported", "check_whole", "export", "write"]


@dataclass(frozen=True)
class Exported:
    """An exported program.

    Attributes:
        program: what ``torch.export.save`` writes.
        batch: what it says about the batch size, for people.
    """

    program: ExportedProgram
    batch: str


def check_whole(path: Path, regions: Mapping[str, Any]) -> None:
    """Make sure that what was captured can be written at ``path``.

    Raises:
        OutputError: a ``.pt2`` file was asked for, but only regions of the model are graphs.
    """
    if regions and path.suffix == ".pt2":
        raise OutputError(
            f"cannot write {path}: the model could be captured in parts only ({', '.join(regions)}), and the "
            f"code around them cannot be exported; try --out {path.with_suffix('.safetensors')}, which holds "
            f"the narrow weights and the plan"
        )


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Exported:
    """Export ``model``, with a free batch size where it allows that.

    The batch is taken to be the first dimension of every input tensor that has the same first size as the
    first one. A program with a free batch size is kept only if it gives the model's own output on the
    example inputs; otherwise their sizes are built in.

    Raises:
        OutputError: ``torch.export`` refuses the model with fixed sizes, too.
    """
    try:
        return Exported(_export_dynamic(model, args, kwargs), "any batch size")
    except Exception as error:  # noqa: BLE001 - torch.export has no error class of its own
        reason = first_line(error)
    try:
        program = torch.export.export(model, args, dict(kwargs))
    except Exception as error:
        raise OutputError(
            f"torch.export refuses the pruned model: {first_line(error)}. The model itself is sound: in "
            "Python, "
            "fxprune.prune returns it, and its state_dict can be saved"
        ) from error
    return Exported(program, f"the example's batch size only; a free one was refused ({reason})")


def write(exported: Exported, path: Path) -> int:
    """Save an exported program as a ``.pt2`` file.

    Returns:
        The size of the file in bytes.

    Raises:
        OutputError: writing or reading back fails; ``path`` is as it was before.
    """

    def save(draft: Path) -> None:
        torch.export.save(exported.program, draft)
        torch.export.load(draft)

    return files.write(path, save)


def _export_dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors:
        raise ValueError("no input tensor has a batch dimension")
    size = tensors[0].shape[0]
    batch = Dim("batch")

    def batched(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size

    def grown(leaf: Any) -> Any:
        # torch.export builds a size of 1 in, so it is shown a larger batch.
        return torch.cat([leaf, leaf]) if batched(leaf) else leaf

    def spec(leaf: Any) -> Any:
        return {0: batch} if batched(leaf) else None

    large_args, large_kwargs = tree_map(grown, (args, dict(kwargs)))
    arg_specs, kwarg_specs = tree_map(spec, (args, dict(kwargs)))
    program = torch.export.export(
        model, large_args, large_kwargs, dynamic_shapes=(*arg_specs, *kwarg_specs.values())
    )
    with torch.no_grad():
        expected, found = model(*args, **kwargs), program.module()(*args, **kwargs)
    for one, other in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5, equal_nan=True)
    return program
