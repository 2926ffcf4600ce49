"""Runs a program on meta tensors and applies a rule to every ATen call that comes out of it.

The three dialects of FX graphs (modules, functions, ATen) meet here: each node, whatever its dialect,
dissolves into ATen calls under a ``TorchDispatchMode``. No weight and no activation is ever computed.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._library.custom_ops import _maybe_get_opdef
from torch.fx.node import map_arg
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .. import convolution, known_shapes, time_steps
from ..capture.numbers import numbers
from ..errors import CaptureError, ExampleInputsError, FxpruneError
from ..files import told
from ..graph_module import clone_module
from ..guards import check_decision
from ..inputs import meta_like
from ..known_values import Values
from ..modes import either, holds
from ..module_registry import leaf_for
from ..nn import Apply, Fill, Pack
from ..nodes import describe_source, is_assertion, mutable, operator_name, size_read
from ..program import Program, computed_tensors, named_tensors
from ..trees import Leaf, flatten
from ..value_dependent import AS_LIST, ON_SHAPES, is_lengths
from .coupler import Coupler
from .leaf_calls import call_plain
from .meta_shapes import SHORTCUTS
from .number_origins import FREE, NumberOrigins
from .operator_calls import Follow
from .permutations import Permutation, find_permutation
from .registry import CUSTOM, rule_for
from .tables import decide_tables
from .units import Label, State, Value

from . import rules as _rules  # noqa: F401  isort: skip  (registers the rules)


@dataclass(frozen=True)
class Run:
    """The outcome of one interpretation.

    Attributes:
        coupler: units, couplings, rectangles and events.
        states: parameters and buffers by (first) name.
        values: for each node the tree of its outputs: tensors as :class:`Value`, numbers as they are.
        scalars: for each node the numbers that its pointwise ATen calls were given.
        outputs: what the graph returns: for each region (one named "" where the model is captured as a
            whole) a value for each leaf of its outputs.
        whole: the outputs that keep their shape, as pairs of region and leaf.
    """

    coupler: Coupler
    states: Mapping[str, State]
    values: Mapping[fx.Node, Any]
    scalars: Mapping[fx.Node, tuple[Any, ...]]
    outputs: Mapping[str, Mapping[Leaf, Value]]
    whole: frozenset[tuple[str, Leaf]]


def interpret(
    program: Program,
    inputs: list[Any],
    coupler: Coupler | None = None,
    seed: Callable[[str], list[Label | None] | None] = lambda name: None,
    known: Callable[[fx.Node], Callable[[], Any] | None] | None = None,
    observe: Follow | None = None,
    labels: bool = True,
    follow: Follow | None = None,
) -> Run:
    """Run ``program`` on meta ``inputs`` (one for each placeholder) and collect labels.

    Args:
        program: what to run.
        inputs: meta tensors and values.
        coupler: what rules speak to; a :class:`.checking.CheckingCoupler` in a check.
        seed: gives the labels of a parameter's or buffer's axes by its name, for a check; None for none.
        known: for a node that need not be run, a function that gives its values (a tree of
            :class:`Value` and numbers) when they are asked for; None for one that does.
        observe: called as ``follow`` is, but not for the calls of the other mode; inside of modules that are
            registered as a whole, too, with unlabelled values in place of tensors.
        labels: apply rules; without, shapes are all that is found out.
        follow: called after each ATen call, also without labels (see :data:`.calls.Follow`).

    Raises:
        ExampleInputsError: where a node fails on the inputs' shapes; names the node and its source.
    """
    interpreter = _Interpreter(program, coupler or Coupler(), seed, known, observe, labels, follow)
    with torch.no_grad():  # attention on meta tensors takes no fused path
        interpreter.run(inputs)
    interpreter.keep_views()
    if coupler is None and labels:
        decide_tables(interpreter.coupler, interpreter.source)
    return Run(
        interpreter.coupler,
        interpreter.states,
        interpreter.values,
        interpreter.scalars,
        interpreter.outputs,
        frozenset(interpreter.whole),
    )


_UNFORESEEN = (ValueError, IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError, AssertionError)
"""What a rule may fail with on arguments that it does not foresee; RuntimeError says that they are wrong."""

_SMALL = 1 << 12
"""Entries of a tensor that may be computed while analysing."""

OUTPUT = "output of the model"
DECIDES = "the code decides by its size, which changes with those of the inputs"
BY_SIZE = "how much of it is used is for the sizes of the inputs to say"


class _Interpreter(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is ever compiled; the guard against it would cost at every call

    def __init__(
        self,
        program: Program,
        coupler: Coupler,
        seed: Callable[[str], list[Label | None] | None],
        known: Callable[[fx.Node], Callable[[], Any] | None] | None,
        observe: Follow | None,
        labels: bool,
        follow: Follow | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.observe = observe
        self.follow = follow
        self.labels = labels
        self.known = known
        self.program = program
        self.coupler = coupler
        self.seed = seed
        self.states: dict[str, State] = {}
        self.values: dict[fx.Node, Any] = {}
        self.scalars: dict[fx.Node, tuple[Any, ...]] = {}
        self.outputs: dict[str, dict[Leaf, Value]] = {}
        self.whole: set[tuple[str, Leaf]] = set()
        self._packs: dict[int, Pack] = {}
        self._written: dict[int, tuple[list[bool], fx.Node | None]] = {}
        self._numbers: list[Any] = []
        self._metas: dict[int, torch.Tensor] = {}
        self._shuffles: dict[fx.Node, Permutation] = {}
        self._interior: set[fx.Node] = set()
        self._literal = False
        self._calls = 0
        self._idle = False  # in a call of the other mode, which costs nothing in this one
        self._composite: set[fx.Node] = set()
        self._origins = NumberOrigins(self.values.get, _kind)
        self._varying: set[int] | None = None  # numbers that a node is given, and that sizes decide
        self._modules: dict[str, torch.nn.Module] = {}
        self._groups = _grouped_weights(program) if labels else {}

    # -- ATen calls -----------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func) and not _stays_whole(func):
            with self:
                if func in time_steps.RECURRENT and self._is_for_few(func, args, kwargs):
                    return time_steps.over_few(func, args, lambda func, args: func.decompose(*args))
                return func.decompose(*args, **kwargs)
        if _takes_device(func):
            kwargs = {**kwargs, "device": torch.device("meta")}
        return self._aten(func, args, kwargs)

    def _is_for_few(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a few time steps tell all: none can be removed, and nobody counts what all of them take."""
        if self.observe is not None:
            return False
        dim, value = time_steps.time(func, args), self.coupler.value(args[0]) if self.labels else None
        return not kwargs and (value is None or (value.label(dim) is None and not value.is_open(dim)))

    def _aten(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one ATen call, and apply its rule."""
        if func is _AS_STRIDED:
            self.coupler.strides = args[0].stride()
        rule = rule_for(func)
        shortcut = rule.shapes if rule is not None and rule.shapes is not None else SHORTCUTS.get(func)
        out = shortcut(args, kwargs) if shortcut is not None else None
        if out is None:
            out = self._shapes_only(func, args, kwargs)
        if not self.labels:
            if self.follow is not None:
                self.follow(self.coupler.node, func, args, kwargs, out)
            return out
        self._calls += 1
        coupler = self.coupler
        coupler.begin(_name(func), args)
        if rule is None:
            self._unknown(func, args, kwargs)
        else:
            if coupler.operator == "slice" and coupler.node is not None and self.known is None:
                self._slice(coupler.node, args)  # where values are known, it has been looked at before
            if (
                self._literal
                and rule.family in ("movement", "constants")
                and coupler.operator not in _BY_DIMENSION
            ):
                coupler.depends_on_sizes()
            try:
                rule.apply(coupler, args, kwargs, out)
            except _UNFORESEEN:
                if rule.family == CUSTOM:
                    raise
                self._freeze(args, kwargs, f"used by {func} in a way that its rule does not foresee", "")
            for place in _written(func):
                if place < len(args) and isinstance(args[place], torch.Tensor):
                    storage = coupler.peek(args[place]).storage
                    self._written[id(storage)] = storage, coupler.node
            if rule.family == "pointwise":
                numbers = [a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)]
                if numbers:
                    self._numbers.append((coupler.operator.rstrip("_"), *numbers))
        if self.observe is not None and not self._idle:
            self.observe(coupler.node, func, args, kwargs, out)
        if self.follow is not None:
            self.follow(coupler.node, func, args, kwargs, out)
        return out

    def _slice(self, node: fx.Node, args: Any) -> None:
        """Where the sizes of the inputs say which entries a slice takes, all of them stay."""
        if self._varying is None:
            given = [n for n in node.all_input_nodes if isinstance(self.values.get(n), int)]
            self._varying = {
                self.values[n] for n in given if FREE in (self._origins.of(n) or ()) and _from_inputs(n)
            }
        if not self._varying:
            return
        said = {n for n in numbers(node.args, node.kwargs) if isinstance(n, int)} - self._varying
        value = self.coupler.value(args[0])
        dim = (args[1] if len(args) > 1 else 0) % len(value.shape)
        if not set(args[2:4]) - {None, 0, sys.maxsize, value.shape[dim]} <= said:
            self.coupler.freeze_dim(value, dim, BY_SIZE)

    def _shapes_only(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return known_shapes.result(func, args, kwargs, _on_shapes)
        except _ValuesNeeded as error:
            if func.namespace in ("aten", "prims"):
                raise
            raise CaptureError(
                f"the operator {func} does not run on shapes alone: it has no fake kernel. Next: write one, "
                f"a function of the same arguments that returns empty tensors of the right shapes, and "
                f'register it with torch\'s library.register_fake("{func._schema.name}").'
            ) from error
        except RuntimeError:
            if all(tensor.is_meta for tensor in pytree.tree_leaves(args) if isinstance(tensor, torch.Tensor)):
                raise
            # One is a constant with values, as torch.tensor makes it.
            return func(*pytree.tree_map_only(torch.Tensor, meta_like, args), **kwargs)

    def _unknown(self, func: Any, args: Any, kwargs: Any) -> None:
        remedy = self.coupler.remedy or f"fxprune.register_rule({func}, ...) says how it couples"
        self._freeze(args, kwargs, f"used by {func}, an operator without a rule", remedy)

    def _freeze(self, args: Any, kwargs: Any, reason: str, remedy: str) -> None:
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                value = self.coupler.value(tensor)
                self.coupler.freeze_value(value, reason, remedy)
                if value.shape != tuple(tensor.shape):  # resized in place
                    del tensor._fxprune_value  # type: ignore[attr-defined]

    # -- graph nodes ----------------------------------------------------------------------------

    def run(self, inputs: list[Any]) -> None:
        known = {}
        if self.known is not None:
            for node in self.program.graph.nodes:
                values = self.known(node)
                if values is not None:
                    known[node] = values
        env: dict[fx.Node, Any] = _Known(known)
        supply = iter(inputs)
        for node in self.program.graph.nodes:
            if node in known:
                continue
            self.coupler.node = node
            if node.op == "placeholder":
                result = next(supply)
            elif node.op == "get_attr":
                result = self._tensor(node.target)
            elif node.op == "output":
                self._finish(node, map_arg(node.args[0], env.__getitem__))
                continue
            else:
                args = map_arg(node.args, env.__getitem__)
                kwargs = map_arg(node.kwargs, env.__getitem__)
                self._numbers, self._calls, self._varying = [], 0, None
                self._idle = not holds(node.meta.get("only", ()), self.program.skeleton.training)
                self._literal = node.op != "call_module"  # sizes may stand in the call
                self.coupler.uses.call = args, kwargs
                if self.labels and node not in self._interior:
                    self._shuffle(node, env)
                try:
                    result = self._execute(node, args, kwargs)
                except FxpruneError as error:
                    error.node = node  # type: ignore[attr-defined]
                    raise
                except Exception as error:  # whatever a user's node raises
                    needed = "number" in node.meta or _needs_values(error, node)
                    result = self._numbers_of(node, env) if needed else None
                    if not isinstance(result, (bool, int, float, list, np.ndarray)):
                        raise _failed(node, error, needed, args, self._shapes(node)) from error
                if self._numbers:
                    self.scalars[node] = tuple(self._numbers)
            env[node] = result
            if isinstance(result, torch.Tensor) and not result.is_meta:
                self.coupler.depends_on_sizes()  # somebody may read numbers off it
            if self._calls > 1 and node.target is not operator.getitem and node in self.coupler.takes:
                self.coupler.takes[node] = None  # the node does more than pick
            if self._calls > 1 and node in self.coupler.table_uses:
                self._composite.add(node)
            if node in self._shuffles:
                shuffle = self._shuffles[node]
                source = self.coupler.value(env[shuffle.source])
                self.coupler.put(result, self.coupler.pick(source, shuffle.dim, shuffle.index))
            self.values[node] = self._describe(result)

    def keep_views(self) -> None:
        """Forget picks through which, or behind which, something is written: a copy would not do for them."""
        order = {node: number for number, node in enumerate(self.program.graph.nodes)}
        for node, take in self.coupler.takes.items():
            value = self.values.get(node)
            if take is not None and isinstance(value, Value) and value.storage is take.value.storage:
                _, writer = self._written.get(id(value.storage), (None, None))
                if writer is not None and order[writer] > order[node]:
                    self.coupler.takes[node] = None

    def source(self, node: fx.Node, value: Value) -> fx.Node | None:
        """The input of ``node`` that is ``value``, where the node is one operator of it and others."""
        if node.op == "call_module" or node in self._composite:
            return None
        return next((n for n in node.all_input_nodes if self.values.get(n) is value), None)

    def _execute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The outputs of a node that calls something."""
        if node.op == "call_module":
            return self._call(str(node.target), args, kwargs)
        if node.target is check_decision:
            self._keep_sizes(node)
        if is_lengths(node) or is_assertion(node, args):
            return None
        if node.target is either and all(self._returns(user) for user in node.users):
            this, other = args[1:] if holds(args[0], self.program.skeleton.training) else args[:0:-1]
            for tensor in flatten(other)[0]:
                if isinstance(tensor, torch.Tensor):
                    self.coupler.freeze_value(self.coupler.value(tensor), OUTPUT)
            return this
        inside = node in self._interior  # of a chain that is labelled as one
        with contextlib.nullcontext() if inside else self:
            if node.target is operator.getitem:
                return args[0][_index(args[1])]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            target: Any = ON_SHAPES.get(node.target, node.target)
            if isinstance(target, FunctionType):  # which may write into a list that it is given
                args, kwargs = mutable(args), mutable(kwargs)
            if target in _LINEAR:
                with _AsCalled():
                    return target(*args, **kwargs)
            with _Whole(self._aten) if target in _WHOLE else time_steps.as_called(target):
                return target(*args, **kwargs)

    def _keep_sizes(self, check: fx.Node) -> None:
        """Freeze the dimensions by whose sizes the model's code decides.

        The sizes of the inputs alone decide where none of these has units: ``x.flatten(1).shape[1]`` has.
        """
        seen = {check}
        todo = [check]
        while todo:
            for part in todo.pop().all_input_nodes:
                if part in seen or isinstance(self.values.get(part), Value):
                    continue
                seen.add(part)
                read = size_read(part)
                value = self.values.get(read[0]) if read is not None else None
                if read is None or not isinstance(value, Value):
                    todo.append(part)
                    continue
                dims: Any = list(range(len(value.shape)))
                for key in read[1]:
                    dims = dims[key] if isinstance(key, (int, slice)) else dims
                for dim in [dims] if isinstance(dims, int) else dims:
                    self.coupler.freeze_dim(value, dim, DECIDES)

    def _returns(self, node: fx.Node) -> bool:
        """Whether a node gives its inputs to the caller."""
        packs = node.op == "call_module" and isinstance(self.program.modules[str(node.target)], Pack)
        return packs or node.op == "output"

    def _shuffle(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        """Label a chain of movements from this node on as one, where it permutes what may go.

        Where nothing can go from the dimension (tokens), the steps do no harm, and each has labels.
        """
        found = find_permutation(node, env)
        if found is not None:
            source = self.coupler.peek(env[found.source])
            if source.label(found.dim) is not None or source.is_open(found.dim):
                self._interior.update(found.chain)
                self._shuffles[found.chain[-1]] = found

    def _numbers_of(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """The numbers that a node reads off a tensor: as they are where constants, buffers and sizes alone
        decide (strides), else those of the example; None where neither is known. The graph goes on computing
        them.
        """
        kind: Any = node.target
        try:
            tensor = Values(env, self._fixed).of(node.all_input_nodes[0])
            return getattr(tensor, kind)() if node.op == "call_method" else kind(tensor)
        except Exception:  # noqa: BLE001  whatever a user's node raises
            return node.meta.get("number")

    def _fixed(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor that a node reads, if it is a constant or buffer."""
        if node.op != "get_attr":
            return None
        tensor = {**self.program.extras, **self.program.tensors}[str(node.target)]
        return None if isinstance(tensor, torch.nn.Parameter) else tensor

    def _call(self, path: str, args: Any, kwargs: Any) -> Any:
        """Run a leaf module, as its kind asks for."""
        original = self.program.modules[path]
        run = _BY_KIND.get(type(original))
        if run is None:
            run = _Interpreter._plain if leaf_for(original) is None else _Interpreter._leaf
        return run(self, path, original, args, kwargs)

    def _packed(self, path: str, pack: Any, args: Any, kwargs: Any) -> Any:
        self.coupler.depends_on_sizes()  # an object in it holds this run's tensors
        packed = pack(*args, **kwargs)
        self._packs[id(packed)] = pack
        return packed

    def _applied(self, path: str, apply: Any, args: Any, kwargs: Any) -> Any:
        self.coupler.depends_on_sizes()
        return self._run_module(path, apply, args, kwargs)

    def _plain(self, path: str, original: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """A module without an entry in the registry; of PyTorch's own most need not run."""

        def tensor(name: str) -> torch.Tensor:
            return self._tensor(f"{path}.{name}")

        result = call_plain(original, args, kwargs, tensor, self._aten)
        return self._run_module(path, original, args, kwargs) if result is None else result

    def _leaf(self, path: str, original: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """A registered module; where it has a rule of its own, nothing inside of it is followed."""
        self.coupler.depends_on_sizes()  # nobody knows what it does with sizes
        leaf = leaf_for(original)
        if leaf is None or leaf.couple is None:
            return self._run_module(path, original, args, kwargs)
        return self._registered(self._module(path), original, args, kwargs)

    def _run_module(self, path: str, original: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Run the copy on meta of a module, and follow what it calls."""
        module = self._module(path)
        names = list(computed_tensors(original))
        if not names:
            # A pass may put one of ours in place of PyTorch's, and both have to dissolve alike.
            own = type(original).__module__.startswith(("torch.nn.", "fxprune.nn"))
            with self, _AsCalled() if own else contextlib.nullcontext():
                return module(*args, **kwargs)
        self.coupler.remedy = f"remove the parametrization of {path}.{names[0]} before pruning"
        with self, _Whole(self._aten):
            result = module(*args, **kwargs)
        self.coupler.remedy = ""
        return result

    def _filled(self, path: str, fill: Any, args: Any, kwargs: Any) -> Any:
        """What holds zeros in place of entries, which may go where the masked original's are zero, too."""
        narrow, *places = args
        if not isinstance(narrow, torch.Tensor):  # a number in a tree that was named as a whole
            return narrow
        self.coupler.depends_on_sizes()
        value = self.coupler.value(narrow)
        for dim in range(len(value.shape)):
            label = value.label(dim)
            if label is None or label.over or not value.is_zero(dim):
                self.coupler.freeze_dim(value, dim, f"{OUTPUT} whose removed entries would not be zero")
        whole = torch.empty_like(fill(narrow, *places))
        self.coupler.put(whole, [None] * whole.dim())
        return whole

    def _registered(self, module: torch.nn.Module, original: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Call ``module``, the copy on meta of a module with a rule of its own."""
        leaf = leaf_for(original)
        assert leaf is not None
        assert leaf.couple is not None
        result = None
        try:
            with _Unlabelled(self.observe, self.coupler.node):
                result = module(*args, **kwargs) if leaf.runs else None
        except Exception as error:  # whatever a user's forward raises on shapes
            if leaf.outputs is None or not isinstance(error, (NotImplementedError, _ValuesNeeded)):
                raise
        if result is None and leaf.outputs is not None:
            result = leaf.outputs(module, args, kwargs)
        if self.labels:
            self.coupler.begin(type(original).__qualname__)
            leaf.couple(self.coupler, module, args, kwargs, result)
        if self.follow is not None:
            self.follow(self.coupler.node, None, args, kwargs, result)
        return result

    def _finish(self, node: fx.Node, results: Any) -> None:
        """Freeze what the graph returns, but for state and for outputs that may become narrower.

        Of values that regions hand to each other only some dimensions are frozen.
        """
        linked: Mapping[str, Mapping[int, tuple[int, ...]]] | None = node.meta.get("linked")
        for region, tree in [("", results)] if linked is None else results.items():
            tensors, structure = flatten(tree)
            pack, leaves = self._packs.get(id(tree)), pytree.tree_leaves(tree)
            state = {pack.structure.leaves[number] for number in pack.state} if pack is not None else set()
            links = linked.get(region, {}) if linked is not None else {}
            others = {id(leaf) for number, leaf in enumerate(leaves) if number not in links}
            handed_on = {id(leaves[number]) for number in links} - others
            outputs = self.outputs[region] = {}
            shaped = (leaf for tensor, leaf in zip(tensors, structure.leaves, strict=True)
                      if isinstance(tensor, torch.Tensor) and tensor.dim())  # fmt: skip
            result = next((leaf.path[:1] for leaf in shaped), None)  # whatever stands beside it
            for tensor, leaf in zip(tensors, structure.leaves, strict=True):
                if not isinstance(tensor, torch.Tensor):
                    continue
                outputs[leaf] = value = self.coupler.value(tensor) if self.labels else self._described(tensor)
                if leaf in state or id(tensor) in handed_on:
                    continue
                if linked is not None:
                    self.whole.add((region, leaf))
                    self.coupler.freeze_value(value, node.meta["reason"])
                elif not leaf.named(self.program.free_outputs):
                    self.whole.add((region, leaf))
                    remedy = (
                        f'free_outputs="{leaf}" lets it become narrower, for code that can do with that; '
                        "with fill_outputs it holds zeros in place of what is removed"
                    )
                    self.coupler.freeze_value(value, OUTPUT, remedy if leaf.path[:1] != result else "")
            for number, dims in links.items():
                for dim in dims:
                    self.coupler.freeze_dim(self.coupler.value(leaves[number]), dim, node.meta["reason"])

    def _shapes(self, node: fx.Node) -> str:
        """Shapes of the parameters of a module node, for messages."""
        prefix = f"{node.target}." if node.op == "call_module" else None
        tensors = self.program.tensors.items()
        own = [f"{k} {tuple(t.shape)}" for k, t in tensors if prefix and k.startswith(prefix)]
        return ", ".join(own[:4])

    def _describe(self, result: Any) -> Any:
        if isinstance(result, (list, tuple, dict)):
            return pytree.tree_map(self._described, result, is_leaf=_is_packed)
        return self._described(result) if isinstance(result, torch.Tensor) else result

    def _described(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if self.labels:
                return self.coupler.peek(leaf)
            return Value(tuple(leaf.shape), [None] * leaf.dim(), dtype=leaf.dtype)
        if _is_packed(leaf):
            self.coupler.depends_on_sizes()  # of its values it cannot be built again
            return tuple(map(self._describe, leaf))
        return leaf

    def _tensor(self, name: str) -> torch.Tensor:
        """The meta stand-in of a parameter or buffer, one for all names that it has."""
        original = self.program.tensors.get(name)
        if original is None:
            original = self.program.extras[name]
        meta = self._metas.get(id(original))
        if meta is None:
            meta = self._metas[id(original)] = meta_like(original)
            if not self.labels:
                return meta
            axes = self.seed(name) or [None] * original.dim()
            state = State(name, tuple(meta.shape), original, axes)
            self.states[name] = state
            meta._fxprune_value = Value(  # type: ignore[attr-defined]
                state.shape, [], state, tuple(range(meta.dim())), meta.dtype
            )
            self._by_group(meta, self._groups.get(id(original), 1))
        return meta

    def _by_group(self, tensor: torch.Tensor, groups: int) -> None:
        """Let each group choose its own columns of a grouped weight, or of what one is computed from.

        Whatever uses the tensor first, each group has units of its own from the start.
        """
        rows, columns = tensor.shape[:2] if groups > 1 and tensor.dim() > 2 else (0, 1)
        value = self.coupler.value(tensor)
        if columns > 1 and rows > groups and rows % groups == 0 and value.is_open(1):
            cells = self.coupler.units.fresh(groups, columns)
            self.coupler.adopt(value, 1, np.repeat(cells, rows // groups, axis=0), (0,))

    def _module(self, path: str) -> torch.nn.Module:
        """The copy of a leaf module on meta, one for all of its calls."""
        if path in self._modules:
            return self._modules[path]
        module = self.program.modules[path]
        # What a registered module keeps in dicts and lists must not see meta tensors.
        share = leaf_for(module) is None
        copy = clone_module(module, lambda name, _: self._tensor(f"{path}.{name}"), share)
        for name, inner in copy.named_modules() if share else ():
            leaf = leaf_for(inner)
            if leaf is not None and leaf.couple is not None and not leaf.runs:
                inner.__dict__["forward"] = partial(self._inside, inner, module.get_submodule(name))
        self._modules[path] = copy
        return copy

    def _inside(self, module: torch.nn.Module, original: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a module with a rule of its own does within a leaf."""
        self.coupler.depends_on_sizes()
        with _disable_current_modes():
            return self._registered(module, original, args, kwargs)


_BY_KIND: Mapping[type, Callable[[_Interpreter, str, Any, Any, Any], Any]] = {
    Pack: _Interpreter._packed,
    Fill: _Interpreter._filled,
    Apply: _Interpreter._applied,
}
"""How the modules that capturing inserts are run."""


class _Whole(TorchFunctionMode):
    """Keeps functions whole in which something is lost when they dissolve.

    A weight norm becomes a reduction for all but the first and last dimension; an index whose values are
    known is expanded.
    """

    def __init__(self, make: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.make = make

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept = _WHOLE.get(func)
        if func is torch._weight_norm and args[2] == -1:  # one norm of all is a reduction indeed
            kept = None
        if kept is not None:
            with _disable_current_modes():
                return self.make(kept, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_WHOLE: dict[Any, Any] = {
    torch._weight_norm: torch.ops.aten._weight_norm.default,
    torch.take_along_dim: torch.ops.aten.take_along_dim.default,
}


def _grouped_weights(program: Program) -> dict[int, int]:
    """The number of groups of grouped convolutions, by the id of each tensor that their weights come from."""
    tensors = {**program.extras, **program.tensors}
    found = {}
    for node in program.graph.nodes:
        if node.op == "call_module":
            module = program.modules[str(node.target)]
            if isinstance(module, _ConvNd) and module.groups > 1:
                for name, own in named_tensors(module):
                    if own.dim() == len(module.kernel_size) + 2:
                        found[id(tensors[f"{node.target}.{name}"])] = module.groups
            continue
        called = node.op == "call_function" and operator_name(node) in convolution.FUNCTIONS
        if not called or len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
            continue
        at, keyword = convolution.groups_argument(node)
        groups = node.args[at] if len(node.args) > at else node.kwargs.get(keyword, 1)
        sources = [node.args[1]]
        for _ in range(_DEPTH + 1 if isinstance(groups, int) and groups > 1 else 0):
            names = [str(source.target) for source in sources if source.op == "get_attr"]
            found.update({id(tensors[name]): groups for name in names if name in tensors})
            sources = [before for source in sources for before in source.all_input_nodes]
    return found


_DEPTH = 4
"""How many nodes may lie between a weight and what it is computed from."""


class _Unlabelled(TorchDispatchMode):
    """Shows ATen calls to an observer, without labels: nobody knows how they couple."""

    def __init__(self, observe: Follow | None, node: fx.Node | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.observe, self.node = observe, node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _on_shapes(func, args, kwargs or {})
        tree = (args, kwargs or {}, out)
        if self.observe is not None:
            self.observe(self.node, func, *pytree.tree_map_only(torch.Tensor, self._plain, tree))
        return out

    @staticmethod
    def _plain(tensor: torch.Tensor) -> Value:
        return Value(tuple(tensor.shape), [None] * tensor.dim(), dtype=tensor.dtype)


def _is_packed(tree: Any) -> bool:
    return isinstance(tree, PackedSequence)


_BY_DIMENSION = frozenset(
    ["cat", "stack", "permute", "transpose", "t", "unsqueeze", "squeeze", "alias", "detach"]
)
"""Movements whose arguments name dimensions, never sizes."""


def _index(item: Any) -> Any:
    """An index whose lists of numbers are tensors with values, which would else be lost on meta."""
    if isinstance(item, tuple):
        return tuple(_index(part) for part in item)
    if isinstance(item, list) and item and all(type(number) is int for number in item):
        with _disable_current_modes():
            return torch.tensor(item)
    return item


def _from_inputs(node: fx.Node) -> bool:
    """Whether a node is computed from inputs; from tensors of the model alone it is the same in each run."""
    seen, todo = {node}, [node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return False


def _kind(value: Value, dim: int) -> str:
    return FREE if value.label(dim) is None else "labelled"


_AS_STRIDED = torch.ops.aten.as_strided_.default
_LINEAR = frozenset([torch.nn.functional.linear, torch.ops.aten.linear.default])
_AsCalled = torch._C._AutoDispatchBelowAutograd
"""While it lasts, operators that PyTorch makes of others arrive as they are called. Of which others it makes
them depends on more than what they couple: a linear layer, on the strides of its input."""


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether PyTorch makes an operator of others."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _stays_whole(func: Any) -> bool:
    """Whether an operator that PyTorch makes of others has a rule that says all that they do."""
    if func in _LINEAR:
        return True
    rule = rule_for(func)
    return rule is not None and rule.family == CUSTOM


@functools.cache
def _name(func: Any) -> str:
    """The operator's name without its library's."""
    name: str = func._schema.name
    return name.partition("::")[2]


@functools.cache
def _takes_device(func: Any) -> bool:
    """Whether an operator may make a tensor elsewhere than on the meta device."""
    return any(argument.name == "device" for argument in func._schema.arguments)


class _Known(dict[fx.Node, Any]):
    """Values by node; those that are known beforehand become meta tensors when they are asked for."""

    def __init__(self, known: Mapping[fx.Node, Callable[[], Any]]) -> None:
        super().__init__()
        self.known = known

    def __missing__(self, node: fx.Node) -> Any:
        self[node] = found = pytree.tree_map_only(Value, self._tensor, self.known[node]())
        return found

    def __contains__(self, node: object) -> bool:
        return super().__contains__(node) or node in self.known

    @staticmethod
    def _tensor(value: Value) -> torch.Tensor:
        with _disable_current_modes():
            tensor = torch.empty(value.shape, dtype=value.dtype, device="meta")
        tensor._fxprune_value = value  # type: ignore[attr-defined]
        return tensor


_DEPEND_ON_VALUES = frozenset([torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape])


class _ValuesNeeded(RuntimeError):
    """An operator cannot tell its result from shapes alone."""


def _on_shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an operator on meta tensors; raises _ValuesNeeded where these do not do."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        custom = _maybe_get_opdef(func)
        if (
            isinstance(error, NotImplementedError)
            or not _DEPEND_ON_VALUES.isdisjoint(func.tags)
            or (custom is not None and custom._abstract_fn is None)
        ):
            raise _ValuesNeeded(str(error)) from error
        raise


@functools.cache
def _written(func: Any) -> tuple[int, ...]:
    """Which arguments an operator writes into."""
    if not func._schema.is_mutable:
        return ()
    return tuple(
        place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _needs_values(error: Exception, node: fx.Node) -> bool:
    """Whether a node failed because it was given shapes alone."""
    reads = (
        node.target in AS_LIST
        or node.target in (torch.tensor, torch.as_tensor)
        or str(getattr(node.target, "__module__", "")).partition(".")[0] == "numpy"
    )
    return reads or isinstance(error, (NotImplementedError, _ValuesNeeded))


def _failed(node: fx.Node, error: Exception, needs_values: bool, args: Any, parameters: str) -> Exception:
    if isinstance(error, _ValuesNeeded) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    where = describe_source(node)
    what = (
        f"{node.op} {node.target}"
        if node.op != "call_function"
        else getattr(node.target, "__name__", node.target)
    )
    shapes = [str(tuple(t.shape)) for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
    given = f" Its inputs have the shapes {', '.join(shapes)}." if shapes else ""
    given += f" Its parameters: {parameters}." if parameters else ""
    at = f", {where}" if where else ""
    message = f"node {node.name} ({what}{at}) failed: {told(error)}.{given}"
    if needs_values:
        failure: CaptureError | ExampleInputsError = CaptureError(
            f"{message}\nThe analysis runs on shapes alone; this node needs the values of a tensor. Next: "
            f"compute it outside of the model, or prune the submodules around it."
        )
    else:
        failure = ExampleInputsError(
            f"{message}\nThe example inputs do not fit the model, or the model does not run. Next: call "
            f"model(...) with the same inputs and compare shapes and dtypes."
        )
    failure.node = node  # type: ignore[union-attr]
    return failure
