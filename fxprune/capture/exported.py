"""``torch.export``: the rung for models that symbolic tracing cannot follow.

The model's Python code is run on fake tensors (https://docs.pytorch.org/docs/stable/export.html), which
gives a graph of ATen calls. Here it gets back what an ``ExportedProgram`` has lost: the call signature,
nested inputs and outputs, the parameters' names in a module tree, and switches for ``train()`` and
``eval()`` where ``torch.nn`` layers read them.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from .. import sizes
from ..errors import CaptureError
from ..files import few
from ..nn import Unpack, keep
from ..program import Program, Skeleton, named_modules, named_tensors
from ..trees import Structure, flatten
from . import patches
from .arguments import Arguments, packing
from .effects import AttributesBefore, not_kept
from .free_sizes import pin, steps
from .leaf_modules import refuse_torchscript
from .numbers import Recorder, carries_numbers
from .source_lines import blame
from .symbolic import check_value
from .twin import Twin

_INTERNAL = os.path.dirname(torch.__file__) + os.sep
_LONGEST = 500
"""Characters of a reason; torch.export may name every size that it does not know."""
_ASSERTIONS = ("_assert", "sym_constrain_range")


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Export ``model`` and restore what is around the graph.

    Sizes of inputs stay free where the model allows it, but for the channels of images and volumes.

    Raises:
        CaptureError: if the model cannot be exported.
        ExampleInputsError: if the inputs do not fit the signature of ``forward``.
    """
    for _, module in named_modules(model):
        refuse_torchscript(module)  # torch.export would look inside, and drop what it does in training mode
    return _Exporter(model, Arguments.of(model, args, kwargs)).program()


class _Flat(nn.Module):
    """The model with its inputs and outputs as flat lists of tensors."""

    def __init__(
        self, model: nn.Module, rebuild: Callable[..., Any], seen: list[Structure], left: list[str]
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._rebuild, self._seen, self._left = rebuild, seen, left
        self._marked = carries_numbers(model)

    def forward(self, *tensors: Any) -> list[Any]:
        _refuse_sizes_from_values(tensors)
        args, kwargs = self._rebuild(tensors)
        kept, buffers = AttributesBefore(self.model), dict(self.model.named_buffers(remove_duplicate=False))
        with Recorder() if self._marked else contextlib.nullcontext():
            results = self.model(*args, **kwargs)
        outputs, structure = flatten(results)
        for name, before, value, write in kept.replaced(torch.Tensor):
            if before is None or name not in buffers:  # nobody knows whether it was read
                self._left.append(name)
            else:  # torch.export sees what is assigned to the outermost module alone
                keep(before, value)
                write(before)
        self._left += kept.changed(torch.Tensor)
        self._seen[:] = [structure]
        return outputs


def _refuse_sizes_from_values(tensors: Any) -> None:
    """Have the fake tensors raise where a size depends on values, which the analysis could not follow.

    torch.export would go on, and often fail much later, where such a size is asked for.
    """
    mode = detect_fake_mode(tensors)
    if mode is not None and mode.shape_env is not None:
        env = mode.shape_env
        env.settings = replace(env.settings, allow_dynamic_output_shape_ops=False)


def _depends_on_values(error: DynamicOutputShapeException) -> CaptureError:
    return CaptureError(f"{blame(error)}the sizes of what {error.func} returns depend on values")


class _Exporter:
    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        self.model = model
        self.arguments = arguments
        self.named = dict(named_tensors(model))
        self.first = {id(tensor): name for name, tensor in reversed(self.named.items())}
        self.modules: dict[str, nn.Module] = {}
        self.extras: dict[str, torch.Tensor] = {}
        self.notes: list[str] = []
        self.output: list[Structure] = []
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}

    def program(self) -> Program:
        exported = self._export()
        inputs = self._inputs()
        supply = iter(inputs)
        lifted = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                spec = lifted[node.name]
                if spec.kind is InputKind.USER_INPUT:
                    self.env[node] = next(supply)
                else:
                    self.env[node] = self._tensor(str(spec.target), exported)
        results = self._copy(exported.graph_module, self.env)
        self._pin(exported)
        self.graph.output(self._packed(list(results)))
        self._drop_unused()
        self.graph.lint()
        return Program(
            graph=self.graph,
            modules=self.modules,
            tensors=self.named,
            skeleton=Skeleton.of(self.model),
            extras=self.extras,
            notes=tuple(self.notes),
        )

    # -- running torch.export -------------------------------------------------------------------

    def _export(self) -> torch.export.ExportedProgram:
        """The exported program; code that asks is told that nothing is exported, where that can be."""
        asked: set[str] = set()
        try:
            return self._exported(True, asked)
        except CaptureError:
            if not asked:
                raise
            try:
                exported = self._exported(False, set())
            except CaptureError:
                exported = None
            if exported is None:
                raise
            self.notes.append(
                f"forward asks {' and '.join(sorted(asked))}, and cannot be captured as it runs otherwise: "
                f"the result does what it does where the answer is yes"
            )
            return exported

    def _exported(self, hidden: bool, asked: set[str]) -> torch.export.ExportedProgram:
        """The exported program, with as many free sizes as can be.

        Args:
            hidden: whether the user's code reads that nothing is exported.
            asked: receives the names of the functions that it asked.
        """
        given = self.arguments.all()
        tensors, structure = flatten(given)
        placed = list(self.arguments.by_place())

        def rebuild(values: Any) -> tuple[list[Any], dict[str, Any]]:
            named = structure.rebuild(values)
            return [named.pop(name) for name in placed], named

        device = next((t.device for t in self.named.values()), torch.device("cpu"))
        try:
            examples = [torch.zeros(t.shape, dtype=t.dtype, device=device) for t in tensors]
        except (RuntimeError, MemoryError) as error:
            raise CaptureError(
                f"torch.export needs example inputs with values, and they do not fit into memory: "
                f"{few(str(list(t.shape)) for t in tensors)}. Next: give smaller example inputs."
            ) from error
        tables = (
            patches.fx_tracing,
            patches.exporting,
            patches.autograd_functions(self._function),
            patches.flags(hidden, asked),
        )

        self._rehearse(tables, examples, rebuild)
        refusal: Exception | None = None
        for doubled, free in ((True, True), (False, True), (False, False)):
            inputs = _doubled(examples) if doubled else examples
            if inputs is None:
                continue
            left: list[str] = []
            shapes = [_free(t) if free else None for t in inputs]

            def export(
                left: list[str] = left, inputs: Any = tuple(inputs), shapes: Any = shapes, free: bool = free
            ) -> Any:
                flat = _Flat(Twin(self.model, self._stand_in).model, rebuild, self.output, left)
                dynamic = {"tensors": tuple(shapes)} if inputs and free else None
                return torch.export.export(flat, inputs, dynamic_shapes=dynamic, strict=False)

            try:
                exported = patches.within(tables, export)
            except DynamicOutputShapeException as error:
                raise _depends_on_values(error) from error
            except Exception as error:  # noqa: BLE001  whatever a user's forward raises, or export refuses
                refusal = refusal or error
                continue
            if inputs is examples or not _fixes_batch(exported):
                self.notes += not_kept(left)
                return self._batched(exported)
            refusal = refusal or CaptureError("the model fixes the batch size")
        if refusal is None:
            raise CaptureError("there is nothing to export")
        raise CaptureError(f"{type(refusal).__name__}: {_first_lines(refusal)}") from refusal

    def _rehearse(
        self, tables: tuple[patches.Patch, ...], examples: list[torch.Tensor], rebuild: Callable[..., Any]
    ) -> None:
        """Run the code on fake tensors with nothing recorded, in a fraction of torch.export's time.

        Raises:
            CaptureError: if sizes depend on values, for which torch.export would be stopped.
        """
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # imports sympy, which takes a second

        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        fake = functools.partial(mode.from_tensor, static_shapes=True)

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            return fake(tensor) if id(tensor) in self.first else self._stand_in(tensor)

        def run() -> None:
            flat = _Flat(Twin(self.model, stand_in).model, rebuild, [], [])
            with mode:
                flat(*map(fake, examples))

        try:
            patches.within(tables, run)
        except DynamicOutputShapeException as error:
            raise _depends_on_values(error) from error
        except Exception:  # noqa: BLE001  torch.export can do more, or says better what is wrong
            pass

    def _batched(self, exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
        """The program with calls for the whole batch in place of those under ``torch.vmap``, for a sample."""
        graphs = [part.graph for part in exported.graph_module.modules() if isinstance(part, fx.GraphModule)]
        nodes = [node for graph in graphs for node in graph.nodes]
        called = [node for node in nodes if getattr(node.target, "__module__", "") == _TRANSFORMS]
        if not called:
            return exported
        for node in nodes:
            path, layer = self._layer(node)
            if layer is not None and node.target in _SWITCHED:
                where = source_line(called[0])
                raise CaptureError(
                    f"the model calls torch.vmap{f' at {where[0]}:{where[1]}' if where else ''}, and what "
                    f"torch.export makes of that leaves {path} ({type(layer).__name__}) in one mode"
                )
        return exported.run_decompositions({})

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """torch.export puts fake tensors in place of parameters and buffers; others are copied."""
        return tensor if id(tensor) in self.first else tensor.detach().clone()

    def _function(self, function: type, args: tuple[Any, ...]) -> Any:
        """An autograd function is traced into: what remains is its forward."""
        note = f"the gradient of {function.__qualname__} is that of its forward, not the one that it defines"
        if note not in self.notes and not function.__module__.startswith("torch."):
            self.notes.append(note)
        return NotImplemented

    def _pin(self, exported: torch.export.ExportedProgram) -> None:
        """Have the graph refuse sizes that torch.export took for constants; say in which mode it stays."""
        given = self.arguments.all()
        tensors = [n for n, leaf in enumerate(pytree.tree_leaves(given)) if isinstance(leaf, torch.Tensor)]
        shapes = dict(zip(tensors, _shapes(exported), strict=False))
        places = sizes.places(given)
        known: dict[str, int] = {}
        for change in sizes.changes(given):
            if sizes.asks_more(change, known, places) and _allows(shapes, places, change):
                known = {**change, **known}
        found = steps(places, known)
        because = "torch.export, which captured the model, keeps it"
        pin(self.graph, given, found, dict.fromkeys(found, because))
        asked = [path for path, module in self.model.named_modules() if module.training]
        mode = "training" if asked else "evaluation"
        self.notes.append(f"everything but dropout and batch norm layers stays in {mode} mode")

    # -- from the exported graph to ours --------------------------------------------------------

    def _inputs(self) -> list[fx.Node]:
        """Placeholders under the names of the signature; the nodes of all tensors inside of them."""
        leaves: list[fx.Node] = []
        given = self.arguments.all()
        placeholders = {
            name: self.graph.create_node("placeholder", name, self.arguments.default(name)) for name in given
        }
        for name, value in given.items():
            tensors, structure = flatten(value)
            place = placeholders[name]
            if not tensors:
                self.graph.call_function(check_value, (place, value, name))
            elif tensors == [value]:
                leaves.append(place)
            else:
                path = self._added(f"_unpack_{name}", Unpack(name, structure))
                unpacked = self.graph.call_module(path, (place,))
                leaves += [
                    self.graph.call_function(operator.getitem, (unpacked, i)) for i in range(len(tensors))
                ]
        return leaves

    def _tensor(self, target: str, exported: torch.export.ExportedProgram) -> fx.Node:
        """A node that reads a parameter, a buffer or a constant."""
        name = target.removeprefix("model.")
        if name not in self.named:
            constant = exported.constants[target]
            if not isinstance(constant, torch.Tensor):
                raise CaptureError(f"the graph uses {target}, an object of {type(constant).__name__}")
            known = self._held_elsewhere(constant)
            name = known or self._free_name(f"_constant_{len(self.extras)}")
            if known is None:
                self.extras[name] = constant.detach()
        else:  # of several names of a tied tensor, the first
            name = self.first[id(self.named[name])]
        return self.graph.get_attr(name)

    def _held_elsewhere(self, constant: torch.Tensor) -> str | None:
        """The name of a parameter or buffer that torch.export took for a constant.

        It does where the model's own module is called by a function that holds on to it.
        """

        def memory(tensor: torch.Tensor) -> Any:
            dense = tensor.layout is torch.strided and not tensor.is_meta
            return (tensor.data_ptr(), tensor.shape, tensor.stride()) if dense else id(tensor)

        return next(
            (n for n, t in self.named.items() if t is constant or memory(t) == memory(constant)), None
        )

    def _copy(self, module: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
        """Copy the calls of an exported graph; gives what it returns."""
        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return map_arg(node.args[0], env.__getitem__)
            if node.op == "get_attr":
                attribute: Any = module
                for part in str(node.target).split("."):
                    attribute = getattr(attribute, part)
                env[node] = attribute  # a graph, for the operator that calls it
                continue
            if node.op != "call_function":
                raise CaptureError(f"torch.export left a node of kind {node.op} ({node.target})")
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                env[node] = self._inlined(node, env)
            elif node.target is operator.getitem and isinstance(env[node.args[0]], (list, tuple)):
                env[node] = env[node.args[0]][node.args[1]]
            elif _is_idle_cast(node):
                env[node] = env[node.args[0]]
            elif node.target is torch.ops.aten.add_.Tensor and isinstance(self._layer(node)[1], _BatchNorm):
                env[node] = env[node.args[0]]  # the layer counts its batches itself
            elif not str(getattr(node.target, "__name__", "")).startswith(_ASSERTIONS):
                path, layer = self._layer(node)
                if layer is not None and node.target in _SWITCHED:
                    new = self.graph.call_module(path, (env[node.args[0]],))
                    self.modules[path] = layer
                else:
                    new = self.graph.node_copy(node, lambda n: env[n])
                new.meta = {"source": source} if (source := source_line(node)) else {}
                if "origins" in node.meta:
                    new.meta["origins"] = node.meta["origins"]
                if path:
                    new.meta["module"] = path
                env[node] = new
        return None

    def _inlined(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """What a block under ``torch.no_grad`` or ``torch.autocast`` computes, as part of this graph."""
        name = str(node.target)
        args: Any = map_arg(node.args, env.__getitem__)
        if name == "wrap_with_set_grad_enabled":
            enabled, block, *inputs = args
        elif name == "wrap_with_autocast" and not args[2]:
            enabled, (_, _, _, _, block, *inputs) = True, args
        else:
            where = source_line(node)
            at = f" at {where[0]}:{where[1]}" if where else ""
            raise CaptureError(f"the graph holds {name}{at}, which is not rewritten")
        places = [n for n in block.graph.nodes if n.op == "placeholder"]
        if not enabled:  # nor may what is written there, as statistics are, have a gradient
            written = {n.args[0] for n in block.graph.nodes if getattr(n.target, "_schema", None) is not None
                       and n.target._schema.is_mutable}  # fmt: skip
            inputs = [
                self.graph.call_function(torch.ops.aten.detach.default, (i,))
                if isinstance(place.meta.get("val"), torch.Tensor) and place not in written
                else i
                for i, place in zip(inputs, places, strict=True)
            ]
        results = self._copy(block, dict(zip(places, inputs, strict=True)))
        if enabled:
            return results
        return [self.graph.call_function(torch.ops.aten.detach.default, (r,)) for r in results]

    def _layer(self, node: fx.Node) -> tuple[str, nn.Module | None]:
        """The dropout or batch norm of ``torch.nn`` that made a call, and its path.

        Such layers are called themselves in the graph: they follow ``train()`` and ``eval()``, and a batch
        norm counts its batches. One with hooks, or with a forward of its own, is not.
        """
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = f"{stack[-1][0]}.".removeprefix("model.").removesuffix(".") if stack else ""
        try:
            layer = self.model.get_submodule(path)
        except AttributeError:
            return path, None
        plain = isinstance(layer, (_BatchNorm, _DropoutNd)) and type(layer).__module__.startswith("torch.nn.")
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        return path, layer if plain and not hooked else None

    def _packed(self, results: list[Any]) -> Any:
        (structure,) = self.output
        pack, note = packing(structure, self.arguments)
        if pack is None:
            return structure.rebuild(results)
        self.notes += note
        return self.graph.call_module(self._added("_pack", pack), tuple(results))

    def _drop_unused(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            unused = not node.users and node.op in ("call_function", "get_attr")
            if unused and node.target is not check_value and not node.is_impure():
                self.graph.erase_node(node)

    def _added(self, name: str, module: nn.Module) -> str:
        path = self._free_name(name)
        self.modules[path] = module.train(self.model.training)
        return path

    def _free_name(self, name: str) -> str:
        taken = {*self.named, *self.extras, *self.modules, *(n for n, _ in self.model.named_children())}
        while name in taken:
            name += "_"
        return name


def _free(tensor: torch.Tensor) -> dict[int, Any]:
    channels = {1} if tensor.dim() > 3 else set()
    return dict.fromkeys(set(range(tensor.dim())) - channels, torch.export.Dim.AUTO)


def _doubled(tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """The inputs with a batch of two in place of one, which torch.export would take to be fixed."""
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return None
    return [torch.cat([t, t]) for t in tensors]


def _shapes(exported: torch.export.ExportedProgram) -> list[tuple[Any, ...]]:
    """The shape of each input tensor, with symbols for sizes that are free."""
    names = set(exported.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder" and n.name in names]
    return [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]


def _fixes_batch(exported: torch.export.ExportedProgram) -> bool:
    return any(isinstance(shape[0], int) for shape in _shapes(exported) if shape)


def _allows(shapes: Mapping[int, tuple[Any, ...]], places: list[sizes.Place], change: sizes.Change) -> bool:
    """Whether what torch.export took for granted of the inputs' sizes holds at others."""
    free = [size for shape in shapes.values() for size in shape if isinstance(size, torch.SymInt)]
    values = {size.node.expr: size.node.hint for size in free}
    for place in places:
        size = shapes[place.leaf][place.dim]
        if place.kind in change:
            if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
                return False
            values[size.node.expr] = sizes.changed_size(place, change[place.kind])
    env: Any = free[0].node.shape_env if free else None
    found = [env.replace(guard.expr).subs(values) for guard in env.guards] if env is not None else []
    return all(not guard.free_symbols and bool(guard) for guard in found)


def _is_idle_cast(node: fx.Node) -> bool:
    """Whether a node asks for the type and device that its argument has; without, a result can be cast."""
    if getattr(node.target, "overloadpacket", None) is not torch.ops.aten.to or True in node.args[2:]:
        return False
    before, after = (n.meta.get("val") for n in (node.args[0], node) if isinstance(n, fx.Node))
    return (
        isinstance(before, torch.Tensor)
        and isinstance(after, torch.Tensor)
        and (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
        and not node.kwargs.get("copy")
        and node.kwargs.get("memory_format") is None
    )


_TRANSFORMS = "torch._functorch.predispatch"
"""The module of the functions that mark what is under ``torch.vmap`` in an exported graph."""
_SWITCHED = (torch.ops.aten.dropout.default, torch.ops.aten.batch_norm.default)

_FRAME = re.compile(r'File "(.+)", line (\d+), in (\S+)')


def source_line(node: fx.Node) -> tuple[str, int, str] | None:
    """The innermost line of the user's code behind a node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for file, line, function in reversed(frames):
        if not file.startswith(_INTERNAL):
            return file, int(line), function
    return None


def _first_lines(error: Exception) -> str:
    return "\n".join(str(error).splitlines()[:6])[:_LONGEST]


__all__ = ["source_line", "trace"]
