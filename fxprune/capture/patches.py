"""Everything that capture replaces in the running process, and how it is undone.

While a forward is traced, some functions and attributes of ``torch`` have to be others: ``torch.fx`` itself
replaces ``nn.Module.__call__``, and ``torch.zeros`` takes no proxy. Such names belong to all threads. So:

- one re-entrant lock is held from the first replacement to the last undoing (:func:`within`);
- a replacement acts in the thread that traces, and hands every other thread on to what stood there before;
- all is undone on every way out. The names are written, and written back, in one call of a function in C,
  between whose steps Python raises no KeyboardInterrupt.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import logging
import math
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import methodcaller
from threading import get_ident
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd.function import FunctionMeta, _SingleLevelFunction
from torch.fx import _symbolic_trace
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

LOCK = threading.RLock()
"""Held by the one thread that captures, patches, or turns switches of the process."""
_T = TypeVar("_T")
_call = methodcaller("__call__")


class Session:
    """Replacements that are in place while :func:`within` calls something, for the thread that made this.

    Attributes:
        thread: the identity of that thread; None before the call and after it.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self._begin: list[Callable[[], Any]] = [partial(setattr, self, "thread", get_ident())]
        self._end: list[Callable[[], Any]] = [partial(setattr, self, "thread", None)]
        self._noted: set[tuple[int, str]] = set()
        self._owned: dict[tuple[int, int], Callable[..., Any]] = {}

    def is_here(self) -> bool:
        """Whether the call is under way, and asked for by its thread."""
        return get_ident() == self.thread

    def own(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is ``replacement`` in this thread, during the call, and else ``original``."""
        found = self._owned.get((id(original), id(replacement)))  # a built-in has a place in many tables
        if found is not None:
            return found

        @functools.wraps(original)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            return (replacement if get_ident() == self.thread else original)(*args, **kwargs)

        self._owned[id(original), id(replacement)] = chosen
        return chosen

    def replace(
        self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        """Replace the function ``name`` of a module or class by ``make(original)``, in this thread."""
        original = getattr(owner, name)
        chosen = self.own(original, make(original))
        self.put(owner, name, _Equal(original, chosen) if isinstance(owner, ModuleType) else chosen)

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Have ``owner.name`` be ``value`` during the call; it must see to other threads itself."""
        self.note(owner, name)
        self._begin.append(partial(setattr, owner, name, value))

    def note(self, owner: Any, name: str) -> None:
        """Put ``owner.name`` back to what it is now when the call is over, whoever writes it.

        Args:
            owner: a module, a class, or a dict of global names.
            name: the name in there, which need not exist.
        """
        if (id(owner), name) in self._noted:
            return
        self._noted.add((id(owner), name))
        table = vars(owner) if isinstance(owner, ModuleType) else owner
        if isinstance(table, dict):
            back = partial(table.__setitem__, name, table[name]) if name in table else partial(
                table.pop, name, None
            )  # fmt: skip
            self._end.append(back)
        elif name in vars(owner):
            self._end.append(partial(setattr, owner, name, vars(owner)[name]))
        else:  # what is not there cannot be deleted
            self._end += [partial(setattr, owner, name, None), partial(delattr, owner, name)]

    def body(
        self,
        function: Callable[..., Any],
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
        elsewhere: Callable[..., Any] | None = None,
    ) -> None:
        """Replace what a Python function does by ``make(original)``, under every name that it was given.

        Unlike :meth:`replace` this reaches names that were bound earlier
        (``from torch.compiler import is_compiling``). Other threads get ``elsewhere`` in place of the
        original, where there is one.
        """
        assert isinstance(function, FunctionType)
        code = function.__code__
        original = FunctionType(
            code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        chosen = self.own(elsewhere or original, make(original))
        constants = tuple(
            chosen if constant == _PLACE else constant for constant in _stand_in.__code__.co_consts
        )
        new = _stand_in.__code__.replace(co_consts=constants, co_freevars=code.co_freevars)
        self._end.append(partial(setattr, function, "__code__", code))
        self._begin.append(partial(setattr, function, "__code__", new))


class _Equal:
    """A callable that equals the function in whose place it stands.

    ``torch`` makes tables of its functions when they are first needed, in whatever thread, and keeps them.
    """

    def __init__(self, original: Callable[..., Any], chosen: Callable[..., Any]) -> None:
        self._original, self._chosen = original, chosen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._chosen(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._original

    def __hash__(self) -> int:
        return hash(self._original)

    def __instancecheck__(self, value: object) -> bool:  # torch.finfo is a class
        return isinstance(value, self._original)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


_PLACE = "where the constants of _stand_in hold the function to call"


def _stand_in(*args: Any, **kwargs: Any) -> Any:
    """Its code, with another constant, takes the place of that of a replaced function."""
    function: Any = "where the constants of _stand_in hold the function to call"
    return function(*args, **kwargs)


Patch = Callable[[Session], None]


def within(patches: Iterable[Patch], call: Callable[[], _T]) -> _T:
    """``call()``, with ``patches`` in place. Other threads wait for the lock only where they patch, too."""
    with LOCK:
        session = Session()
        for patch in patches:
            patch(session)
        begin: Callable[[], Any] = partial(deque, map(_call, session._begin), maxlen=0)
        end: Callable[[], Any] = partial(
            deque, map(_call, session._end), maxlen=0
        )  # also what is noted later
        try:
            begin()
            return call()
        finally:
            end()
            session._begin.clear()  # holds code, into which the collector of cycles does not see
            session._owned.clear()


# -- symbolic tracing -----------------------------------------------------------------------------


def fx_tracing(session: Session) -> None:
    """Keep what ``torch.fx.Tracer.trace`` replaces itself to this thread.

    That is ``nn.Module.__call__`` and ``__getattr__``, and the functions under ``torch.fx.wrap``.
    """

    class Patcher(_symbolic_trace._Patcher):
        def patch(self, frame_dict: dict[str, Any], name: str, new_fn: Any, deduplicate: bool = True) -> None:
            session.note(frame_dict, name)
            original = frame_dict[name] if name in frame_dict else getattr(builtins, name)
            super().patch(frame_dict, name, session.own(original, new_fn), deduplicate)

        def patch_method(self, cls: type, name: str, new_fn: Any, deduplicate: bool = True) -> None:
            session.note(cls, name)
            super().patch_method(cls, name, session.own(getattr(cls, name), new_fn), deduplicate)

        # Dynamo, in whatever thread it runs, takes back what the tracer that started last has replaced.
        def revert_all_patches(self) -> list[Any]:
            return super().revert_all_patches() if session.is_here() else self.patches_made

        def reapply_all_patches(self) -> list[Any]:
            return super().reapply_all_patches() if session.is_here() else self.patches_made

    session.note(_symbolic_trace, "CURRENT_PATCHER")
    if hasattr(_symbolic_trace, "_is_fx_tracing_tls"):  # an interrupt may come between setting it and `try`
        session.note(_symbolic_trace._is_fx_tracing_tls, "flag")
    session.replace(_symbolic_trace, "_Patcher", lambda original: Patcher)


def training(flag: Callable[[nn.Module, bool], Any]) -> Patch:
    """Have ``module.training`` be ``flag(module, mode)``.

    Done with a property on ``nn.Module``, so that no module is written to.
    """

    def patch(session: Session) -> None:
        def read(module: nn.Module) -> Any:
            try:
                mode = module.__dict__["training"]
            except KeyError:
                raise AttributeError("training") from None
            return flag(module, mode) if session.is_here() else mode

        def write(module: nn.Module, mode: Any) -> None:
            module.__dict__["training"] = mode

        session.put(nn.Module, "training", property(read, write))

    return patch


def functions(
    names: Iterable[str],
    make: Callable[[Any], Callable[..., Any]],
    tables: Iterable[dict[str, Any]],
    owner: ModuleType = torch,
) -> Patch:
    """Replace functions of ``torch`` by ``make(original)``, also where they were imported by name.

    Args:
        names: of the functions.
        make: gives what stands in for one.
        tables: global names, in which the functions may stand.
        owner: the module that has them.
    """

    def patch(session: Session) -> None:
        for name in names:
            original: Callable[..., Any] = getattr(owner, name)
            session.replace(owner, name, make)
            for table in tables:
                if table.get(name) is original:
                    session.note(table, name)
                    chosen = _Equal(original, session.own(original, make(original)))
                    session._begin.append(partial(table.__setitem__, name, chosen))

    return patch


def types_of_values(tables: Iterable[dict[str, Any]], is_instance: Callable[[Any, Any], bool]) -> Patch:
    """Have ``isinstance`` in the global names ``tables``, ``torch.is_tensor`` and ``torch.jit.isinstance``
    ask ``is_instance``.
    """

    def patch(session: Session) -> None:
        session.body(torch.is_tensor, lambda original: lambda obj: is_instance(obj, torch.Tensor))
        for table in (*tables, vars(torch._jit_internal)):
            session.note(table, "isinstance")
            chosen = session.own(table.get("isinstance", isinstance), is_instance)
            session._begin.append(partial(table.__setitem__, "isinstance", chosen))

    return patch


def autograd_functions(meet: Callable[[type, tuple[Any, ...]], Any]) -> Patch:
    """Have ``Function.apply(*args)`` give ``meet(Function, args)``, unless that is NotImplemented.

    ``apply`` is not replaced: it calls ``Function.forward``, and it is this that it gets another of. So the
    name under which ``apply`` is called, and when it was bound (``swish = Swish.apply``), make no difference.
    Blocks under ``torch.utils.checkpoint`` are run as if they stood there themselves.
    """
    inherited = _SingleLevelFunction.setup_context
    enabled, is_met = True, False  # of the apply that runs: gradients outside of it; what became of it

    def read(cls: type, name: str) -> Any:
        nonlocal enabled
        value = type.__getattribute__(cls, name)
        if name == "setup_context":  # the first that apply asks for, before it switches gradients off
            enabled = torch.is_grad_enabled()
            return value if value is inherited else functools.partial(set_up, value)
        return forward_of(cls, value) if name == "forward" else value

    def set_up(original: Callable[..., Any], ctx: Any, inputs: Any, output: Any) -> Any:
        return None if is_met else original(ctx, inputs, output)

    def forward_of(cls: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_met
            takes_context = type.__getattribute__(cls, "setup_context") is inherited
            inputs = args[1:] if takes_context else args
            with _gradients(enabled):
                if cls is CheckpointFunction:
                    block, _, *given = inputs
                    return block(*given)
                result = meet(cls, inputs)
            is_met = result is not NotImplemented
            return result if is_met else original(*args, **kwargs)

        return forward

    def patch(session: Session) -> None:
        session.put(FunctionMeta, "__getattribute__", session.own(type.__getattribute__, read))

    return patch


@contextlib.contextmanager
def _gradients(enabled: bool) -> Iterator[None]:
    """``torch.set_grad_enabled`` that no tracer of torch's sees."""
    before = torch.is_grad_enabled()
    with torch._C.DisableTorchFunction():
        torch._C._set_grad_enabled(enabled)
    try:
        yield
    finally:
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(before)


# -- what code may ask about being captured ---------------------------------------------------------


def flags(hidden: bool, asked: set[str]) -> Patch:
    """Have code read that nothing is compiled, exported or traced, where only capture says that it is.

    ``torch`` itself goes on reading the truth. Other threads read what holds without the capture.

    Args:
        hidden: whether this thread reads so, too.
        asked: receives the names of functions that the user's code asked, and that were true.
    """

    def patch(session: Session) -> None:
        # Before anything is replaced: its tables are made at import, and must hold the functions themselves.
        import torch._dynamo.external_utils as dynamo

        for function, elsewhere in (
            (torch.compiler.is_compiling, _always(torch.compiler.is_compiling())),
            (torch._utils.is_compiling, _always(torch.compiler.is_compiling())),
            (dynamo.is_compiling, _always(torch.compiler.is_compiling())),
            (torch.compiler.is_exporting, _always(torch.compiler.is_exporting())),
        ):
            session.body(function, partial(_answer, hidden, asked), elsewhere)
        for name in ("is_fx_tracing", "is_fx_symbolic_tracing"):  # which differ from thread to thread
            if hasattr(_symbolic_trace, name):  # the second came with torch 2.9
                session.body(getattr(_symbolic_trace, name), partial(_answer, hidden, asked))

    return patch


def marks(session: Session) -> None:
    """Skip what code says to Dynamo of tensors (``torch._dynamo.mark_static_address``): proxies are none."""
    import torch._dynamo.decorators as dynamo

    for name in ("mark_dynamic", "mark_static", "mark_static_address", "mark_unbacked", "maybe_mark_dynamic"):
        if hasattr(dynamo, name):
            session.body(getattr(dynamo, name), lambda original: lambda *args, **kwargs: None)


def _always(answer: bool) -> Callable[[], bool]:
    return lambda: answer


def _answer(hidden: bool, asked: set[str], original: Callable[[], bool]) -> Callable[[], bool]:
    def answer() -> bool:
        truth = original()
        name = str(sys._getframe(3).f_globals.get("__name__"))  # behind Session.own and _stand_in
        if not truth or name.partition(".")[0] == "torch":
            return truth
        asked.add(original.__name__)
        return not hidden

    return answer


# -- torch.export ---------------------------------------------------------------------------------


def exporting(session: Session) -> None:
    """Keep to this thread what ``torch.export`` does to the whole process, and let it say nothing.

    It switches libraries of kernels off, which its graph does not depend on, sets flags, and replaces
    ``max``, ``min`` and ``math.pow``. Where it refuses, it logs and prints graphs; the error has the reason.
    """
    from torch.export import _trace

    session.replace(_trace, "_ignore_backend_decomps", lambda original: contextlib.nullcontext)
    numbers: tuple[tuple[Any, str], ...] = ((builtins, "max"), (builtins, "min"), (math, "pow"))

    def own(original: Any) -> Callable[[], Any]:
        @contextlib.contextmanager
        def override() -> Iterator[None]:
            # It writes into modules of ours, since from the process' own any thread would take it at once.
            copies = {owner: SimpleNamespace(**vars(owner)) for owner, _ in numbers}
            code = original.__wrapped__
            names = {**code.__globals__, "builtins": copies[builtins], "math": copies[math]}
            within_copies = FunctionType(code.__code__, names, closure=code.__closure__)
            before = [getattr(owner, name) for owner, name in numbers]
            with contextlib.contextmanager(within_copies)():
                try:
                    for (owner, name), plain in zip(numbers, before, strict=True):
                        setattr(owner, name, session.own(plain, getattr(copies[owner], name)))
                    yield
                finally:
                    for (owner, name), plain in zip(numbers, before, strict=True):
                        setattr(owner, name, plain)

        return override

    session.replace(_trace, "_override_builtin_ops", own)
    for owner, name in (
        *numbers,
        (torch.compiler, "_is_compiling_flag"),
        (torch.compiler, "_is_exporting_flag"),
    ):
        session.note(owner, name)
    session.replace(
        logging.Logger,
        "isEnabledFor",
        lambda original: lambda logger, level: level > logging.WARNING and original(logger, level),
    )
    for name in ("warn", "warn_explicit"):
        session.replace(warnings, name, lambda original: lambda *args, **kwargs: None)
    session.put(sys, "stderr", _Muted(session, sys.stderr))


class _Muted:
    """A stream to which one thread writes in vain."""

    def __init__(self, session: Session, stream: Any) -> None:
        self._session, self._stream = session, stream

    def write(self, text: str) -> int:
        return len(text) if self._session.is_here() else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# -- what other stages need while they run a model ----------------------------------------------------


class PlainAttention(TorchFunctionMode):
    """While it lasts, attention layers of ``torch.nn`` make the calls that they consist of, in this thread.

    They take their fused path, one operator that hides the matrix products, only where no mode like this
    one may want to see the calls.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


_resting = 0
_collecting = False


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """While it lasts, Python does not look for cycles of objects, which takes time; in any thread."""
    global _resting, _collecting
    with LOCK:
        if not _resting:
            _collecting = gc.isenabled()
        _resting += 1
        gc.disable()
    try:
        yield
    finally:
        with LOCK:
            _resting -= 1
            if not _resting and _collecting:
                gc.enable()


@contextlib.contextmanager
def switched(*switches: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """While it lasts, switches of the whole process are others (``torch.backends.cudnn.flags(...)``).

    One thread at a time, so that each finds what it puts back. Threads that run a network meanwhile compute
    the same with other kernels, equal to rounding.
    """
    with LOCK, contextlib.ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch)
        yield


__all__ = [
    "LOCK",
    "Patch",
    "PlainAttention",
    "Session",
    "autograd_functions",
    "exporting",
    "flags",
    "functions",
    "fx_tracing",
    "switched",
    "training",
    "types_of_values",
    "within",
    "without_collector",
]
