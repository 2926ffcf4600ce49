"""A program that covers parts of a model: regions, with opaque Python code around them.

All regions stand side by side in one graph, so that coupling, scoring, planning, rewriting and the check
know nothing of them: parameters that regions share are one tensor, and each region's outputs are outputs
of the graph, which keep their widths, unless nothing but other regions uses them: then they are linked,
and coupling runs through. Only the last step differs: the graph falls into its pieces, each of which
becomes the ``forward`` of its submodule in a copy of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .errors import CaptureError, RewriteError
from .graph_module import OwnedModule, clone_module, into_mode
from .inputs import restore_inputs
from .modes import renamed
from .program import Program, Skeleton, named_tensors


@dataclass(frozen=True)
class RegionLink:
    """A tensor that goes from one region to another and is used by nothing else.

    Attributes:
        source: path of the region that returns it.
        output: number of the leaf in what that region returns.
        input: the parameter of the other region's ``forward`` that holds it.
        leaf: number of the leaf in that argument.
        read: dimensions whose sizes are read by the code around the regions; they keep them.
    """

    source: str
    output: int
    input: str
    leaf: int
    read: tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A submodule that is captured as a whole.

    Attributes:
        path: the submodule.
        root: where the names in its program start: the submodule itself, or, if it is a leaf that stays what
            it is, the module that holds it.
        rung: the rung that captured it; empty for a leaf.
        inputs: description of its arguments (see :func:`fxprune.inputs.describe_inputs`).
        outside: parameters and buffers in it that code around the regions uses, too, by their full names.
        placeholders: name of a placeholder in the common graph -> its name in the submodule's signature.
        skeleton: the submodule's own.
        links: what comes from other regions.
    """

    path: str
    root: str
    rung: str
    inputs: Mapping[str, Any]
    outside: tuple[str, ...]
    placeholders: Mapping[str, str]
    skeleton: Skeleton
    links: tuple[RegionLink, ...] = ()


@dataclass(frozen=True)
class CapturedRegion:
    """What a region is made of.

    Attributes:
        program: the submodule's; of a leaf, that of a module which holds it.
        root: see :class:`Region`.
        rung: see :class:`Region`.
        inputs: description of its arguments.
        outside: names of its tensors that are used outside of the regions, too.
        links: what comes from other regions.
    """

    program: Program
    root: str
    rung: str
    inputs: Any
    outside: tuple[str, ...] = ()
    links: tuple[RegionLink, ...] = ()


def handed(outputs: Any) -> Any:
    """In the common graph: what a region returns, where some of it is linked."""
    return outputs


def joined(value: Any, links: tuple[tuple[Any, int, int], ...]) -> Any:
    """In the common graph: a region's argument with leaves that other regions return.

    Each link is ``(outputs of the other region, leaf of them, leaf of value)``.
    """
    leaves, spec = pytree.tree_flatten(value)
    for outputs, output, leaf in links:
        leaves[leaf] = pytree.tree_leaves(outputs)[output]
    return pytree.tree_unflatten(leaves, spec)


@dataclass(frozen=True, kw_only=True)
class RegionProgram(Program):
    """A :class:`~fxprune.program.Program` whose graph holds the regions of ``model``.

    Node metadata ``"region"`` is the path of the region that a node belongs to.

    Attributes:
        model: the model around the regions.
        regions: the submodules that the graph covers.
        refused: submodules that could not be captured and why, for people.
    """

    model: nn.Module
    regions: tuple[Region, ...]
    refused: tuple[str, ...] = ()

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The regions' own inputs, on meta; those of the model go to the code around them."""
        values: list[Any] = []
        pieces = self.pieces()
        for region in self.regions:
            values += pieces[region.path].bind(*restore_inputs(region.inputs))
        return values

    def pieces(self) -> dict[str, Program]:
        owners = _owners(self.graph)
        return {region.path: self._piece(region, owners) for region in self.regions}

    def result(self, class_name: str) -> nn.Module:
        """A copy of the model, of its own type, that owns ``tensors`` and runs the regions' graphs."""
        memo: dict[int, Any] = {}
        for name, tensor in named_tensors(self.model):
            memo[id(tensor)] = self.tensors[name]
        modules = dict(self.model.named_modules(remove_duplicate=False))
        added = {}
        for path, leaf in self.modules.items():
            new = clone_module(leaf, partial(self._owned, path))
            if path in modules:
                memo[id(modules[path])] = new
            else:
                added[path] = new
        model = copy.deepcopy(self.model, memo)
        for path, new in added.items():
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = new
        pieces = self.pieces()
        for path, root in ((region.path, region.root) for region in self.regions):
            piece, region = pieces[path], model.get_submodule(path)
            if root != path:  # called as it is
                if sum(node.op not in ("placeholder", "output") for node in piece.graph.nodes) != 1:
                    raise RewriteError(f"a pass put a node beside {path}, which is called by code.")
                continue
            for name, tensor in piece.extras.items():
                parent, _, attribute = name.rpartition(".")
                region.get_submodule(parent).register_buffer(attribute, tensor, persistent=False)
            RegionModule.take_over(region, piece.graph)
        for module in model.modules():
            for key, hook in [*module._forward_pre_hooks.items()]:
                if getattr(hook, "until_narrowed", False):
                    del module._forward_pre_hooks[key]
        return model

    def graph_module(self, model: nn.Module, path: str) -> OwnedModule | None:
        """A ``GraphModule`` that shares everything with a region of a result; None if it is none."""
        part = model.get_submodule(path)
        if isinstance(part, RegionModule):
            return part.graph_module()
        (region,) = (region for region in self.regions if region.path == path)
        if region.root == path:
            return None
        holder, name = nn.Module(), path.rpartition(".")[2]
        holder._modules[name] = part
        return OwnedModule.of(holder, self.pieces()[path].graph, type(part).__name__)

    def _owned(self, path: str, name: str, _: torch.Tensor) -> torch.Tensor | None:
        return self.tensors.get(f"{path}.{name}")

    def _piece(self, region: Region, owners: Mapping[fx.Node, str]) -> Program:
        prefix = _prefix(region.root)
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if owners.get(node) == region.path:
                if node.target is handed:
                    continue
                if node.target is joined:  # the links are cut: its value comes in as the argument
                    if any(link[0].target is not handed for link in node.args[1]):
                        raise RewriteError(f"a pass put a node between two regions, before {node.name}.")
                    mapping[node] = new = mapping[node.args[0]]
                    new.name = node.name
                    continue
                mapping[node] = new = graph.node_copy(node, mapping.__getitem__)
                if node.op == "placeholder":
                    new.target = region.placeholders[node.name]
                elif node.op in ("get_attr", "call_module"):
                    new.target = str(node.target).removeprefix(prefix)
                renamed(new, lambda path: f"{path}.".removeprefix(prefix).removesuffix("."))
            elif node.op == "output":
                result = node.args[0][region.path]
                if isinstance(result, fx.Node) and result.target is handed:
                    result = result.args[0]
                graph.output(map_arg(result, mapping.__getitem__))
        used = {node.target for node in self.graph.nodes if owners.get(node) == region.path}
        return Program(
            graph=graph,
            modules={k.removeprefix(prefix): v for k, v in self.modules.items() if k in used},
            tensors={name: self.tensors[prefix + name] for name in region.skeleton.names},
            skeleton=region.skeleton,
            extras={k.removeprefix(prefix): v for k, v in self.extras.items() if k in used},
        )


def unite(
    model: nn.Module,
    skeleton: Skeleton,
    parts: Mapping[str, CapturedRegion],
    refused: tuple[str, ...],
) -> RegionProgram:
    """One program for several submodules of ``model``.

    Args:
        model: the model that holds them.
        skeleton: the model's.
        parts: the submodules by path; one that is linked to others comes after them.
        refused: submodules that could not be captured and why, for people.

    Raises:
        CaptureError: if a link starts or ends nowhere.
    """
    united = _United(parts)
    for path, part in parts.items():
        united.add(path, part)
    return RegionProgram(
        graph=united.finished(),
        modules=united.modules,
        tensors=dict(named_tensors(model)),
        skeleton=skeleton,
        extras=united.extras,
        notes=tuple(f"in {path}, {note}" for path, part in parts.items() for note in part.program.notes),
        refused=refused,
        model=model,
        regions=tuple(united.regions),
    )


class _United:
    """The graphs of several submodules, one after the other in one.

    Attributes:
        modules: the leaf modules of all, by the path in the whole model.
        extras: the constants of all, by the same.
        regions: what was added.
    """

    def __init__(self, parts: Mapping[str, CapturedRegion]) -> None:
        self.parts = parts
        self.modules: dict[str, nn.Module] = {}
        self.extras: dict[str, torch.Tensor] = {}
        self.regions: list[Region] = []
        self._graph = fx.Graph()
        self._outputs: dict[str, Any] = {}
        self._read: dict[str, dict[int, tuple[int, ...]]] = {}  # by region and output
        for link in (link for part in parts.values() for link in part.links):
            self._read.setdefault(link.source, {})[link.output] = link.read

    def add(self, path: str, part: CapturedRegion) -> None:
        """Copy the graph of the submodule at ``path``."""
        program, root = part.program, _prefix(part.root)
        if not {link.input for link in part.links} <= {str(n.target) for n in program.placeholders()}:
            raise CaptureError(f"{path} has no such inputs as its links name")
        mapping: dict[fx.Node, fx.Node] = {}
        placeholders = {}
        for node in program.graph.nodes:
            if node.op == "output":
                self._outputs[path] = self._returned(path, map_arg(node.args[0], mapping.__getitem__))
                continue
            new = self._copied(path, part, node, mapping)
            if node.op == "placeholder":
                placeholders[new.name] = str(node.target)
                new = self._linked(path, part, node, new)
            mapping[node] = new
        self.modules.update({f"{root}{name}": module for name, module in program.modules.items()})
        self.extras.update({f"{root}{name}": tensor for name, tensor in program.extras.items()})
        fixed = part.root, part.rung, part.inputs, part.outside
        self.regions.append(Region(path, *fixed, placeholders, program.skeleton, part.links))

    def finished(self) -> fx.Graph:
        """The graph, with what all regions return."""
        outside = [name for part in self.parts.values() for name in part.outside]
        self._outputs[""] = [self._graph.get_attr(name) for name in outside]
        output = self._graph.output(self._outputs)
        output.meta["linked"] = self._read
        output.meta["reason"] = "the boundary of a region: the code around it is no graph"
        return self._graph

    def _copied(
        self, path: str, part: CapturedRegion, node: fx.Node, mapping: Mapping[fx.Node, fx.Node]
    ) -> fx.Node:
        """A copy of a node, with names that are those of the whole model."""
        prefix, root, target = path.replace(".", "_"), _prefix(part.root), node.target
        if node.op == "placeholder":
            target = f"{prefix}__{target}"
        elif node.op in ("get_attr", "call_module"):
            target = f"{root}{target}"
        args, kwargs = map_arg((node.args, node.kwargs), mapping.__getitem__)
        name = f"{prefix}_{node.name}{'_unlinked' if _links(part, node) else ''}"
        new = self._graph.create_node(node.op, target, args, kwargs, name, node.type)
        new.meta = {**node.meta, "region": path}
        renamed(new, partial(_within, root))
        return new

    def _linked(self, path: str, part: CapturedRegion, node: fx.Node, new: fx.Node) -> fx.Node:
        """An input of a region, joined with what earlier ones hand to it; ``new`` is the copy of ``node``."""
        links = _links(part, node)
        if not links:
            return new
        if not {link.source for link in links} <= self._outputs.keys():
            raise CaptureError(f"{path} is linked to a region that does not come before it")
        sources = tuple((self._outputs[link.source], link.output, link.leaf) for link in links)
        name = f"{path.replace('.', '_')}_{node.name}"
        new = self._graph.create_node("call_function", joined, (new, sources), {}, name)
        new.meta["region"] = path
        return new

    def _returned(self, path: str, results: Any) -> Any:
        """What a region returns; where others read it, by a node of its own."""
        if path not in self._read:
            return results
        node = self._graph.call_function(handed, (results,))
        node.meta["region"] = path
        return node


def _links(part: CapturedRegion, node: fx.Node) -> list[RegionLink]:
    """The links that end at an input of a region."""
    return [link for link in part.links if node.op == "placeholder" and link.input == node.target]


def _within(prefix: str, path: str) -> str:
    return f"{prefix}{path}".removesuffix(".")


def _prefix(root: str) -> str:
    return f"{root}." if root else ""


def _owners(graph: fx.Graph) -> dict[fx.Node, str]:
    """The region of every node; one that a pass inserted belongs to that of its neighbours."""
    owners = {node: node.meta["region"] for node in graph.nodes if "region" in node.meta}
    nodes = [node for node in graph.nodes if node.op != "output"]
    for ordered, near in ((nodes, "all_input_nodes"), (reversed(nodes), "users")):
        for node in ordered:
            owner = next((owners[n] for n in getattr(node, near) if n in owners), None)
            if node not in owners and owner is not None:
                owners[node] = owner
    return owners


class RegionModule(nn.Module):
    """What a region becomes: a module of its original class that runs a graph.

    Attributes and methods are those of the original class, so that the code around the region finds what
    it looks for. Its graph is ``graph``.
    """

    graph: fx.Graph
    original: type[nn.Module]

    @staticmethod
    def take_over(module: nn.Module, graph: fx.Graph) -> None:
        """Turn ``module`` into one whose ``forward`` is ``graph``."""
        original = module.original if isinstance(module, RegionModule) else type(module)
        view = OwnedModule.of(module, graph, original.__name__)
        forward = getattr(type(view), "forward")  # noqa: B009  (made when it is looked at)
        module.__class__ = type(
            original.__name__,
            (RegionModule, original),
            {
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
                "original": original,
                "graph": graph,
                "forward": forward,
            },
        )

    def train(self, mode: bool = True) -> RegionModule:
        """As the original class does it.

        Raises:
            ModeError: if the region could not be captured in that mode.
        """
        return into_mode(self, mode, super().train, self.graph)

    def graph_module(self) -> OwnedModule:
        """A ``GraphModule`` that shares everything with this module."""
        return OwnedModule.of(self, self.graph, self.original.__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.original, self.graph_module(), self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionModule:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _unpickle(original: type[nn.Module], view: OwnedModule, state: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__.update(state)
    RegionModule.take_over(module, view.whole)
    return module


__all__ = ["CapturedRegion", "Region", "RegionLink", "RegionModule", "RegionProgram", "unite"]
