"""The backend for ``torch.compile``: it prunes each graph that Dynamo hands over, and passes it on.

``torch.compile(model, backend="fxprune", options={"ratio": 0.5})`` works wherever fxprune is installed,
without an import: it is registered under the entry point ``torch_dynamo_backends``.

The narrow network has tensors of its own; those of the model are neither read again nor trained. Where torch
compiles a model a second time (for another batch size, for the other of train and eval mode), what was
removed is removed again, and the narrow tensors are the same ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .api import analyze, compensate, plan
from .capture.dynamo import Batches, example, named_inputs
from .coupling.graph import CouplingGraph
from .coupling.groups import Group
from .dead_channels import trains, without_dead_channels
from .errors import PlanError, SelectionError
from .exporting import take_along_dim
from .inputs import equal
from .planning.patterns import nearest
from .planning.plan import PruningPlan
from .planning.selection import Selection
from .program import exchange, named_tensors

__all__ = ["backend", "parameters", "state_dict"]

_LOG = logging.getLogger("fxprune")
_OWN = ("inner", "inner_options", "mode", "plan")
_LOSSLESS = "lossless"
_BRANCHES = ("branches", "depth")
"""What the backend leaves alone: another compilation of the model would not know which branches went."""
_PLANNING = tuple(item.name for item in fields(Selection) if item.name not in _BRANCHES)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Prune a graph of Dynamo's and have another backend compile it; called by ``torch.compile``.

    What a graph takes and gives at a graph break keeps its width; a warning of the logger ``fxprune`` says
    where a graph breaks.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        options: the arguments of :func:`fxprune.plan` by name, ``{"ratio": 0.5, "importance": "l1"}``,
            without ``branches`` and ``depth``; or ``"plan"``, a :class:`~fxprune.PruningPlan` for the model
            or the path of a plan file, in place of them; or ``"mode": "lossless"``, which removes what
            :func:`fxprune.lossless` does, and leaves a graph in training mode as it is (compile again after
            training). With ``"calibrate"`` the layers that are left make up for what went: its batches are
            inputs of the model, as a dict by name where the graph takes several. ``"inner"`` is the backend
            that compiles the narrow graph, ``"inductor"`` unless given, and ``"inner_options"`` its options.
        mode: mode of the inner backend, ``"max-autotune"`` say.

    Raises:
        SelectionError: for an option that there is not; names the nearest. Else as :func:`fxprune.plan`.
    """
    given = dict(options or {})
    unknown = [name for name in given if name not in (*_OWN, *_PLANNING)]
    if set(unknown) & set(_BRANCHES):
        raise SelectionError(
            f"the backend fxprune narrows layers; it removes no residual branches ({unknown[0]!r}). Compile "
            f"what fxprune.prune returns, with any backend."
        )
    if unknown:
        close = ", ".join(map(repr, nearest(str(unknown[0]), (*_OWN, *_PLANNING))))
        raise SelectionError(f"the backend fxprune has no option {unknown[0]!r}; the nearest are {close}.")
    inner, inner_options = given.pop("inner", "inductor"), given.pop("inner_options", None)
    how = given.get("mode", _LOSSLESS)
    if how != _LOSSLESS:
        raise SelectionError(
            f"the option 'mode' is {_LOSSLESS!r} or left out, got {how!r}; a mode of inductor's is given in "
            "'inner_options', or as torch.compile(mode=...)."
        )
    if "mode" in given and len(given) > 1:
        others = ", ".join(map(repr, given.keys() - {"mode"}))
        raise SelectionError(f"'mode': {_LOSSLESS!r} decides alone what goes; leave out {others}.")
    run = _RUNS.setdefault(_signature(given), _Run(given))
    number = next(run.numbers)
    narrow = run.narrow(gm, tuple(example_inputs), given, number)
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and getattr(reason, "graph_break", False):
        run.broken = True
        _LOG.warning(
            "graph %d ends at a graph break (%s): what crosses it keeps its width", number, reason.reason
        )
    compiled: Callable[..., Any] = _inner(inner, mode, inner_options)(narrow, list(example_inputs))
    return compiled


def state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of ``model`` with the narrow tensors in place of those that the backend has pruned.

    It has all keys of ``model.state_dict()``. Of a model that was compiled with several options it holds what
    the last compilation made.

    Args:
        model: the model that was compiled, or what ``torch.compile`` returned, after it has run once.
    """
    known = _known_tensors()
    state = getattr(model, "_orig_mod", model).state_dict(keep_vars=True)
    return {
        name: known.get(value, value).detach() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters to train: the narrow ones in place of those that the backend has pruned.

    Args:
        model: the model that was compiled, or what ``torch.compile`` returned, after it has run once.
    """
    known = _known_tensors()
    for parameter in getattr(model, "_orig_mod", model).parameters():
        yield known.get(parameter, parameter)


def _reset() -> None:
    """Forget all models; ``torch._dynamo.reset`` calls it."""
    _RUNS.clear()


backend.reset = _reset  # type: ignore[attr-defined]


@dataclass
class _Run:
    """What was pruned with the same options.

    Attributes:
        options: what was asked for; kept, so that what tells it from others stays so.
        tensors: by tensor of a model the narrow one.
        removed: by tensor of a model, for each group that begins there, its size and the positions that went.
        broken: whether a graph has ended at a graph break.
        numbers: of the graphs.
    """

    options: Mapping[str, Any]
    tensors: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    removed: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    broken: bool = False
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 62)))

    def narrow(
        self, gm: fx.GraphModule, inputs: tuple[Any, ...], options: dict[str, Any], number: int
    ) -> nn.Module:
        """The narrow graph, or ``gm`` itself where it has to stay as it is."""
        named = {**dict(named_tensors(gm)), **named_inputs(gm, inputs)}
        graph = analyze(
            gm,
            inputs,
            **{name: options[name] for name in ("free_outputs", "fill_outputs") if name in options},
        )
        known = self._known(graph, named)
        fixed = {group.name for group, _ in known.values()}
        if options.get("mode") == _LOSSLESS:
            if any(trains(node) for node in graph.captured.program.graph.nodes):
                _LOG.warning("graph %d is in training mode; it stays as it is", number)
                return gm
            any_size = any(isinstance(given, torch.SymInt) for given in inputs)
            made, pruned = without_dead_channels(graph, example(gm, inputs), {}, any_size)
        elif "plan" in options:
            wanted = _of_plan(graph, _loaded(options["plan"]), fixed)
            made, pruned = self._narrowed(gm, plan(gm, inputs, 0.0), wanted, known)
        else:
            options, data = self._calibrated(gm, inputs, options, bool(fixed), number)
            made, pruned = self._narrowed(gm, self._planned(gm, inputs, graph, options, fixed), {}, known)
            if data is not None and made.removed:
                again = {name: options[name] for name in ("rebuild", "seed") if name in options}
                pruned = compensate(pruned, gm, data, **again)
                _LOG.info("graph %d: %s", number, getattr(pruned, "meta", {}).get("compensation"))
        _LOG.info("graph %d: %s", number, made)
        if not made.removed:
            return gm
        if not self._share(pruned, named, exactly=options.get("mode") == _LOSSLESS):
            _LOG.warning(
                "graph %d shares tensors with another that narrows them differently; it stays as it is",
                number,
            )
            return gm
        self._remember(graph, pruned, named, made.removed)
        return _with_free_sizes(pruned)

    def _narrowed(
        self,
        gm: fx.GraphModule,
        made: PruningPlan,
        wanted: Mapping[str, list[int]],
        known: Mapping[str, tuple[Group, list[int]]],
    ) -> tuple[PruningPlan, nn.Module]:
        """The plan with what else is removed, and was before, and what it makes."""
        made = made.with_removed({**wanted, **{group.name: gone for group, gone in known.values()}})
        return made, made.apply(gm) if made.removed else gm

    def _calibrated(
        self, gm: fx.GraphModule, inputs: tuple[Any, ...], options: dict[str, Any], known: bool, number: int
    ) -> tuple[dict[str, Any], Iterable[Any] | None]:
        """The options with calibration data for this graph, and these data; neither for a later part."""
        data, pick = options.get("calibrate"), options.get("pick")
        options = {name: value for name, value in options.items() if name not in ("calibrate", "pick")}
        if data is None or known:
            return {name: value for name, value in options.items() if name != "rebuild"}, None
        if self.broken:
            _LOG.warning("graph %d begins behind a graph break, where there are no calibration data", number)
            return {name: value for name, value in options.items() if name != "rebuild"}, None
        batches = Batches(gm, inputs, data, pick)
        return {**options, "calibrate": batches}, batches

    def _known(self, graph: CouplingGraph, named: Mapping[str, Tensor]) -> dict[str, tuple[Group, list[int]]]:
        """The groups that were pruned before, with the positions to remove."""
        found = {}
        for name, (group, order) in _begin(graph, lambda tensor: tensor).items():
            tensor, _, suffix = name.rpartition("[")
            groups = self.removed.get(named[tensor], {}) if tensor in named else {}
            size, positions = groups.get(suffix, (None, ()))
            if size == group.size:
                found[name] = group, sorted(order[i] for i in positions)
        return found

    def _planned(
        self,
        gm: fx.GraphModule,
        inputs: tuple[Any, ...],
        graph: CouplingGraph,
        options: dict[str, Any],
        fixed: set[str],
    ) -> PruningPlan:
        """A plan for what was not pruned before."""
        if fixed >= {group.name for group in graph.groups}:
            return plan(gm, inputs, 0.0)
        where = options.get("where")
        if fixed:
            options = {
                **options,
                "where": lambda group: group.name not in fixed and (where is None or where(group)),
            }
        return plan(gm, inputs, **options, depth=False)

    def _share(self, pruned: nn.Module, named: Mapping[str, Tensor], exactly: bool) -> bool:
        """Give ``pruned`` the narrow tensors that are there; false where they are others.

        Others are those of other shapes; with ``exactly``, those of other values, too: another graph may make
        of the same layers something else, and what is zero in one is not in the other.
        """
        new: dict[int, Tensor] = {}
        for name, tensor in named_tensors(pruned):
            known = self.tensors.get(named[name]) if name in named else None
            if known is not None:
                if known.shape != tensor.shape or (exactly and not equal(known, tensor)):
                    return False
                new[id(tensor)] = known
        exchange(pruned, new)
        return True

    def _remember(
        self,
        graph: CouplingGraph,
        pruned: nn.Module,
        named: Mapping[str, Tensor],
        removed: Mapping[str, Sequence[int]],
    ) -> None:
        for name, narrow in named_tensors(pruned):
            if name in named:
                self.tensors[named[name]] = narrow
        for name, (group, order) in _begin(graph, lambda tensor: tensor).items():
            tensor, _, suffix = name.rpartition("[")
            place = {position: i for i, position in enumerate(order)}
            positions = sorted(place[i] for i in removed.get(group.name, ()))
            self.removed[named[tensor]] = {
                **self.removed.get(named[tensor], {}),
                suffix: (group.size, positions),
            }


_RUNS: dict[str, _Run] = {}


def _known_tensors() -> WeakTensorKeyDictionary:
    known = WeakTensorKeyDictionary()
    for run in _RUNS.values():
        known.update(run.tensors)
    return known


def _signature(options: Mapping[str, Any]) -> str:
    """The same for the same options; calibration data are the same if they are one object."""
    said = {name: id(value) if name == "calibrate" else repr(value) for name, value in options.items()}
    return repr(sorted(said.items()))


def _begin(graph: CouplingGraph, rank: Callable[[str], Any]) -> dict[str, tuple[Group, list[int]]]:
    """The groups of ``graph`` by the axis on which each begins when tensors are ordered by ``rank``.

    Groups are named after the first of their axes, and their units are counted along it; the order of the
    tensors in a graph of Dynamo's is another than in a state dict. With each group come its positions in the
    order of the new first axis.
    """
    found: list[tuple[Any, list[int], Group, str]] = []
    for group in graph.groups:
        members = sorted(group.members, key=lambda member: (rank(member.axis.name), member.axis.dim))
        units = [int(unit) for member in members for unit in member.units.reshape(-1) if unit >= 0]
        axis, along = members[0].axis, members[0].units.reshape(-1)
        begin = rank(axis.name), axis.dim, int((along >= 0).argmax())
        found.append((begin, list(dict.fromkeys(units)), group, str(axis)))
    named: dict[str, tuple[Group, list[int]]] = {}
    counts: dict[str, int] = {}
    for _, order, group, name in sorted(found, key=lambda item: item[0]):
        counts[name] = counts.get(name, 0) + 1
        named[name if counts[name] == 1 else f"{name}:{counts[name]}"] = group, order
    return named


def _of_plan(graph: CouplingGraph, given: PruningPlan, fixed: set[str]) -> dict[str, list[int]]:
    """What of a plan for the model this graph can do, by the graph's own names of groups.

    Raises:
        PlanError: if a group has another size in the plan, or the plan removes residual branches.
    """
    if given.branches:
        raise PlanError(
            "the plan removes residual branches, which the backend fxprune does not. Compile what "
            "plan.apply(model) returns, with any backend."
        )
    places = {name: i for i, name in enumerate(given.shapes)}
    wanted: dict[str, list[int]] = {}
    for name, (group, order) in _begin(graph, lambda tensor: places.get(tensor, len(places))).items():
        if name not in given.removed or group.name in fixed:
            continue
        if given.sizes[name] != group.size:
            raise PlanError(
                f"the plan has {given.sizes[name]} units in the group {name!r}, the graph that "
                "torch.compile made "
                f"has {group.size}. Plan with the backend's own options in place of a plan."
            )
        wanted[group.name] = sorted(order[i] for i in given.removed[name])
    return wanted


def _with_free_sizes(module: nn.Module) -> nn.Module:
    """The graph without calls by which torch would compile it for one size alone; changed in place."""
    if isinstance(module, fx.GraphModule):
        for node in module.graph.find_nodes(op="call_function", target=torch.take_along_dim):
            if len(node.args) == 3 and not node.kwargs:
                node.target = take_along_dim
        module.recompile()
    return module


def _loaded(given: Any) -> PruningPlan:
    if isinstance(given, PruningPlan):
        return given
    if isinstance(given, (str, Path)):
        return PruningPlan.load(given)
    raise SelectionError(f"the option 'plan' takes a plan or the path of a plan file, got {given!r}.")


def _inner(inner: Any, mode: str | None, options: Any) -> Callable[[nn.Module, list[Any]], Any]:
    """The backend that compiles what is left."""
    if callable(inner):
        return inner
    if inner == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)
    found = torch._dynamo.lookup_backend(inner)
    extra = {name: value for name, value in (("mode", mode), ("options", options)) if value}
    return lambda gm, inputs: found(gm, inputs, **extra)  # type: ignore[arg-type]
