"""Capture touches no other thread, and leaves nothing behind (fxprune/capture/patches.py)."""

from __future__ import annotations

import builtins
import contextlib
import copy
import logging
import math
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd.function import FunctionMeta
from torch.compiler import is_compiling
from torch.export import _trace
from torch.fx import _symbolic_trace
from torch.nn import functional as F

import fxprune

PLACES: dict[str, tuple[Any, str]] = {
    **{f"torch.{name}": (torch, name) for name in ("zeros", "full", "arange", "eye", "finfo", "is_tensor")},
    **{f"Module.{name}": (nn.Module, name) for name in ("__call__", "__getattr__", "training")},
    "FunctionMeta.__getattribute__": (FunctionMeta, "__getattribute__"),
    "isinstance": (sys.modules[__name__], "isinstance"),
    "math.pow": (math, "pow"),
    "math.sqrt": (math, "sqrt"),
    "max": (builtins, "max"),
    "Logger.isEnabledFor": (logging.Logger, "isEnabledFor"),
    "warnings.warn": (warnings, "warn"),
    "sys.stderr": (sys, "stderr"),
    "_Patcher": (_symbolic_trace, "_Patcher"),
    "CURRENT_PATCHER": (_symbolic_trace, "CURRENT_PATCHER"),
    "is_compiling": (torch.compiler, "is_compiling"),
    "_is_compiling_flag": (torch.compiler, "_is_compiling_flag"),
}


def state() -> dict[str, Any]:
    """What stands in all these places, and what is switched on in the process."""
    found = {name: vars(owner).get(place) for name, (owner, place) in PLACES.items()}
    found["code"] = is_compiling.__code__
    found["mkldnn"] = torch._C._get_mkldnn_enabled()
    found["attention"] = torch.backends.mha.get_fastpath_enabled()
    found["filters"] = list(warnings.filters)
    return found


def changed(before: dict[str, Any]) -> list[str]:
    now = state()
    return [name for name in before if now[name] is not before[name] and now[name] != before[name]]


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """All of it is as it was after each test."""
    import torch._dynamo
    import torch.export._trace  # noqa: F401  imports add filters of warnings

    before = state()
    yield
    assert changed(before) == []


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


swish = Swish.apply


def nothing(net: nn.Module) -> None:
    pass


class Net(nn.Module):
    """Convolutions; ``look`` is called in the middle of its forward."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 8, 1)
        self.d = nn.Linear(8, 3)
        self.look: Callable[[nn.Module], Any] = nothing

    def forward(self, x: Tensor) -> Any:
        x = swish(self.b(self.a(x)))
        self.look(self)
        return self.d(self.c(x).mean((2, 3)))


class ByShapes(Net):
    """A network that the second rung captures."""

    def forward(self, x: Tensor) -> Any:
        if x.shape[2] < 4:
            raise ValueError("too small")
        return super().forward(x) + torch.zeros(len(x), 3)


class ByExport(Net):
    """A network that torch.export captures."""

    def forward(self, x: Tensor) -> Any:
        if not issubclass(x.__class__, Tensor):
            raise TypeError("no tensor")
        return super().forward(x)


KINDS = {
    "symbolic tracing": Net,
    "symbolic tracing with known shapes": ByShapes,
    "torch.export": ByExport,
}


def serve(net: nn.Module, encoder: nn.Module, x: Tensor, want: Tensor) -> None:
    """What another thread may do meanwhile; raises if it sees anything of a capture."""
    made = torch.zeros(3, 4), torch.full((2,), 1.0), torch.arange(3), torch.eye(2)
    assert all(type(tensor) is Tensor and torch.is_tensor(tensor) for tensor in made)
    assert type(torch.finfo(torch.float32).eps) is float
    assert isinstance(torch.finfo(torch.float32), torch.finfo)
    assert type(max(made[0][0, 0], made[1][0])) is Tensor
    assert type(math.pow(2, 3)) is float
    assert type(len(made)) is int
    assert not is_compiling()
    assert not torch.compiler.is_exporting()
    assert not _symbolic_trace.is_fx_tracing()
    assert type(net.training) is bool
    assert isinstance(net.a, nn.Conv2d)
    assert logging.getLogger("torch.fx").isEnabledFor(logging.WARNING)
    with torch.no_grad():
        assert torch.equal(net(x), want)
    with torch.inference_mode():
        assert type(encoder(torch.zeros(1, 4, 8))) is Tensor
    t = torch.ones(3, requires_grad=True)
    Swish.apply(t).sum().backward()
    assert t.grad is not None
    assert nn.Sequential(nn.Linear(2, 2), nn.ReLU())(torch.zeros(1, 2)).shape == (1, 2)


@pytest.fixture
def server() -> Callable[[], None]:
    net = Net().eval()
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        want = net(x)
    return lambda: serve(net, encoder, x, want)


def in_thread(call: Callable[[], None]) -> list[BaseException]:
    """Run ``call`` in another thread; gives what it raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


@pytest.mark.parametrize("rung", KINDS)
def test_another_thread_in_the_middle_of_tracing_sees_nothing_of_it(
    rung: str, server: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    net = KINDS[rung]().eval()
    seen = SimpleNamespace(errors=[], looks=0)  # lists that a function holds are copied with the model

    def say() -> None:
        sys.stderr.write("said by another thread")
        with pytest.warns(UserWarning, match="warned in another thread"):
            warnings.warn("warned in another thread", stacklevel=1)

    def look(_: nn.Module) -> None:
        seen.looks += 1
        seen.errors.extend(in_thread(server) + in_thread(say))

    net.look = look
    graph = fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    assert graph.captured.rung == rung
    assert seen.looks
    assert seen.errors == []
    assert "said by another thread" in capsys.readouterr().err


def test_dynamo_in_another_thread_neither_stops_the_tracing_nor_brings_it_back() -> None:
    net, compiled = Net().eval(), torch.compile(nn.Linear(4, 4), backend="eager")
    net.look = lambda _: seen.errors.append(in_thread(lambda: compiled(torch.zeros(1, 4))))
    seen = SimpleNamespace(errors=[])
    graph = fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    assert seen.errors
    assert not any(seen.errors)
    called = [node.target for node in graph.captured.program.graph.nodes if node.op == "call_module"]
    assert {"a", "b", "c", "d"} <= set(called)


def prune(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return fxprune.prune(net, x, ratio=0.5).state_dict()


def test_many_threads_prune_while_others_run_networks(server: Callable[[], None]) -> None:
    """Four prune, different models and the same one, and two run networks."""
    shared = Net(24).eval()
    nets = [shared, shared, ByShapes().eval(), ByExport().eval()]
    x = torch.randn(2, 3, 8, 8)
    want = [prune(net, x) for net in nets]
    errors: list[BaseException] = []
    runs = [0] * 6
    stop = time.monotonic() + 4

    def work(place: int) -> None:
        try:
            while time.monotonic() < stop or not runs[place]:
                if place < 4:
                    got = prune(nets[place], x)
                    assert got.keys() == want[place].keys()
                    assert all(torch.equal(got[name], tensor) for name, tensor in want[place].items())
                else:
                    server()
                    with torch.no_grad():
                        assert type(shared(x)) is Tensor
                runs[place] += 1
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(runs)


@pytest.mark.parametrize("rung", KINDS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_nothing_is_left_after_an_error_in_the_middle(rung: str, error: type[BaseException]) -> None:
    net = KINDS[rung]().eval()
    attributes = {path: dict(vars(module)) for path, module in net.named_modules()}

    def fail(traced: Any) -> None:
        traced.a.cache = torch.zeros(1)
        raise error

    attributes[""]["look"] = net.look = fail
    with pytest.raises(fxprune.FxpruneError if error is ValueError else error):
        fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    assert {path: dict(vars(module)) for path, module in net.named_modules()} == attributes
    assert type(net.training) is bool


def test_nothing_is_left_when_a_generator_that_analyzes_is_closed() -> None:
    def graphs() -> Iterator[fxprune.CouplingGraph]:
        while True:
            yield fxprune.analyze(Net().eval(), torch.randn(2, 3, 8, 8))

    generator = graphs()
    next(generator)
    before = state()
    generator.close()
    assert state() == before


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_an_interrupt_at_any_moment_leaves_nothing() -> None:
    nets = [kind().eval() for kind in KINDS.values()]
    x = torch.randn(2, 3, 8, 8)
    before, handler = state(), signal.signal(signal.SIGALRM, signal.default_int_handler)
    hits = 0
    try:
        for turn in range(60):
            net = nets[turn % 3] if turn % 6 else nets[0]
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0004 * (turn + 1))
                fxprune.analyze(net, x)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert changed(before) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert hits


@pytest.mark.skipif(not hasattr(_symbolic_trace, "_is_fx_tracing_tls"), reason="one flag for all threads")
def test_an_interrupt_before_torch_fx_can_put_its_flag_back(monkeypatch: pytest.MonkeyPatch) -> None:
    put = _symbolic_trace._set_is_fx_tracing

    def interrupted(value: bool) -> None:
        put(value)
        if value:
            raise KeyboardInterrupt

    monkeypatch.setattr(_symbolic_trace, "_set_is_fx_tracing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxprune.analyze(Net().eval(), torch.randn(2, 3, 8, 8))
    monkeypatch.undo()
    assert not _symbolic_trace.is_fx_tracing()


def test_what_torch_export_puts_in_place_of_functions_is_seen_by_no_other_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not for an instant: it is written where it is in place for this thread alone."""
    plain, seen, real = math.pow, [], vars(math)
    inside: list[type] = []

    class Asking(ByExport):
        def forward(self, x: Tensor) -> Any:
            inside.append(type(math.pow(2, 3)))
            return super().forward(x)

    fxprune.analyze(Asking().eval(), torch.randn(2, 3, 8, 8))
    assert int in inside  # what PyTorch puts there

    @contextlib.contextmanager
    def override() -> Iterator[None]:
        before, math.pow = math.pow, lambda x, y: x**y
        seen.append(real["pow"])
        yield
        math.pow = before

    monkeypatch.setattr(_trace, "_override_builtin_ops", override)
    fxprune.analyze(ByExport().eval(), torch.randn(2, 3, 8, 8))
    assert set(seen) == {plain}
    assert math.pow is plain


def test_tables_of_functions_made_meanwhile_hold_the_functions() -> None:
    """As ``with torch.device(...)`` makes one, when it is first used."""
    net, made = Net().eval(), SimpleNamespace(table=set())
    net.look = lambda _: made.table.update([torch.zeros, torch.eye, torch.is_tensor, torch.finfo])
    fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    table = made.table
    assert {torch.zeros, torch.eye, torch.is_tensor, torch.finfo} <= table
    assert len(table) == 4


def test_functions_under_fx_wrap_are_whole_in_this_thread_alone() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            names.extend([vars(sys.modules[__name__])["held_whole"]])
            return self.b(held_whole(self.a(x)))

    names: list[Any] = []
    before = held_whole
    graph = fxprune.analyze(Wrapped(), torch.randn(2, 4)).captured.program.graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [before]
    assert held_whole is before
    assert names[0] is not before
    assert type(names[0](torch.zeros(2))) is Tensor


def held_whole(x: Tensor) -> Tensor:
    return F.relu(x) if x.shape else x


fx.wrap("held_whole")


def test_the_model_keeps_its_tables_while_it_is_traced() -> None:
    """Only what a forward changed is written back: another thread never finds a module without parameters."""
    net = Net().eval()
    net.register_buffer("steps", torch.zeros(()))
    tables = (net._parameters, net._buffers, net._modules, vars(net.a))
    sizes: list[tuple[int, ...]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            sizes.append(tuple(map(len, tables)))

    thread = threading.Thread(target=watch)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert set(sizes) == {tuple(map(len, tables))}


def test_a_network_pickled_meanwhile_is_whole() -> None:
    net, other = Net().eval(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    seen = SimpleNamespace(other=other, pickles=[], errors=[])  # modules that a function holds are copied

    def look(_: nn.Module) -> None:
        errors = in_thread(lambda: seen.pickles.append(pickle.dumps(copy.deepcopy(seen.other))))
        seen.errors.extend(errors)

    net.look = look
    fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    assert not seen.errors
    written = seen.pickles[0]
    assert pickle.loads(written)(torch.zeros(1, 4)).shape == (1, 4)
