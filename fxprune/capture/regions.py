"""The region rung: the largest submodules that can be captured, where the model as a whole cannot be.

The model is run once on the example inputs, on a copy, to see what each of its submodules is called with.
Then the tree is searched from the top: what another rung can capture becomes a region; of what it cannot,
the children are tried. The Python code around the regions stays as it is. A second run shows which tensors
go from region to region and nowhere else; these are linked.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CaptureError, ExampleInputsError, FxpruneError, PlanError
from ..files import told
from ..inputs import describe_inputs, restore_inputs
from ..program import Program, Skeleton, named_tensors
from ..random_numbers import drawn
from ..region_program import CapturedRegion, RegionLink, RegionProgram, unite
from .arguments import Arguments
from .leaf_modules import is_leaf
from .source_lines import blame

Calls = tuple[tuple[Any, ...], dict[str, Any]]
Whole = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], bool], tuple[Program, str]]
"""Captures one module on meta inputs, and says by which rung; if the last argument is true, other sizes are
looked at, too. Raises CaptureError or ExampleInputsError."""


def find(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], whole: Whole) -> RegionProgram:
    """Capture the largest submodules of ``model`` that ``whole`` can capture.

    Args:
        model: the model; it is not run itself, and not changed.
        args: its positional inputs, real ones.
        kwargs: its keyword inputs, real ones.
        whole: how one submodule is captured.

    Raises:
        CaptureError: if the model does not run, or no submodule with parameters can be captured.
    """
    seen = observe(model, args, kwargs)
    found: dict[str, CapturedRegion] = {}
    refusals: list[str] = []
    visited = {model}

    def search(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if child in visited:
                continue
            visited.add(child)
            full = f"{path}.{name}" if path else name
            calls = seen.calls.get(full)
            if calls is None:
                search(child, full)
                continue
            try:
                found[full] = _part(child, full, calls, whole)
            except FxpruneError as refusal:
                if next(child.parameters(), None) is not None:
                    reason = refusal.__cause__ if isinstance(refusal.__cause__, FxpruneError) else refusal
                    refusals.append(f"{full}: {str(reason).strip().splitlines()[0].rstrip('.')}")
                search(child, full)

    search(model, "")
    outside = seen.outside(set(found))
    parts = {path: replace(part, outside=_beneath(path, outside)) for path, part in found.items()}
    parts = _worthwhile(_linked(model, args, kwargs, parts))
    if not parts:
        reasons = "; ".join(refusals[:4]) or "no submodule with parameters was called"
        raise CaptureError(f"no part of it can be captured, either ({reasons})")
    return unite(model, Skeleton.of(model), parts, tuple(refusals))


def _worthwhile(parts: dict[str, CapturedRegion]) -> dict[str, CapturedRegion]:
    """Without leaves and modules without parameters that are linked to nothing."""
    linked = {path for path, part in parts.items() if part.links}
    linked |= {link.source for part in parts.values() for link in part.links}
    return {
        path: part
        for path, part in parts.items()
        if path in linked or (part.root == path and _has_parameters(part.program))
    }


def _has_parameters(program: Program) -> bool:
    return any(isinstance(tensor, nn.Parameter) for tensor in program.tensors.values())


def again(model: nn.Module, regions: Mapping[str, Any], whole: Whole) -> RegionProgram:
    """Capture regions that are known already, as :func:`describe` describes them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for path, region in regions.items():
        if path not in modules:
            raise CaptureError(f"{type(model).__name__} has no submodule {path!r}.")
        try:
            links = tuple(
                RegionLink(**{**link, "read": tuple(link["read"])}) for link in region.get("links", ())
            )
        except (TypeError, KeyError) as error:
            raise PlanError(f"the plan's links of the region {path!r} are malformed.") from error
        part = _part(modules[path], path, [region["inputs"]], whole)
        found[path] = replace(part, outside=tuple(region["outside"]), links=links)
    return unite(model, Skeleton.of(model), found, ())


def describe(program: Program) -> dict[str, Any]:
    """The regions of a program as plain data; empty where it covers its model."""
    regions = program.regions if isinstance(program, RegionProgram) else ()
    return {
        r.path: {
            "inputs": r.inputs,
            "outside": list(r.outside),
            "links": [{**asdict(link), "read": list(link.read)} for link in r.links],
        }
        for r in regions
    }


def real_inputs(
    model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Calls]:
    """Arguments of each piece of ``program``, by its path, when ``model`` evaluates ``args`` and ``kwargs``.

    Of a region that is called several times, those of its first call; a region that is not called is
    left out.
    """
    if not isinstance(program, RegionProgram):
        return {"": (args, kwargs)}
    return observe(model, args, kwargs, {region.path for region in program.regions}).kept


def _part(module: nn.Module, path: str, calls: list[Any], whole: Whole) -> CapturedRegion:
    """The submodule ``module``, whose program must be the same for all ``calls``."""
    odd = next((call for call in calls if isinstance(call, FxpruneError)), None)
    if odd is not None:
        raise odd
    root = path
    if is_leaf(module):
        root, _, name = path.rpartition(".")
        whole = partial(_leaf, name)
    program, rung = whole(module, *restore_inputs(calls[0]), len(calls) == 1)
    code = str(program.graph)
    for other in calls[1:]:
        if str(whole(module, *restore_inputs(other), False)[0].graph) != code:
            raise CaptureError("its graph differs from call to call")
    return CapturedRegion(program, root, rung, calls[0])


def _leaf(
    name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], other_sizes: bool
) -> tuple[Program, str]:
    """The program of a module that does nothing but call its child ``module``, a leaf."""
    arguments = Arguments.of(module, args, kwargs)
    graph = fx.Graph()
    places = {
        given: graph.create_node("placeholder", given, arguments.default(given)) for given in arguments.all()
    }
    placed = tuple(places[given] for given in arguments.by_place())
    graph.output(graph.call_module(name, placed, {given: places[given] for given in arguments.by_name()}))
    holder = nn.Module().train(module.training)
    holder._modules[name] = module
    program = Program(
        graph=graph,
        modules={name: module},
        tensors=dict(named_tensors(holder)),
        skeleton=Skeleton.of(holder),
    )
    return program, ""


def _beneath(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name.startswith(f"{path}."))


@dataclass
class Observed:
    """What was seen when a model ran.

    Attributes:
        calls: by path of a submodule the distinct descriptions of its arguments.
        kept: by path the arguments of the first call, for paths that were asked for.
        users: by name of a parameter or buffer the stacks of submodules in which it was used.
        names: the names of each tensor, one for each module that owns it.
    """

    calls: dict[str, list[Any]] = field(default_factory=dict)
    kept: dict[str, Calls] = field(default_factory=dict)
    users: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    names: list[list[str]] = field(default_factory=list)

    def outside(self, regions: set[str]) -> tuple[str, ...]:
        """Tensors of ``regions`` that are also used, or owned, by a module in none of them."""

        def within(path: str) -> bool:
            return any(path.startswith(f"{region}.") for region in regions)

        found: list[str] = []
        for names in self.names:
            stacks = self.users.get(names[0], ())
            if not all(map(within, names)) or any(regions.isdisjoint(stack) for stack in stacks):
                found += filter(within, names)
        return tuple(found)


def observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keep: set[str] | None = None
) -> Observed:
    """Run a copy of ``model`` and watch its submodules.

    The copy shares nothing with the model, as its forward may write anywhere, and runs without gradients.
    The state of the random number generators is restored. Given ``keep``, the paths of which to keep real
    inputs, it runs in evaluation mode.

    Raises:
        CaptureError: if the model cannot be copied, or does not run.
    """
    watch = _Watch(keep)
    _run(model, args, kwargs, watch, evaluate=keep is not None)
    return watch.seen


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: _Watch | _Trail, evaluate: bool
) -> None:
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]
    if any(isinstance(t, torch.Tensor) and t.device.type == "meta" for t in tensors):
        raise CaptureError(
            "its parts can only be found by running it, and the model or its inputs are on meta"
        )
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # whatever a user's attributes raise
        raise CaptureError(f"it cannot be copied: {told(error)}") from error
    if evaluate:
        twin.eval()
    args, kwargs = _copied(args), _copied(kwargs)
    handles = list(watch.hooks(twin))
    try:
        with drawn(), torch.no_grad(), watch:
            output = twin(*args, **kwargs)
        watch.finish(twin, (args, kwargs, output))
    except Exception as error:  # whatever a user's forward raises
        for handle in handles:
            handle.remove()
        try:
            with drawn(), torch.no_grad():
                twin(*args, **kwargs)
        except Exception as own:
            failure = ExampleInputsError(
                f"{type(model).__name__} does not run on the example inputs, whether it is captured or not: "
                f"{blame(own)}{told(own)}. Next: call model(...) with the same "
                f"inputs, and give inputs with which it runs."
            )
            failure.node = None  # type: ignore[attr-defined]  # an earlier rung may know at which it fails
            raise failure from own
        raise CaptureError(f"it does not run while it is watched: {told(error)}") from error
    finally:
        for handle in handles:
            handle.remove()


def _refuse_transformed(inputs: Any) -> None:
    """Refuse what ``torch.vmap`` and its like pass on: it has no values outside of them.

    Raises:
        CaptureError: if such a tensor is among the inputs of a submodule.
    """
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        raise CaptureError("it is called within torch.vmap or another transform of torch.func")


def _takes(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether the call is one that ``module`` takes; what it does not take, the code around it may catch."""
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # a function in C has no signature
        return True
    return True


class _Watch(TorchFunctionMode):
    def __init__(self, keep: set[str] | None) -> None:
        super().__init__()
        self.seen = Observed()
        self.keep = keep
        self.stack: list[str] = []
        self.names: dict[int, str] = {}

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        same: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    same.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
        self.names = {key: names[0] for key, names in same.items()}
        self.seen.names = list(same.values())

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            path = paths[module]
            self.stack.append(path)
            if not _takes(module, args, kwargs):
                return
            if self.keep is None:
                try:
                    _refuse_transformed((args, kwargs))
                    call: Any = describe_inputs(args, kwargs)
                except FxpruneError as error:
                    call = error
                calls = self.seen.calls.setdefault(path, [])
                if call not in calls:
                    calls.append(call)
            elif path in self.keep and path not in self.seen.kept:
                self.seen.kept[path] = _copied((args, kwargs))

        def leave(*_: Any) -> None:
            self.stack.pop()

        paths = {module: path for path, module in model.named_modules()}
        for module in paths:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            yield module.register_forward_pre_hook(enter, prepend=False, with_kwargs=True)
            yield module.register_forward_hook(leave, prepend=True, always_call=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.keep is None:
            for leaf in pytree.tree_leaves((args, kwargs)):
                name = self.names.get(id(leaf))
                if name is not None:
                    self.seen.users.setdefault(name, set()).add(tuple(self.stack))
        return func(*args, **(kwargs or {}))

    def finish(self, model: nn.Module, tree: Any) -> None:
        """Called after the run with the model's inputs and outputs."""


def _linked(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], parts: dict[str, CapturedRegion]
) -> dict[str, CapturedRegion]:
    """The same parts with links, each after those that it is linked to."""
    if len(parts) < 2:
        return parts
    trail = _Trail({path: part.program for path, part in parts.items()})
    try:
        _run(model, args, kwargs, trail, evaluate=False)
    except CaptureError:  # code that cannot be watched so closely
        return parts
    links = trail.links()
    waiting = {path: replace(part, links=links.get(path, ())) for path, part in parts.items()}
    ordered: dict[str, CapturedRegion] = {}
    while waiting:
        ready = (p for p, part in waiting.items() if not {k.source for k in part.links} & waiting.keys())
        path = next(ready, None)
        if path is None:  # they feed each other in turns
            return parts
        ordered[path] = waiting.pop(path)
    return ordered


Output = tuple[str, int]
"""A region and the number of a leaf in what it returns."""


class _Trail(TorchFunctionMode):
    """Follows what the regions return, by the identity of the tensors.

    Attributes:
        programs: the regions.
        sources: by identity of a tensor the region that returned it.
        used: outputs that something else than the graph of a region uses.
        read: dimensions of an output whose sizes the code around the regions reads.
        fed: by region, parameter and leaf where the tensors there came from; None where from no region.
    """

    def __init__(self, programs: Mapping[str, Program]) -> None:
        super().__init__()
        self.programs = programs
        self.sources: dict[int, Output] = {}
        self.used: set[Output] = set()
        self.read: dict[Output, set[int]] = {}
        self.fed: dict[tuple[str, str, int], set[Output | None]] = {}
        self.shapes: dict[Any, torch.Size] = {}
        self.inside: list[set[int]] = []  # identities of the arguments of the region that runs
        self.kept: list[torch.Tensor] = []  # so that identities stay unique
        self.dispatched = _Dispatched(self)

    def __enter__(self) -> _Trail:
        super().__enter__()  # type: ignore[no-untyped-call]
        self.dispatched.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.dispatched.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        for path in self.programs:
            module = model.get_submodule(path)
            yield module.register_forward_pre_hook(self._enter(path), prepend=False, with_kwargs=True)
            yield module.register_forward_hook(self._leave(path), prepend=True, always_call=True)

    def _enter(self, path: str) -> Callable[..., None]:
        program = self.programs[path]
        names = [str(node.target) for node in program.placeholders()]

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = _tensors((args, kwargs))
            if self.inside:  # called by another region, which ought to have it in its graph
                self.use(given)
            self.inside.append({id(leaf) for leaf in given})
            if not _takes(module, args, kwargs):
                return
            for name, value in zip(names, program.bind(args, kwargs), strict=True):
                for number, leaf in enumerate(pytree.tree_leaves(value)):
                    if isinstance(leaf, torch.Tensor):
                        place = (path, name, number)
                        self.fed.setdefault(place, set()).add(self.sources.get(id(leaf)))
                        self._shape(place, leaf)

        return enter

    def _leave(self, path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            given = self.inside.pop()
            for number, leaf in enumerate(pytree.tree_leaves(output)):
                if not isinstance(leaf, torch.Tensor):
                    continue
                place = (path, number)
                self._shape(place, leaf)
                if id(leaf) in self.sources or id(leaf) in given:  # not made by this very call
                    self.used |= {place, self.sources.get(id(leaf), place)}
                else:
                    self.sources[id(leaf)] = place
                    self.kept.append(leaf)

        return leave

    def _shape(self, place: Any, tensor: torch.Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self.shapes.setdefault(place, tensor.shape)

    def use(self, tree: Any) -> None:
        """Note that something is done with the tensors in ``tree``."""
        for leaf in pytree.tree_leaves(tree):
            source = self.sources.get(id(leaf))
            if source is not None and not (self.inside and id(leaf) in self.inside[-1]):
                self.used.add(source)
            elif isinstance(leaf, _Sizes):
                leaf.note(range(len(leaf)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = self.sources.get(id(args[0])) if args else None
        if source is None or self.inside or func not in _ABOUT:
            self.use((args, kwargs))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is torch.Tensor.size and (len(args) > 1 or kwargs):
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            if isinstance(dim, int):
                self.read.setdefault(source, set()).add(dim % args[0].dim())
            else:
                self.use(args)
        elif isinstance(result, torch.Size):
            return _Sizes.of(result, self.read.setdefault(source, set()).update)
        return result

    def finish(self, model: nn.Module, tree: Any) -> None:
        """Called after the run with the model's inputs and outputs."""
        stored = [
            value
            for module in model.modules()
            for name, value in vars(module).items()
            if name not in ("_modules", "_parameters")
        ]
        self.use((tree, stored))
        if any(not isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(tree)):
            self.used.update(self.sources.values())  # nobody knows what is in there

    def links(self) -> dict[str, tuple[RegionLink, ...]]:
        """By region what comes to it from others."""
        for place, sources in self.fed.items():
            for source in sources - {None}:
                if source is not None and (
                    len(sources) > 1 or source[0] == place[0] or self.shapes[source] != self.shapes[place]
                ):
                    self.used.add(source)
        links: dict[str, tuple[RegionLink, ...]] = {}
        for (path, name, leaf), sources in self.fed.items():
            for source in sources:
                if source is not None and source not in self.used:
                    link = RegionLink(*source, name, leaf, tuple(sorted(self.read.get(source, ()))))
                    links[path] = (*links.get(path, ()), link)
        return links


class _Dispatched(TorchDispatchMode):
    """Sees what compiled code does, which torch functions do not show."""

    def __init__(self, trail: _Trail) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trail = trail

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.trail.use((args, kwargs))
        return func(*args, **(kwargs or {}))


_PLAIN = (torch.Tensor, bool, int, float, str, bytes, type(None))

_ABOUT = frozenset(
    [
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.is_floating_point,
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("shape", "device", "dtype", "layout", "ndim", "is_cuda", "requires_grad")
        ),
    ]
)
"""What tells something about a tensor other than its values."""


class _Sizes(tuple[int, ...]):
    """The sizes of a tensor; tells which of them are looked at."""

    note: Callable[[Iterable[int]], None]

    @classmethod
    def of(cls, sizes: torch.Size, note: Callable[[Iterable[int]], None]) -> _Sizes:
        made = cls(sizes)
        made.note = note
        return made

    def __getitem__(self, index: Any) -> Any:
        dims = range(len(self))[index]
        self.note(dims if isinstance(dims, range) else [dims])
        sizes = super().__getitem__(index)
        return torch.Size(sizes) if isinstance(sizes, tuple) else sizes

    def __radd__(self, other: Any) -> Any:
        return operator.add(other, self[:])

    def __hash__(self) -> int:
        return hash(self[:])


def _all(name: str) -> Any:
    return lambda sizes, *args: getattr(sizes[:], name)(*args)


for _name in ["iter", "eq", "ne", "lt", "le", "gt", "ge", "contains", "add", "mul", "rmul"]:
    setattr(_Sizes, f"__{_name}__", _all(f"__{_name}__"))
for _name in ("count", "index", "numel"):
    setattr(_Sizes, _name, _all(_name))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, tree)
