"""Several calls of one model, looked at together.

A training step and a forecast, a prefill and a decode step with a cache, ``encode_image`` and
``encode_text``: tensors are shared between the calls, so their units are, and the couplings are the union.
The calls become one: of a copy of the model whose ``forward`` makes them one after the other. That is all
that capture, the analysis and ``verify`` get to see. The further calls travel as plain data among the keyword
inputs (:data:`CALLS`), so that a plan and its file hold them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .errors import ExampleInputsError
from .inputs import Several, normalize
from .trees import FIRST, TENSORS, flatten

CALLS = "fxprune_calls"
"""The keyword input under which further calls travel."""
_RETURNED = "fxprune_returned"


@dataclass(frozen=True)
class Returned:
    """In the inputs of a call: what an earlier one returned.

    Attributes:
        name: a field, a key or a position of the result, ``"past_key_values"`` say; empty for all of it.
        call: which call, from 0; -1 is the one before.
    """

    name: str | int = ""
    call: int = -1


class Calls(Several):
    """Example inputs of several calls, in place of those of one.

        calls = fxprune.Calls(model, [
            {"input_ids": ids, "labels": ids},                     # forward, with keyword inputs
            ("encode_image", image),                               # another method
            {"input_ids": next, "cache": fxprune.Returned("cache", call=0)},
        ])
        narrow = fxprune.prune(model, calls, 0.5, into="module")

    What is removed fits all of them, in both modes. Costs, too, are those of all calls together.

    Args:
        model: the model.
        calls: for each call its inputs, as for :func:`fxprune.analyze`: a tensor, a tuple of positional
            inputs, a dict of keyword inputs; or a pair of the name of a method and its inputs. Inputs may be
            or hold :class:`Returned`.

    Raises:
        ExampleInputsError: if there is no call, for what is no method of the model, or for inputs that do not
            fit its signature; says which call.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Any]) -> None:
        if not isinstance(calls, (list, tuple)) or not calls:
            raise ExampleInputsError(
                f"Calls takes the model and a list of calls, [inputs, ('encode_text', inputs)] say; got "
                f"{type(calls).__name__}{'' if isinstance(calls, (list, tuple)) else ' in its place'}"
                f"{', which is empty' if isinstance(calls, (list, tuple)) else ''}."
            )
        self.calls = [_call(model, number, given) for number, given in enumerate(calls)]

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs: those of the first call, and the others as one keyword more."""
        first, *rest = self.calls
        return first["args"], {**first["kwargs"], CALLS: {"method": first["method"], "then": rest}}

    def __repr__(self) -> str:
        return f"Calls({', '.join(call['method'] for call in self.calls)})"


def _call(model: nn.Module, number: int, given: Any) -> dict[str, Any]:
    method, inputs = "forward", given
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str):
        method, inputs = given
    function = getattr(model, method, None)
    if not callable(function):
        raise ExampleInputsError(
            f"call {number}: {type(model).__name__} has no method {method!r}. A call is its inputs, or a "
            f"pair of the name of a method and its inputs."
        )
    try:
        args, kwargs = normalize((inputs,) if isinstance(inputs, Returned) else inputs)
        args, kwargs = _plain(args, number), _plain(kwargs, number)
        inspect.signature(function).bind(*args, **kwargs)
    except (ExampleInputsError, TypeError) as error:
        raise ExampleInputsError(
            f"call {number}, of {type(model).__name__}.{method}: {str(error).rstrip('.')}."
        ) from error
    return {"method": method, "args": args, "kwargs": kwargs}


def _plain(tree: Any, number: int) -> Any:
    """Inputs with plain data in place of :class:`Returned`."""
    if isinstance(tree, Returned):
        call = number + tree.call if tree.call < 0 else tree.call
        if not 0 <= call < number:
            raise ExampleInputsError(f"it takes what call {call} returned, which is not an earlier one")
        return {_RETURNED: tree.name, "call": call}
    if isinstance(tree, dict):
        return {key: _plain(item, number) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_plain(item, number) for item in tree)
    return tree


def as_one(model: nn.Module, kwargs: Mapping[str, Any]) -> nn.Module:
    """What makes all calls at once, where ``kwargs`` hold several: a copy of ``model`` that shares its
    modules and tensors; else ``model`` itself.
    """
    calls = kwargs.get(CALLS)
    if calls is None or isinstance(model, fx.GraphModule):
        return model
    kind: Any = type(model)
    new = object.__new__(_class_for(kind, calls["method"]))
    new.__dict__.update(model.__dict__)
    return new


@functools.lru_cache(maxsize=32)
def _class_for(kind: Any, first: str) -> Any:
    """The class ``kind`` with a ``forward`` that makes several calls, the first of the method ``first``."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls = kwargs.pop(CALLS)

        def function(name: str) -> Any:
            own = name == "forward" and "forward" not in self.__dict__
            return getattr(super(several, self) if own else self, name)

        results = [function(first)(*args, **kwargs)]
        outputs = [_copied(results[0])]
        for call in calls["then"]:
            given, named = _resolved(call["args"], results), _resolved(call["kwargs"], results)
            method = function(call["method"])
            named |= _state(method, results[-1]) if "with_state" in call else {}
            results.append(method(*given, **named))
            outputs.append(_copied(results[-1]))
        return {FIRST: outputs[0], **{f"call_{n}": out for n, out in enumerate(outputs[1:], 1)}}

    signature = inspect.signature(getattr(kind, first))
    parameters = list(signature.parameters.values())
    last = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
    parameters.insert(last, inspect.Parameter(CALLS, inspect.Parameter.KEYWORD_ONLY))
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    members = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    several = type(kind.__name__, (kind,), members)
    return several


def _resolved(tree: Any, results: list[Any]) -> Any:
    """Inputs with what was returned in its place."""
    if isinstance(tree, dict):
        if _RETURNED in tree:
            return _part(results[tree["call"]], tree[_RETURNED])
        return {key: _resolved(item, results) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_resolved(item, results) for item in tree)
    return tree


def _part(result: Any, name: str | int) -> Any:
    if name == "":
        return result
    if isinstance(name, int) or isinstance(result, dict):
        return result[name]
    return getattr(result, name)


def _copied(result: Any) -> Any:
    """What a call returned, as it is now: a later call may put other tensors into a cache."""
    tensors, structure = flatten(result, (fx.Proxy, *TENSORS))
    return structure.rebuild(tensors)


# -- generation ----------------------------------------------------------------------------------------


def _state(method: Any, result: Any) -> dict[str, Any]:
    """The fields of a result that are objects which the method takes in again under the same name."""
    takes = inspect.signature(method).parameters
    fields = getattr(result, "__dict__", {})
    return {
        name: value
        for name, value in fields.items()
        if name in takes and value is not None and not isinstance(value, (torch.Tensor, fx.Proxy))
    }


_TOKENS = ("decoder_input_ids", "input_ids")


def generation(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The inputs of two calls: one with a cache, and the decode step that follows it.

    None for a class that does not generate, or whose ``forward`` has no cache. Which state is handed on shows
    when the calls are made: what the first returns in a field that is named like an input.
    """
    can = getattr(model, "can_generate", None)
    if CALLS in kwargs or not callable(getattr(model, "generate", None)) or (callable(can) and not can()):
        return None
    signature = inspect.signature(model.forward)
    if "use_cache" not in signature.parameters:
        return None
    try:
        given = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:
        return None
    tokens = next((name for name in _TOKENS if isinstance(given.get(name), torch.Tensor)), None)
    if tokens is None or given[tokens].dim() != 2:
        return None
    for held in [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]:
        given |= given.pop(held, {})
    first = {name: value for name, value in given.items() if name != "labels"} | {"use_cache": True}
    shape = first[tokens].shape
    encoder = [name for name in first if tokens != _TOKENS[-1] and not name.startswith("decoder_")]
    step = {
        name: value[:, -1:] if name == tokens else value
        for name, value in first.items()
        if name in (tokens, *encoder) or not isinstance(value, torch.Tensor) or value.shape[:2] != shape
    }
    then = [{"method": "forward", "args": (), "kwargs": step, "with_state": True}]
    return (), {**first, CALLS: {"method": "forward", "then": then}}


__all__ = ["CALLS", "Calls", "Returned", "as_one", "generation"]
