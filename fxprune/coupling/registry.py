"""The registry of operator rules: those of ATen, and those of other libraries.

One table holds them all, by the operator's name: ``aten.mm``, ``aten.max.dim``, ``mylib.op``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import RuleError
from ..module_registry import (
    Attributes,
    LeafClass,
    Registration,
    attribute_rule,
    register_leaf,
    unregister_leaf,
)
from .coupler import Coupler
from .equations import Equation

Operator = torch._ops.OpOverload | torch._ops.OpOverloadPacket
Apply = Callable[[Coupler, tuple[Any, ...], dict[str, Any], Any], None]
ModuleApply = Callable[[Coupler, nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


@dataclass(frozen=True)
class Rule:
    """How one operator couples dimensions.

    Attributes:
        operator: name of the operator, ``aten.convolution`` or ``aten.view.default``.
        family: the file that it stands in; "custom" for those registered from outside.
        apply: the rule itself.
        site: ``file:line`` of the registration.
        given: what :func:`register_rule` was given.
        shapes: makes meta tensors for the results, ``(args, kwargs) -> out``, where their sizes depend on
            values; these are as large as they can be.
    """

    operator: str
    family: str
    apply: Apply
    site: str
    given: Any = None
    shapes: Callable[..., Any] | None = None


CUSTOM = "custom"
_RULES: dict[str, Rule] = {}
_FOUND: dict[Any, Rule | None] = {}


def rule(*operators: str, shapes: Callable[..., Any] | None = None) -> Callable[[Apply], Apply]:
    """Register the decorated function by name: ``"mm"`` and ``"max.dim"`` of ATen, ``"torchvision::nms"``.

    A name without an overload stands for all overloads that have no rule of their own. For ``shapes`` see
    :class:`Rule`.

    Raises:
        RuleError: where a name has a rule already; names both places.
    """

    def register(apply: Apply) -> Apply:
        code = inspect.unwrap(apply).__code__
        site = f"{code.co_filename}:{code.co_firstlineno}"
        for operator in operators:
            name = operator.replace("::", ".") if "::" in operator else f"aten.{operator}"
            _add(Rule(name, apply.__module__.rpartition(".")[2], apply, site, shapes=shapes))
        return apply

    return register


def module_rule(module_class: str, outputs: Callable[..., Any]) -> Callable[[ModuleApply], ModuleApply]:
    """Register the decorated function for a module class of a library, by its full name.

    Modules of the class stay whole, and are not run: ``outputs(module, args, kwargs)`` makes meta tensors of
    the results' shapes.
    """

    def register(couple: ModuleApply) -> ModuleApply:
        code = inspect.unwrap(couple).__code__
        site = f"{code.co_filename}:{code.co_firstlineno}"
        register_leaf(LeafClass(module_class, couple, outputs, None, site, couple, runs=False), _same)
        return couple

    return register


def register_rule(operator: Any, how: str | Operator | Apply) -> Registration:
    """Say how an operator that fxprune does not know couples the dimensions of its tensors.

    The operator must have a fake kernel (``register_fake`` in PyTorch's library module), since the analysis
    runs on shapes alone. Registering the same again changes nothing. See ``examples/custom_operator.py``.

    Args:
        operator: ``torch.ops.mylib.op`` (all overloads) or ``torch.ops.mylib.op.default``, what
            ``custom_op`` returned, or a name such as ``"mylib::op"``.
        how: one of

            - an equation, as in an einsum: ``"n c ..., c -> n c ..."`` (see
              :class:`fxprune.coupling.equations.Equation`): one term for each tensor argument in the order of
              the schema, and one for each result;
            - another operator with the same arguments whose rule holds here, too:
              ``torch.ops.aten.linear.default``;
            - ``"pointwise"``: all tensors broadcast against each other, and each entry of the results depends
              on the entries in its place;
            - a function ``(coupler, args, kwargs, out) -> None`` like those in ``fxprune/coupling/rules/``.

    Returns:
        A handle: ``remove()`` undoes the registration, and so does leaving it as a context manager.

    Raises:
        RuleError: if there is no such operator, it has another rule, or ``how`` does not fit its schema.
    """
    name, overloads = _resolve(operator)
    frame = inspect.stack()[1]
    site = f"{frame.filename}:{frame.lineno}"
    present = _RULES.get(name)
    if present is not None and present.family == CUSTOM and _same(present.given, how):
        return Registration(lambda: unregister(operator))
    _refuse_second(name, site)
    _add(Rule(name, CUSTOM, _custom(name, overloads, how), site, how))
    return Registration(lambda: unregister(operator))


def register_module(
    module_class: type[nn.Module],
    how: str | ModuleApply | None = None,
    attributes: dict[str, str] | Attributes | None = None,
) -> Registration:
    """Keep modules of a class whole when a model is traced, and say how they couple and what they remember.

    For modules that cannot be traced, for those in which tracing would lose something (the gradient of an
    ``autograd.Function``), and for those that keep widths as attributes. Capture by ``torch.export`` does
    not know modules: there, give the operators in it rules.

    Args:
        module_class: the class; subclasses are meant, too, unless they are registered themselves.
        how: one of

            - None: ``forward`` runs on shapes alone, and is followed operator by operator;
            - an equation whose terms are those of the tensor inputs in order, then of parameters and buffers
              by name: ``"n c ..., weight: c, bias: c -> n c ..."`` (see
              :class:`fxprune.coupling.equations.Equation`). Where ``forward`` does not run on shapes alone,
              the results take their sizes from the equation;
            - a function ``(coupler, module, args, kwargs, out) -> None``; ``coupler.value(tensor)`` gives the
              labels of inputs and of ``module.weight`` alike.
        attributes: which attributes change with which axis: ``{"channels": "weight[0]"}``, where the axis is
            one of a parameter or buffer, of the first ``input`` or of the ``output``; or a function
            ``(module, shapes, input, output) -> changes``: shapes of its tensors by name, of the first input
            and of the output after narrowing (None where unknown), and the new values by attribute.

    Returns:
        A handle: ``remove()`` undoes the registration, and so does leaving it as a context manager.

    Raises:
        RuleError: if this is no module class, it has another registration, or an argument cannot be read.
    """
    if nn.Module not in getattr(module_class, "__mro__", ()):
        raise RuleError(f"register_module takes a subclass of torch.nn.Module, got {module_class!r}.")
    couple: Any = how
    make = None
    if isinstance(how, str):
        equation = Equation(how, module_class.__qualname__)
        if not any(term.tensor is None for term in equation.operands):
            raise RuleError(f"the equation {how!r} of {module_class.__qualname__} has no term for an input.")
        couple, make = equation.couple_module, equation.outputs
    elif how is not None and not callable(how):
        raise RuleError(
            f"how {module_class.__qualname__} couples is an equation such as "
            f"'n c ..., weight: c -> n c ...', a function (coupler, module, args, kwargs, out), or None; "
            f"got {how!r}."
        )
    change = attribute_rule(attributes, module_class.__qualname__)
    frame = inspect.stack()[1]
    site = f"{frame.filename}:{frame.lineno}"
    register_leaf(LeafClass(module_class, couple, make, change, site, (how, attributes)), _same)
    return Registration(lambda: unregister(module_class))


def unregister(target: Any) -> None:
    """Undo :func:`register_rule` or :func:`register_module`, where there is anything to undo."""
    if isinstance(target, type):
        unregister_leaf(target)
        return
    name, _ = _resolve(target)
    if name in _RULES and _RULES[name].family == CUSTOM:
        del _RULES[name]
        _FOUND.clear()


def rule_for(operator: torch._ops.OpOverload) -> Rule | None:
    """The rule of an operator: its overload's, its own, the pointwise one, or None."""
    try:
        return _FOUND[operator]
    except KeyError:
        pass
    found = _lookup(operator)
    namespace, _, name = operator._schema.name.partition("::")
    if found is None and name.endswith("_"):  # the in-place form of an operator
        packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
        overload = getattr(packet, operator._overloadname, None)
        found = _lookup(overload) if overload is not None else _RULES.get(f"{namespace}.{name[:-1]}")
    _FOUND[operator] = found
    return found


def registered() -> dict[str, Rule]:
    """All rules by operator name, sorted."""
    return dict(sorted(_RULES.items()))


def custom_rules() -> tuple[Rule, ...]:
    """The rules that were registered from outside."""
    return tuple(rule for rule in _RULES.values() if rule.family == CUSTOM)


def _add(new: Rule) -> None:
    _refuse_second(new.operator, new.site)
    _RULES[new.operator] = new
    _FOUND.clear()


def _refuse_second(name: str, site: str) -> None:
    present = _RULES.get(name)
    if present is not None:
        remedy = "Remove one" if present.family != CUSTOM else f"fxprune.unregister({name!r}) removes it"
        raise RuleError(f"{name} has two rules: {present.site} and {site}. {remedy}.")


def _lookup(operator: torch._ops.OpOverload) -> Rule | None:
    full = str(operator)
    found = _RULES.get(full) or _RULES.get(full.rpartition(".")[0])
    if found is None and torch.Tag.pointwise in operator.tags:
        found = _RULES["aten.<pointwise>"]
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two registrations say the same; a function defined again (a notebook's cell) is the same."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if inspect.isfunction(a) and inspect.isfunction(b) and "<lambda>" not in a.__qualname__:
        return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)
    return bool(a == b)


def _resolve(operator: Any) -> tuple[str, list[torch._ops.OpOverload]]:
    """Name of an operator in the registry, and the overloads that it stands for."""
    operator = getattr(operator, "_opoverload", operator)  # what library.custom_op returns
    if isinstance(operator, str):
        namespace, _, name = operator.replace("::", ".").partition(".")
        found: Any = torch.ops
        for part in (namespace, *name.split(".")):
            try:
                found = getattr(found, part)
            except (AttributeError, RuntimeError):
                found = None
                break
        if not isinstance(found, Operator):
            raise RuleError(
                f"there is no operator {operator!r}: write 'namespace::name' or 'namespace::name.overload', "
                f"and import the library that defines it before."
            )
        operator = found
    if isinstance(operator, torch._ops.OpOverload):
        return str(operator), [operator]
    if isinstance(operator, torch._ops.OpOverloadPacket):
        overloads = [getattr(operator, overload) for overload in operator.overloads()]
        return str(operator), [o for o in overloads if not any(a.is_out for a in o._schema.arguments)]
    raise RuleError(
        f"a rule is for an operator such as torch.ops.mylib.op, or what torch's custom_op returned; got "
        f"{operator!r}. A Python function is traced into, and a module class goes to register_module."
    )


def _custom(name: str, overloads: list[torch._ops.OpOverload], how: Any) -> Apply:
    """The rule that ``how`` stands for. It is checked again after rewriting, whatever it says."""
    known_as = name
    if isinstance(how, Operator):
        like = how if isinstance(how, torch._ops.OpOverload) else getattr(how, how.overloads()[0])
        found = rule_for(like)
        if found is None:
            raise RuleError(f"{name} cannot have the rule of {how}, which has none.")
        inner, known_as = found.apply, like._schema.name.partition("::")[2]
    elif how == "pointwise":
        inner = _RULES["aten.<pointwise>"].apply
    elif isinstance(how, str):
        equation = Equation(how, name)
        for overload in overloads:
            equation.check_schema(overload)
        inner = equation.couple
    elif callable(how):
        inner = how
        _takes(how, ("coupler", "args", "kwargs", "out"), name)
    else:
        raise RuleError(
            f"how {name} couples is an equation such as 'n c ..., c -> n c ...', another operator, "
            f"'pointwise', or a function (coupler, args, kwargs, out); got {how!r}."
        )

    def apply(c: Coupler, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        c.depends_on_sizes()
        c.operator, before = known_as, c.operator
        try:
            inner(c, args, kwargs, out)
        finally:
            c.operator = before

    return apply


def _takes(function: Any, parameters: tuple[str, ...], name: str) -> None:
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise RuleError(
            f"the rule of {name} is called as ({', '.join(parameters)}), which "
            f"{getattr(function, '__qualname__', function)} does not take: {error}."
        ) from error
    except ValueError:  # no signature to be had
        pass
