"""The pruning plan: what goes, as data that can be printed, compared, edited and stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import PlanError
from ..files import few, told
from ..repeats import joined, starred
from . import plan_file
from .patterns import nearest
from .plan_diff import PlanDiff, diff

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    _Optimizer = TypeVar("_Optimizer", bound=Optimizer)

    from ..coupling.graph import CouplingGraph


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(item) is int for item in value)


@dataclass(frozen=True)
class Narrowed:
    """What a plan does to one group.

    Attributes:
        group: the group's name.
        size: number of its units.
        removed: positions of the units that go, ascending.
    """

    group: str
    size: int
    removed: tuple[int, ...]

    @property
    def kept(self) -> int:
        """Number of units that stay."""
        return self.size - len(self.removed)

    def __str__(self) -> str:
        return f"{self.group}: {self.size} -> {self.kept} units"


@dataclass(frozen=True)
class Problem:
    """A constraint that a plan breaks.

    Attributes:
        group: the group where it does; empty for the plan as a whole.
        reason: which constraint, and what would mend it.
    """

    group: str
    reason: str

    def __str__(self) -> str:
        return f"{self.group}: {self.reason}" if self.group else self.reason


@dataclass(frozen=True)
class PruningPlan:
    """Which units of which groups are removed from one architecture.

    A plan holds names and numbers only: it pickles, compares with ``==`` and goes through JSON
    (:meth:`to_json`, :meth:`from_json`). Iterating gives a :class:`Narrowed` for each group, those that
    stay whole included. A plan is edited by making another one (:meth:`with_removed`, :meth:`without`);
    :meth:`check` says which constraint an edit breaks.

    Every method that takes a model takes its analysis as well, what :func:`fxprune.analyze` gave. Where it is
    the model that the plan was made for, and that has not changed since, it is not analysed again.

    Attributes:
        model: class name of the model.
        inputs: description of the example inputs (shapes, dtypes): ``{"args": [...], "kwargs": {...}}``.
        shapes: shape of every parameter and buffer: the architecture that the plan is for.
        sizes: number of units of every group, by the group's name.
        removed: positions of the units to remove, by the group's name; groups that stay are left out.
        branches: names of the residual branches that are removed as a whole (see
            :attr:`CouplingGraph.branches <fxprune.coupling.graph.CouplingGraph.branches>`); ``sizes`` and
            ``removed`` are those of the network without them.
        held: names of graph nodes that could not be rewritten; nothing around them is narrowed.
        dissolved: functions that had to be traced into, as ``module.name``.
        free_outputs: names of outputs that may become narrower.
        fill_outputs: names of outputs that hold zeros in place of what was removed.
        regions: where the model is captured in parts: by path of a submodule a description of its inputs
            and the names of its tensors that are used outside of it, too.
        costs: what a file says the network costs before and after, ``{"params": [2, 1], "macs": [2, 1]}``;
        see
            :meth:`counts`.
        into: the form of the result: ``"graph"``, or ``"module"`` for the model's own class.
        notes: why nodes were held, and what would let more go, for people.
        settings: how the plan was made (ratio, importance, seed); for the record only.
        config: integers of the model's configuration that say how wide it is afterwards, by name; known with
            ``uniform=True``.
    """

    model: str
    inputs: Mapping[str, Any]
    shapes: Mapping[str, list[int]]
    sizes: Mapping[str, int]
    removed: Mapping[str, list[int]]
    held: tuple[str, ...] = ()
    dissolved: tuple[str, ...] = ()
    regions: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    free_outputs: tuple[str, ...] = ()
    fill_outputs: tuple[str, ...] = ()
    into: str = "graph"
    branches: tuple[str, ...] = ()
    costs: Mapping[str, list[int]] = field(default_factory=dict, compare=False)
    config: Mapping[str, int] = field(default_factory=dict)

    def apply(self, model: nn.Module | CouplingGraph) -> nn.Module:
        """A narrowed copy of ``model``, which may be any copy of the architecture that the plan is for.

        Raises:
            PlanError: if the model is of another architecture; names the first difference.
        """
        from ..api import apply

        return apply(self, model)

    def __iter__(self) -> Iterator[Narrowed]:
        for name, size in self.sizes.items():
            yield Narrowed(name, size, tuple(self.removed.get(name, ())))

    def with_removed(self, removed: Mapping[str, Sequence[int]]) -> PruningPlan:
        """The plan with other positions removed from the groups named; an empty list leaves one whole.

        Raises:
            PlanError: if there is no such group, naming the nearest, or for what are no positions.
        """
        for name, units in removed.items():
            self._known(name)
            if not isinstance(units, Iterable):
                raise PlanError(f"the positions to remove from {name!r} are a list, [3] say; got {units!r}.")
        merged = {name: list(self.removed.get(name, ())) for name in self.sizes}
        merged |= {name: sorted(units) for name, units in removed.items()}
        edited = replace(self, removed={name: units for name, units in merged.items() if units}, costs={})
        edited.come_from(self.came_from)
        return edited

    def come_from(self, graph: Callable[[], CouplingGraph | None]) -> None:
        """Remember the analysis that the plan was made from; what is loaded or unpickled does not."""
        self.__dict__["_came_from"] = graph

    def came_from(self) -> CouplingGraph | None:
        """The analysis that the plan was made from, if it is still there."""
        graph: CouplingGraph | None = self.__dict__.get("_came_from", lambda: None)()
        return graph

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_came_from"}

    def without(self, *groups: str) -> PruningPlan:
        """The plan with these groups left whole.

        Raises:
            PlanError: if there is no such group; names the nearest.
        """
        return self.with_removed({name: [] for name in groups})

    def check(self, model: nn.Module | CouplingGraph) -> tuple[Problem, ...]:
        """Every constraint that the plan breaks, for a model or its analysis; empty if it can be applied."""
        from ..api import check

        return check(self, model)

    def _known(self, name: str) -> None:
        if name not in self.sizes:
            close = nearest(name, self.sizes, 1)
            hint = f"; the nearest is {close[0]!r}" if close else ""
            raise PlanError(f"the plan knows no group {name!r}{hint}.")

    def then(self, second: PruningPlan, model: nn.Module | CouplingGraph) -> PruningPlan:
        """One plan for ``model`` that does what this plan and then ``second`` do.

        ``plan.then(second, model).apply(model)`` has, bit for bit, the weights of
        ``second.apply(plan.apply(model))``.

        Args:
            second: a plan for what ``self.apply`` gives.
            model: any copy of the architecture that this plan is for; may live on the meta device.

        Raises:
            PlanError: if a plan does not fit, or if no single plan does what the two do (the pruned network
                may have groups that the original has not, such as single heads of width 1).
        """
        from ..iterative import then

        return then(self, second, model)

    def mask(self, model: nn.Module | CouplingGraph) -> nn.Module:
        """A copy of ``model``, of the same class and shapes, in which the removed entries are held at zero.

        It can be trained like any other, with any optimiser, and ``plan.apply`` of it gives a network that
        computes the same, wherever the narrowed groups are exact. Names, module tree and state dict
        are those of the model. Removed entries get no gradient; a forward pre-hook of the copy sets them to
        zero again should anything else have written to them (a loaded state dict, momentum from before). The
        copy may be copied and pickled. ``model`` is not changed.

        Raises:
            PlanError: if the plan is for another architecture.
        """
        from ..training import mask

        return mask(self, model)

    def masks(self, model: nn.Module | CouplingGraph) -> dict[str, Tensor]:
        """Which entries survive: a boolean tensor of the parameter's shape for each parameter that narrows.

        Of a weight under ``weight_norm`` the rows that go are told by their norms alone: in the directions
        they stay as they are, since a row of zeros has none.

        Args:
            model: any copy of the architecture; may live on the meta device.

        Raises:
            PlanError: if the plan is for another architecture.
        """
        from ..training import masks

        return masks(self, model)

    if not TYPE_CHECKING:  # which is to miss other names

        def __getattr__(self, name: str) -> Any:
            if name == "narrow_state_dict":
                raise AttributeError("PruningPlan.narrow_state_dict is called apply_state_dict now.")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def apply_state_dict(
        self, state: Mapping[str, Any], model: nn.Module | CouplingGraph | None = None
    ) -> dict[str, Any]:
        """The part of a state dict that survives, as copies: moving averages, checkpoints.

        An exponential moving average in ``torch.optim.swa_utils.AveragedModel`` goes on like this::

            narrowed = AveragedModel(pruned, avg_fn=...)
            narrowed.module.load_state_dict(plan.apply_state_dict(ema.module.state_dict(), model))
            narrowed.n_averaged.copy_(ema.n_averaged)

        Args:
            state: tensors by the names of the model, all or some of them.
            model: any copy of the architecture; may live on the meta device. Not needed as long as the
                analysis that the plan was made from is there, which is as long as its model lives.

        Raises:
            PlanError: for names or shapes that the architecture does not have; without ``model``, if the plan
                was read from a file, whose groups are known by name alone.
        """
        from ..training import apply_state_dict

        return apply_state_dict(self, state, model)

    def apply_to_optimizer(
        self, optimizer: _Optimizer, model: nn.Module | CouplingGraph, pruned: nn.Module
    ) -> _Optimizer:
        """An optimiser of the same class for the parameters of ``pruned``, with the state that survives.

        Parameter groups and their settings are kept. State of a parameter's shape (momentum, variance) is
        narrowed as the parameter is, single numbers (step counts) are copied; so training goes on
        as it would with ``plan.mask(model)``. Nothing given is changed.

        A learning-rate scheduler is pointed to the result by ``scheduler.optimizer = narrowed``: it reads and
        writes the rates of the parameter groups, which are the same. Gradient scalers hold nothing
        that belongs to parameters. For moving averages see :meth:`apply_state_dict`.

        Args:
            optimizer: the optimiser that trains ``model``.
            model: the model that the optimiser has the parameters of: the original, or ``plan.mask`` of it.
            pruned: what ``plan.apply(model)`` returned.

        Raises:
            TrainingError: if the optimiser is not that of ``model``, if ``pruned`` has other shapes than the
                plan says, or if the optimiser keeps state that cannot be narrowed (the factored
                variances of Adafactor, the flat history of LBFGS).
            PlanError: if the plan is for another architecture.
        """
        from ..training import narrow_optimizer

        return narrow_optimizer(self, optimizer, model, pruned)

    def validate(self) -> None:
        """Check that the fields are what they should be.

        Raises:
            PlanError: names the field and what is wrong with it.
        """
        if not isinstance(self.model, str):
            raise PlanError(f"the plan's 'model' must be the name of a class, got {self.model!r}.")
        for name in ("inputs", "shapes", "sizes", "removed", "regions", "settings", "costs", "config"):
            if not isinstance(getattr(self, name), Mapping):
                raise PlanError(f"the plan's {name!r} must map names to values, got {getattr(self, name)!r}.")
        for name, shape in self.shapes.items():
            if not _whole_numbers(shape):
                raise PlanError(f"the plan's shape of {name!r} must be a list of sizes, got {shape!r}.")
        for path, region in self.regions.items():
            if not isinstance(region, Mapping) or not {"inputs", "outside"} <= region.keys():
                raise PlanError(f"the plan's region {path!r} must hold 'inputs' and 'outside'.")
        for group, gone in self.removed.items():
            size = self.sizes.get(group)
            if type(size) is not int:
                raise PlanError(f"the plan removes units of {group!r}, a group of which it knows no size.")
            if not _whole_numbers(gone):
                raise PlanError(
                    f"the plan's units of {group!r} must be a list of whole numbers, got {gone!r}."
                )
            wrong = [unit for unit in gone if not 0 <= unit < size]
            if wrong:
                raise PlanError(
                    f"the plan names units {few(map(str, wrong))} of the group {group!r}, which has {size} "
                    f"units."
                )
            ascending = all(a < b for a, b in itertools.pairwise(gone))  # as they mostly are: no set is made
            if not ascending and len(set(gone)) < len(gone):
                raise PlanError(f"the plan names units of the group {group!r} more than once.")
            if len(gone) == size:
                raise PlanError(
                    f"the plan removes every unit of the group {group!r}; at least one must stay."
                )
        if not all(type(value) is int and value > 0 for value in self.config.values()):
            raise PlanError(f"the plan's 'config' must map names to positive integers, got {self.config!r}.")
        for name, pair in self.costs.items():
            if not _whole_numbers(pair) or len(pair) != 2:
                raise PlanError(f"the plan's cost {name!r} must be two whole numbers, got {pair!r}.")
        plan_file.check_sizes(self)

    def __repr__(self) -> str:
        gone = sum(len(units) for units in self.removed.values())
        count = len(self.branches)
        branches = f", and {count} residual branch{'es' if count > 1 else ''}" if count else ""
        return (
            f"PruningPlan({self.model}: removes {gone} of {sum(self.sizes.values())} units in "
            f"{len(self.removed)} of {len(self.sizes)} groups{branches})"
        )

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        from ..pages import plan_html

        return plan_html(self)

    def text(self, all: bool = False) -> str:
        """The plan for people: what becomes of each group, and the notes.

        Args:
            all: a line for every group, where the short form joins those of repeated blocks.
        """
        alike: dict[Any, list[str]] = {}
        for narrowed in self:
            key = (starred(narrowed.group), narrowed.size, narrowed.kept)
            alike.setdefault(narrowed.group if all else key, []).append(narrowed.group)
        rows = [
            (joined(names), self.sizes[names[0]], len(self.removed.get(names[0], ())))
            for names in alike.values()
        ]
        width = max((len(name) for name, _, _ in rows), default=0)
        lines = [repr(self)]
        lines += [f"  {name:<{width}}  {size:>6} -> {size - gone:>6}" for name, size, gone in rows]
        if self.branches:
            lines.append(f"  residual branches that go: {', '.join(self.branches)}")
        lines += [f"  note: {note}" for note in self.notes]
        for name, what in (("params", "parameters"), ("macs", "multiply-accumulates")):
            if name in (counts := self.counts()):
                before, after = counts[name]
                share = f" ({after / before:.2f}x)" if before else ""
                lines.append(f"  {what} {before:,} -> {after:,}{share}")
        return "\n".join(lines)

    def counts(self) -> Mapping[str, list[int]]:
        """Parameters and multiply-accumulates before and after, ``{"params": [2, 1], "macs": [2, 1]}``.

        Empty where nobody knows: they are counted from the analysis that the plan was made from, which is
        there as long as the model is, and are written into files by :meth:`save`.
        """
        graph = self.came_from()
        if self.costs or graph is None:
            return self.costs
        from .cost_model import CostModel

        model = CostModel(graph)
        before, after = model.whole({}), model(self.removed)
        return {"params": [before.params, after.params], "macs": [before.macs, after.macs]}

    def diff(self, other: PruningPlan) -> PlanDiff:
        """How ``other`` differs from this plan; false if it does not; printing it says how."""
        return diff(self, other)

    def save(self, path: str | Path) -> None:
        """Write the plan to a ``.json`` file, which appears there only when it is whole.

        Raises:
            OutputError: if it cannot be written.
        """
        from ..files import check_output, write

        check_output(Path(path), (".json",))
        text = replace(self, costs=self.counts()).to_json()
        write(Path(path), lambda draft: draft.write_text(text, encoding="utf-8"))

    @staticmethod
    def load(path: str | Path) -> PruningPlan:
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: if the file cannot be read, or holds no such plan.
        """
        try:
            if Path(path).stat().st_size > plan_file.MOST_BYTES:
                raise PlanError(
                    f"{path} is no pruning plan: it has more than {plan_file.MOST_BYTES:,} bytes."
                )
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(
                f"the plan {path} cannot be read: {told(error)}; plans are files of text, as plan.save and "
                "fxprune plan --out write them"
            ) from error
        try:
            return PruningPlan.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def to_json(self) -> str:
        """The plan as a JSON text; equal plans give equal texts.

        Each tensor and each group has a line of its own; positions are written as ranges (``"0-3, 7"``),
        and may also be lists.
        """
        return plan_file.write(self)

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: if the text is no such plan, or stands for more than a plan can mean.
        """
        return plan_file.read(text)
