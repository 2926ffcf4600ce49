"""The selection: how much is to go, and from where."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast, get_args, overload

from torch import Tensor, nn

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group
from ..errors import BudgetError, RatioError, SelectionError
from ..importance import Importance, describe
from .budget import Budget
from .patterns import Pattern, nearest, spelled

Scope = Literal["local", "global", "isomorphic"]
Form = Literal["graph", "module"]

AUTO = "auto"
"""All outputs that keep several layers wide, in ``fill_outputs`` those beside the result; as an importance,
the best that what is given allows."""


@dataclass(frozen=True)
class Selection:
    """What to remove: the arguments of :func:`fxprune.plan`, in one object that can be kept and varied.

        half = Selection(0.5, scope="global")
        plan = fxprune.plan(model, x, half)
        gentler = dataclasses.replace(half, ratio=0.3)

    ``fxprune.plan(model, x, 0.5, scope="global")`` is short for the same.

    Layers are named as in ``model.named_modules()``: ``"layer1.0.conv1"``, ``"layer1"`` for all in it,
    ``"layer*.conv1"``, or by type, ``nn.Conv2d``. What is meant is what the layer puts out; the inputs of
    a layer are the outputs of others (``"fc.weight[1]"`` names that very axis).

    Attributes:
        ratio: share of units to remove, ``0 <= ratio < 1``; 0.5 unless a budget is given. Every row of
            units keeps one.
        importance: ``"l1"``, ``"l2"``, ``"random"`` or another name in ``fxprune.importance.BUILT_IN``; a
            criterion, ``fxprune.importance.Taylor(loss, data)`` say; or a function ``group -> scores`` that
            returns one number for each of ``group.size`` units. The lowest go first. ``"auto"`` is ``"l2"``,
            and with calibration data :class:`fxprune.compensation.Reconstruction`.
        where: only groups for which this is true are narrowed, ``lambda group: group.exact`` say.
        seed: for criteria with something random.
        scope: what loses ``ratio`` of its units: ``"local"`` every group, ``"global"`` all groups ranked
            together, ``"isomorphic"`` the groups of the same structure ranked together (Fang et al., ECCV
            2024, https://arxiv.org/abs/2407.04616). Ranking compares scores between groups. ``"auto"`` is
            ``"local"``, but where calibration data choose and a budget is given, both are tried on a part of
            the data, and that counts by which the outputs lose less on another part.
        ratios: ratios of single layers, ``{"layer1": 0.3, nn.Linear: 0.2}``. Where several apply, the
            last counts.
        scopes: layers that are ranked together, and the ratio of their units to remove,
            ``{("layer1", "layer2"): 0.3, "layer3": 0.6}``. ``ratios`` takes precedence.
        max_ratio: largest share that is removed from any row.
        keep: layers that stay as wide as they are.
        round_to: what the units left in each row are a multiple of, as near as can be; one number, or one
            by layer. Where rows are shorter than that, their sum is. What cannot be rounded stays whole.
            8 if the budget has a latency, else 1.
        budget: what may be left, in place of ``ratio``: ``Budget(macs=0.5)``.
        heads: share of whole rows to remove: of the heads of every attention, of the groups of every grouped
            convolution or group norm, ``0 <= heads < 1``; those with the lowest sum of scores go. The rows
            that remain are narrowed as all else; ``ratio=0, heads=0.25`` removes heads only.
        branches: names of residual branches to remove as a whole, the ``f`` of ``y = x + f(x)``, as
            ``fxprune.analyze(model, x).branches`` has them; what else goes is decided for what is left.
        depth: with calibration data and a budget, whether further residual branches go as a whole where that
            costs the outputs less than narrower layers: True, False, or the largest number of them. Numbers
            of branches are tried, so that the choice takes several times as long. None goes that holds a
            layer of ``keep``, ``ratios`` or ``scopes``, or a group that is not in ``where``. ``"auto"`` is
            True for a latency, where the result is a graph and not ``uniform``, else False.
        free_outputs: as for :func:`fxprune.analyze`.
        fill_outputs: as for :func:`fxprune.analyze`; with ``into="module"`` none, since the code stays.
        into: the form of the result. ``"graph"``: a ``torch.fx.GraphModule``, in which every literal can be
            rewritten. ``"module"``: a copy of the model of its own class, with its own methods; what its code
            keeps as wide as it is stays whole, or goes by whole rows (attention heads), and the plan's notes
            name the lines.
        uniform: layers of the same structure lose equally many units, attention heads go as a whole, and
            widths of heads stay: what the configuration of a class can say
            (:func:`fxprune.save_pretrained`). With ``into="module"``, kinds of layers whose widths the
            model's ``config`` cannot say stay whole, and the result's own ``config`` says the widths, so that
            the checkpoints of trainers open as all others.
        calibrate: unlabelled inputs, with which :func:`fxprune.prune` lets the layers that are left make up
            for what went: batches in a list, a data loader or any other iterable. A batch is a tensor, a
            tuple of positional inputs or a dict of keyword inputs.
        pick: from a batch to the inputs, where it holds more: ``lambda batch: batch[0]``.
        rebuild: with calibration data, steps of a fit by gradients that follows, for each residual block or
            part of one: some hundred give more accuracy for more time. 0 for none.

    Raises:
        RatioError, SelectionError, BudgetError: for arguments that are no such thing or contradict each
            other; names the nearest valid choice.
    """

    ratio: float | None = None
    importance: Importance = AUTO
    where: Callable[[Group], bool] | None = None
    seed: int = 0
    _: KW_ONLY
    scope: Scope | Literal["auto"] = "auto"
    ratios: Mapping[Pattern, float] = field(default_factory=dict)
    scopes: Mapping[Pattern | tuple[Pattern, ...], float] = field(default_factory=dict)
    max_ratio: float = 1.0
    keep: Pattern | Sequence[Pattern] = ()
    round_to: int | Mapping[Pattern, int] | None = None
    budget: Budget | None = None
    heads: float = 0.0
    branches: Sequence[str] = ()
    depth: bool | int | Literal["auto"] = "auto"
    free_outputs: str | Sequence[str] = ()
    fill_outputs: str | Sequence[str] = AUTO
    into: Form = "graph"
    uniform: bool = False
    calibrate: Iterable[Any] | None = None
    pick: Callable[[Any], Any] | None = None
    rebuild: int = 0

    def __post_init__(self) -> None:
        self._check_calibration()
        self._check_amount()
        self._check_choice()
        self._check_tables()
        self._check_bounds()
        self._check_rounding()
        self._check_branches()
        self._check_depth()
        for name in ("free_outputs", "fill_outputs"):
            self._set(name, output_names(name, getattr(self, name)))
        if self.into == "module" and set(self.fill_outputs) - {AUTO}:
            raise SelectionError(
                f'fill_outputs={self.fill_outputs!r} needs a graph: with into="module" the code of the model '
                f"returns what it returns. Leave one of the two out."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_calibration(self) -> None:
        if self.scope == AUTO:
            by_data = self.calibrate is not None and self.importance == AUTO and self.budget is not None
            self._set("scope", AUTO if by_data else "local")
        if self.calibrate is None and self.importance == AUTO:
            self._set("importance", "l2")
        if type(self.rebuild) is not int or self.rebuild < 0:
            raise SelectionError(f"rebuild is a number of steps, 0 for none; got {self.rebuild!r}.")
        if self.rebuild and self.calibrate is None:
            raise SelectionError("rebuild needs data to fit to: give calibrate, batches of inputs.")
        if isinstance(self.calibrate, Iterator):  # data are gone through for the plan and for the weights
            self._set("calibrate", list(self.calibrate))

    def _check_amount(self) -> None:
        ratio, budget = self.ratio, self.budget
        if isinstance(ratio, Budget):
            raise BudgetError("a budget is given by name, in place of the ratio: budget=Budget(macs=0.5).")
        if isinstance(ratio, Selection):
            raise SelectionError("a Selection stands alone: give its other arguments to Selection itself.")
        if budget is not None and not isinstance(budget, Budget):
            raise BudgetError(f"budget must be an fxprune.Budget, such as Budget(macs=0.5); got {budget!r}.")
        if budget is not None and ratio is not None:
            raise BudgetError(
                f"ratio={ratio!r} and a budget contradict each other: the budget decides how much goes. "
                f"Leave one of them out (max_ratio bounds what a budget takes from one group)."
            )
        if budget is None:
            self._set("ratio", check_ratio(0.5 if ratio is None else ratio))
        rows = "rows (attention heads, convolution groups) to remove"
        self._set("heads", check_ratio(self.heads, "heads", rows))

    def _check_choice(self) -> None:
        if self.where is not None and not callable(self.where):
            raise SelectionError(
                f"where is a function of a group that says whether it may be narrowed, such as "
                f"lambda group: group.exact; got {self.where!r}. By name, use keep, ratios or scopes."
            )
        valid = get_args(Scope)
        if self.scope not in (AUTO, *valid):
            raise SelectionError(
                f"unknown scope {self.scope!r}; did you mean {nearest(str(self.scope), valid)[0]!r}? "
                f"There are {', '.join(map(repr, valid))}."
            )

        if self.into not in get_args(Form):
            raise SelectionError(f"into is one of {', '.join(map(repr, get_args(Form)))}; got {self.into!r}.")

    def _check_tables(self) -> None:
        for name in ("ratios", "scopes"):
            table = getattr(self, name)
            if table is not None and not isinstance(table, Mapping):
                raise SelectionError(f"{name} maps names or module types to ratios; got {table!r}.")
            self._set(name, dict(table or {}))
            for key, value in getattr(self, name).items():
                check_ratio(value, f"{name}[{key!r}]")

    def _check_bounds(self) -> None:
        most: Any = self.max_ratio
        number = isinstance(most, Real) and not isinstance(most, bool)
        if not number or not 0 < most <= 1:
            raise RatioError(
                f"max_ratio is the largest share that a group may lose, 0 < max_ratio <= 1; got {most!r}."
            )
        self._set("max_ratio", float(most))
        for name, value in self.shares().items():
            if value > most:
                raise RatioError(
                    f"{name} = {value:g} cannot be met with max_ratio = {most:g}; the nearest that "
                    f"can is {name} = {most:g}."
                )

    def _check_rounding(self) -> None:
        round_to, latency = self.round_to, self.budget.latency if self.budget is not None else None
        for value in round_to.values() if isinstance(round_to, Mapping) else [round_to]:
            if value is not None and (type(value) is not int or value < 1):
                raise SelectionError(
                    f"round_to is a whole number from 1 on, or maps names or module types to such; "
                    f"got {value!r}."
                )
        if round_to is None and latency is not None:
            self._set("round_to", 8)  # on most devices other widths take as long as the next multiple of 8

    def _check_branches(self) -> None:
        names: Any = self.branches
        if isinstance(names, str) or not isinstance(names, (list, tuple, set, frozenset)):
            raise SelectionError(
                f"branches takes a list of names, as fxprune.analyze(model, inputs).branches has them; got "
                f"{names!r}."
            )
        self._set("branches", tuple(sorted(names, key=str)))

    def _check_depth(self) -> None:
        depth, budget = self.depth, self.budget
        if depth == AUTO:
            by_clock = self.calibrate is not None and budget is not None and budget.latency is not None
            self._set("depth", by_clock and not self.uniform)
            return
        if not isinstance(depth, int) or depth < 0:
            raise SelectionError(
                f"depth is True, False, {AUTO!r} or the largest number of residual branches that may go; got "
                f"{depth!r}. Those that are to go by name are given as branches."
            )
        if not depth:
            return
        if self.calibrate is None or budget is None:
            raise SelectionError(
                "depth needs a budget, which says how much goes, and calibration data, which say whether "
                "residual branches are worth more than widths: give budget and calibrate, or name the "
                "branches that are to go."
            )
        if self.uniform:
            raise SelectionError(
                f"depth={depth!r} removes residual branches, which uniform=True does not allow. Leave one of "
                f"the two out."
            )

    def shares(self) -> dict[str, float]:
        """All shares that are to go, by the argument that says so."""
        found: dict[str, float] = {"ratio": self.ratio or 0.0, "heads": self.heads}
        found |= {f"ratios[{key!r}]": value for key, value in self.ratios.items()}
        return found | {f"scopes[{key!r}]": value for key, value in self.scopes.items()}

    @property
    def kept(self) -> tuple[Pattern, ...]:
        """The patterns in ``keep``."""
        keep: Any = self.keep
        return tuple(keep) if isinstance(keep, (list, tuple, set, frozenset)) else (keep,)

    @property
    def patterned(self) -> bool:
        """Whether anything is said of single layers."""
        by_layer = self.kept or self.ratios or self.scopes or isinstance(self.round_to, Mapping)
        return bool(by_layer)

    def settings(self) -> dict[str, Any]:
        """What is not left at its default, as plain data; of outputs, the plan says more."""
        found: dict[str, Any] = {"ratio": self.ratio}
        if self.scope != "local":
            found["scope"] = self.scope
        for name in ("ratios", "scopes"):
            table: Mapping[Any, float] = getattr(self, name)
            if table:
                found[name] = {spelled(key): float(value) for key, value in table.items()}
        if self.max_ratio < 1:
            found["max_ratio"] = self.max_ratio
        if self.kept:
            found["keep"] = [spelled(pattern) for pattern in self.kept]
        if isinstance(self.round_to, Mapping):
            found["round_to"] = {spelled(key): value for key, value in self.round_to.items()}
        elif self.round_to is not None:
            found["round_to"] = self.round_to
        if self.heads:
            found["heads"] = self.heads
        if self.uniform:
            found["uniform"] = True
        if self.depth:
            found["depth"] = self.depth
        if self.budget is not None:
            found["budget"] = self.budget.settings()
        return found | {"importance": describe(self.importance), "seed": self.seed}


def check_ratio(ratio: Any, name: str = "ratio", what: str = "units to remove from every group") -> float:
    """Refuse a ratio outside ``0 <= ratio < 1``."""
    number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not number or not 0 <= ratio < 1:
        bound = "heads" if name == "heads" else "ratio"
        share = number and bound == "ratio" and 1 < ratio < 100
        percent = f" For {ratio:g} % give {ratio / 100:g}." if share else ""
        raise RatioError(f"{name} is the share of {what}, with 0 <= {bound} < 1; got {ratio!r}.{percent}")
    return float(ratio)


def output_names(option: str, given: Any) -> tuple[str, ...]:
    """The names of outputs given for an option.

    Raises:
        SelectionError: if they are no names.
    """
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(n, str) for n in names):
        raise SelectionError(
            f"{option} takes names of outputs (encoder_last_hidden_state, hidden_states.*), {AUTO!r} or (), "
            f"got {given!r}"
        )
    return tuple(names) if not isinstance(names, (set, frozenset)) else tuple(sorted(names))


_P = ParamSpec("_P")
_R_co = TypeVar("_R_co", covariant=True)


class _TakesSelection(Protocol[_P, _R_co]):
    """A function of a model and its inputs, or of an analysis, and of a selection or what it is made of."""

    @overload
    def __call__(self, model: nn.Module, example_inputs: Any, selection: Selection) -> _R_co: ...

    @overload
    def __call__(
        self, model: nn.Module, example_inputs: Any, *args: _P.args, **kwargs: _P.kwargs
    ) -> _R_co: ...

    @overload
    def __call__(self, model: CouplingGraph, selection: Selection) -> _R_co: ...

    @overload
    def __call__(self, model: CouplingGraph, *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...


def takes_selection(
    make: Callable[_P, Selection],
) -> Callable[[Callable[[nn.Module | CouplingGraph, Any, Selection], _R_co]], _TakesSelection[_P, _R_co]]:
    """Let a function take the arguments of :class:`Selection` in place of one.

    So they are stated, typed and described in one place. ``make`` is the class.
    """

    def decorate(
        function: Callable[[nn.Module | CouplingGraph, Any, Selection], _R_co],
    ) -> _TakesSelection[_P, _R_co]:
        @functools.wraps(function)
        def call(model: Any, *args: Any, **kwargs: Any) -> _R_co:
            if isinstance(model, CouplingGraph):
                example_inputs, args = None, _without_inputs(args, kwargs)
            else:
                example_inputs, args = _inputs(function.__name__, args, kwargs)
            alone = args if not kwargs else (kwargs.get("selection"),) if not args else ()
            given = len(args) + len(kwargs) == 1 and isinstance(alone[0], Selection)
            return function(model, example_inputs, alone[0] if given else make(*args, **kwargs))

        own = list(inspect.signature(function).parameters.values())[:2]
        signature = inspect.Signature([*own, *inspect.signature(make).parameters.values()])
        call.__signature__ = signature  # type: ignore[attr-defined]
        return cast(_TakesSelection[_P, _R_co], call)

    return decorate


def _inputs(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The inputs, and the other positional arguments."""
    if "example_inputs" in kwargs:
        return kwargs.pop("example_inputs"), args
    if not args:
        raise TypeError(f"{name}() misses the argument 'example_inputs'")
    return args[0], args[1:]


def _without_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The positional arguments that follow an analysis, which are those of a selection."""
    if "example_inputs" in kwargs or (args and isinstance(args[0], (Tensor, tuple, dict))):
        raise SelectionError(
            "a CouplingGraph knows its inputs: plan(graph, ratio=0.5), or plan(model, inputs, ratio=0.5)."
        )
    return args


__all__ = ["AUTO", "Scope", "Selection", "check_ratio", "output_names", "takes_selection"]
