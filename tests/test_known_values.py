"""What depends on inputs and constants alone has values while a model is traced on shapes."""

import pytest
import torch
from torch import arange, finfo, full, is_tensor, nn, zeros
from torch.nn import functional as F

import fxprune
from fxprune.errors import CaptureError, PinnedError, PlanError

KNOWN = "symbolic tracing with known shapes"


class Middle(nn.Module):
    """``b(how(self, a(x), *others))`` with ``a: 16 -> 32``."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, *others):
        if len(x.shape) > 3:
            raise ValueError("expected a sequence")
        return self.b(self.how(self, self.a(x), *others))


def by_length(s, t, lengths):
    n = int(lengths.max())
    return t[:, :n].masked_fill((torch.arange(n).expand(len(lengths), n) >= lengths[:, None])[..., None], 0.0)


def by_item(s, t, lengths):
    return t[:, : lengths.max().item()]


def by_list(s, t, lengths):
    longest = max(lengths.tolist())
    return t * longest


def without_nan(s, t, mask):
    return t if not torch.isnan(mask).any() else t * 2


LENGTHS = torch.tensor([8, 5])


@pytest.mark.parametrize("how", [by_length, by_item], ids=lambda how: how.__name__)
def test_lengths_stay_free(how):
    net, x = Middle(how).eval(), (torch.randn(2, 8, 16), LENGTHS)
    graph = fxprune.analyze(net, x)
    assert graph.captured.rung == KNOWN
    plan = fxprune.plan(net, x, ratio=0.5)
    pruned = plan.apply(net)
    assert pruned.a.weight.shape == (16, 16)
    assert fxprune.verify(net, pruned, plan, x)
    same = fxprune.prune(net, x, ratio=0.0)
    for lengths in ([4, 6, 1], [8]):
        other = torch.randn(len(lengths), 8, 16), torch.tensor(lengths)
        torch.testing.assert_close(same(*other), net(*other))


@pytest.mark.parametrize(
    ("how", "other", "differs"),
    [(by_list, LENGTHS, torch.tensor([3, 4])), (without_nan, torch.zeros(2), torch.tensor([0.0, torch.nan]))],
    ids=["a choice between numbers", "a question to a mask"],
)
def test_what_is_pinned_is_said_and_checked(how, other, differs):
    net, x = Middle(how).eval(), torch.randn(2, 8, 16)
    plan = fxprune.plan(net, (x, other), ratio=0.5)
    assert any("depends on values of the inputs" in note and __file__ in note for note in plan.notes)
    pruned = plan.apply(net)
    assert pruned.a.weight.shape == (16, 16)
    assert pruned(x, other).shape == (2, 8, 16)
    with pytest.raises(PinnedError, match=r"was .* for the example inputs.*Next:"):
        pruned(x, differs)


def test_a_plan_remembers_values_that_it_was_made_with(tmp_path):
    net, x = Middle(by_length).eval(), (torch.randn(2, 8, 16), LENGTHS)
    plan = fxprune.plan(net, x, ratio=0.5)
    plan.save(tmp_path / "plan.json")
    again = fxprune.PruningPlan.load(tmp_path / "plan.json")
    pruned = again.apply(Middle(by_length).eval())
    assert pruned(*x).shape == (2, 8, 16)


def test_values_of_weights_are_not_known():
    net = Middle(lambda s, t: t * int(t.argmax())).eval()
    with pytest.raises(CaptureError):
        fxprune.analyze(net, torch.randn(2, 8, 16))


def test_writes_are_followed():
    def how(s, t, lengths):
        twice = lengths.clone()
        twice[0] = 3
        twice.view(-1)[1:].add_(1)
        return t[:, : int(twice.max())]

    net, x = Middle(how).eval(), (torch.randn(2, 8, 16), LENGTHS)
    graph = fxprune.analyze(net, x)
    (number,) = (n.meta["number"] for n in graph.captured.program.graph.nodes if "number" in n.meta)
    assert number == 6


SIZES = {
    "a tensor as a shape": lambda s, t: t.reshape(torch.tensor(t.shape).tolist()),
    "a product": lambda s, t: t / torch.tensor([t.shape[0], t.shape[1]]).prod(),
    "a root": lambda s, t: t * torch.tensor(t.shape[1]).float().sqrt().item(),
    "a difference": lambda s, t: F.pad(t, [0, 0, 0, int(torch.tensor(t.shape)[1] - t.shape[1])]),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_as_tensors(name):
    net = Middle(SIZES[name]).eval()
    x = torch.randn(2, 8, 16)
    assert fxprune.prune(net, x, ratio=0.5).a.weight.shape[1] == 16
    same = fxprune.prune(net, x, ratio=0.0)
    for size in ((3, 5), (1, 8)):
        z = torch.randn(*size, 16)
        torch.testing.assert_close(same(z), net(z))


class Lin(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i) / 4)

    def forward(self, x):
        return F.linear(x, self.weight)


def loops_removed(e, n):
    e = e[:, e[0] != e[1]]
    return torch.cat([e, torch.arange(n).repeat(2, 1)], 1)


def places(e, n):
    return e[:, (e[0] != e[1]).nonzero()[:, 0]]


def selected(e, n):
    keep = e[0] < e[1]
    return torch.stack([e[0].masked_select(keep), e[1].masked_select(keep)])


class Graph(nn.Module):
    def __init__(self, edges):
        super().__init__()
        self.edges, self.l1, self.l2, self.l3 = edges, Lin(16, 32), Lin(32, 32), Lin(32, 8)

    def conv(self, lin, x, e):
        if x.dim() != 2 or e.size(0) != 2 or int(x.size(0)) < 1:
            raise ValueError("expected nodes and edges")
        e, h = self.edges(e, x.shape[0]), lin(x)
        return torch.zeros_like(h).index_add(0, e[1], h[e[0]])

    def forward(self, x, e):
        x = self.conv(self.l2, self.conv(self.l1, x, e).relu(), e).relu()
        return self.conv(self.l3, x, e)


@pytest.mark.parametrize("edges", [loops_removed, places, selected], ids=lambda edges: edges.__name__)
def test_graph_convolutions_narrow(edges):
    torch.manual_seed(0)
    net, x = Graph(edges).eval(), (torch.randn(10, 16), torch.randint(0, 10, (2, 40)))
    assert fxprune.analyze(net, x).captured.rung == KNOWN
    plan = fxprune.plan(net, x, ratio=0.5)
    pruned = plan.apply(net)
    assert pruned.l2.weight.shape == (16, 16)
    assert fxprune.verify(net, pruned, plan, x)
    same = fxprune.prune(net, x, ratio=0.0)
    other = torch.randn(7, 16), torch.randint(0, 7, (2, 9))
    torch.testing.assert_close(same(*other), net(*other))


class Experts(nn.Module):
    """A loop over the experts that have tokens; ``places(mask)`` gives tokens and ranks."""

    def __init__(self, places):
        super().__init__()
        self.places, self.router = places, nn.Linear(16, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(4)
        )

    def forward(self, x):
        b, n, d = x.shape
        x = x.reshape(-1, d)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, ranks = self.places(chosen == number)
            if tokens.shape[0] == 0:
                continue
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, ranks, None])
        return out.reshape(b, n, d)


@pytest.mark.parametrize(
    "places",
    [torch.where, lambda mask: mask.nonzero(as_tuple=True), lambda mask: mask.nonzero().unbind(1)],
    ids=["where", "nonzero", "unbind"],
)
def test_loops_over_experts_narrow(places):
    torch.manual_seed(0)
    net, x = Experts(places).eval(), torch.randn(2, 6, 16)
    plan = fxprune.plan(net, x, ratio=0.5)
    pruned = plan.apply(net)
    assert pruned.experts.get_submodule("0.0").weight.shape == (16, 16)
    assert any("selects nothing" in note for note in plan.notes)
    assert fxprune.verify(net, pruned, plan, x)
    same = fxprune.prune(net, x, ratio=0.0)
    for size in ((1, 1), (3, 5)):  # of four experts two have no token
        z = torch.randn(*size, 16)
        torch.testing.assert_close(same(z), net(z))


def test_other_questions_to_what_a_mask_selects_are_refused():
    net = Middle(lambda s, t: t * 2 if len(t[t > 0]) > 7 else t).eval()
    with pytest.raises(CaptureError, match="how many entries a mask selects"):
        fxprune.analyze(net, torch.randn(2, 8, 16))


class Parts(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, sizes):
        return self.b(self.how(self.a(x), sizes))


LISTS = {
    "split": lambda t, sizes: torch.cat([part.relu() for part in t.split(sizes)]),
    "one by one": lambda t, sizes: torch.cat([part * i for i, part in enumerate(t.split(sizes, dim=0))]),
    "a number": lambda t, sizes: t[: sizes[0]],
}


def sizes_in_a_buffer(s, t):
    """As converters from other formats write it: what a reshape is told is a tensor."""
    shape = s.sizes
    if torch.any(shape == 0):
        shape = [t.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return torch.reshape(t, torch.Size(shape)).flatten(2)


def bounds_in_buffers(s, t):
    """A slice whose axes are an array of NumPy, and whose bounds are tensors."""
    slices = {}
    for axis, start, end in zip(s.axes.detach().cpu().numpy(), s.starts, s.ends, strict=True):
        slices[axis] = slice(start, end)
    return t[tuple(slices.get(axis, slice(None)) for axis in range(max(slices) + 1))]


def sizes_joined(s, t):
    """Sizes read off a tensor, and one of a buffer, become one tensor."""
    front = torch.tensor(t.shape)[:2]
    return torch.reshape(t, torch.Size(torch.cat([front, s.rest]))).flatten(2)


def a_window_of_a_computed_size(s, t):
    half = torch.tensor(t.shape[1]) // 2
    return t.narrow(1, 0, half)


def places_as_an_array(s, t):
    return t[:, torch.arange(t.shape[1])[::2].numpy().tolist()]


def beside_a_constant(s, t):
    return t / torch.maximum(torch.tensor(t.shape[1]), s.steps).sum()


def a_table_by_rank(s, t):
    return {3: torch.relu, 4: torch.tanh}[t.dim()](t)


@pytest.mark.parametrize(
    "how",
    [
        a_table_by_rank,
        beside_a_constant,
        sizes_in_a_buffer,
        bounds_in_buffers,
        sizes_joined,
        a_window_of_a_computed_size,
        places_as_an_array,
    ],
    ids=lambda how: how.__name__,
)
def test_tensors_that_stand_for_numbers(how):
    """A bound or size that is a tensor of one number, and a rank that is a key."""
    net, x = Middle(how).eval(), torch.randn(2, 8, 16)
    net.steps = torch.arange(4)  # no buffer
    buffers = {"sizes": (0, 0, 4, -1), "rest": (4, 8), "axes": (1,), "starts": (2,), "ends": (6,)}
    for name, numbers in buffers.items():
        net.register_buffer(name, torch.tensor(numbers))
    graph = fxprune.analyze(net, x)
    assert graph.captured.rung == KNOWN
    same = fxprune.prune(net, x, ratio=0.0)
    for shape in ((2, 8, 16), (3, 8, 16), (2, 12, 16)):
        other = torch.randn(shape)
        torch.testing.assert_close(same(other), net(other))
    plan = fxprune.plan(net, x, ratio=0.5)
    pruned = plan.apply(net)
    assert fxprune.verify(net, pruned, plan, x)
    assert pruned.a.weight.shape == (16, 16)


class Measured(nn.Module):
    """Reads the size of what is narrowed off a tensor, in front of a norm that is not exact."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x):
        t = self.a(x)
        sizes = torch.tensor(t.shape)
        if sizes.dim() != 1:
            raise ValueError("a shape has one dimension")
        return self.b(self.norm(t.reshape(sizes.tolist())))


def test_sizes_that_are_narrowed_are_no_difference():
    net, x = Measured().eval(), torch.randn(2, 8, 16)
    plan = fxprune.plan(net, x, ratio=0.5)
    pruned = plan.apply(net)
    assert pruned.a.weight.shape == (16, 16)
    assert fxprune.verify(net, pruned, plan, x).skipped
    with torch.no_grad():
        pruned.b.weight += 0.1
    with pytest.raises(fxprune.errors.VerificationError):
        fxprune.verify(net, pruned, plan, x)


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_numbers_stay_free(name):
    net, x = Parts(LISTS[name]).eval(), torch.randn(24, 16)
    pruned = fxprune.prune(net, (x, [2, 5, 7, 10]), ratio=0.5)
    assert pruned.a.weight.shape == (16, 16)
    same = fxprune.prune(net, (x, [2, 5, 7, 10]), ratio=0.0)
    torch.testing.assert_close(same(x, [7, 5, 6, 6]), net(x, [7, 5, 6, 6]))


def test_the_length_of_a_list_is_checked_where_it_matters():
    net, x = Parts(lambda t, sizes: t * len(sizes)).eval(), torch.randn(24, 16)
    pruned = fxprune.prune(net, (x, [2, 22]), ratio=0.5)
    with pytest.raises(PinnedError, match="sizes"):
        pruned(x, [2, 2, 20])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_products(dtype):
    def how(s, t, offsets):
        rows = t.reshape(-1, 32)
        return (F.grouped_mm(rows, s.up, offs=offsets).relu() @ s.back).reshape(t.shape)

    net = Middle(how).eval()
    net.up = nn.Parameter(torch.randn(4, 32, 64) / 8)
    net.back = nn.Parameter(torch.randn(64, 32) / 8)
    net, x = net.to(dtype), torch.randn(2, 8, 16, dtype=dtype)
    offsets = torch.tensor([4, 8, 12, 16], dtype=torch.int32)
    pruned = fxprune.prune(net, (x, offsets), ratio=0.5)
    assert pruned.up.shape == (4, 16, 32)
    assert fxprune.analyze(net, (x, offsets)).captured.rung == KNOWN


@pytest.mark.parametrize("ratio", [0.3, 0.45])
@pytest.mark.parametrize("round_to", [None, 6])
def test_widths_of_grouped_products_are_such_as_their_kernels_take(ratio, round_to):
    """Rows begin at multiples of 16 bytes, in half precision, too."""

    def how(s, t, offsets):
        return (F.grouped_mm(t.reshape(-1, 32), s.up, offs=offsets).relu() @ s.back).reshape(t.shape)

    net = Middle(how).eval()
    net.up, net.back = (nn.Parameter(torch.randn(*shape) / 8) for shape in ((4, 32, 96), (96, 32)))
    x, offsets = torch.randn(2, 8, 16), torch.tensor([4, 8, 12, 16], dtype=torch.int32)
    pruned = fxprune.prune(net, (x, offsets), ratio=ratio, round_to=round_to)
    assert pruned.up.shape[1] % 8 == pruned.up.shape[2] % 8 == 0
    assert pruned.up.shape[2] < 96
    if round_to:
        assert pruned.up.shape[2] % 24 == 0
    for dtype in (torch.float32, torch.bfloat16):
        assert pruned.to(dtype)(x.to(dtype), offsets).isfinite().all()


def test_an_edited_plan_with_other_widths_is_refused():
    def how(s, t, offsets):
        return (F.grouped_mm(t.reshape(-1, 32), s.up, offs=offsets).relu() @ s.back).reshape(t.shape)

    net = Middle(how).eval()
    net.up, net.back = (nn.Parameter(torch.randn(*shape) / 8) for shape in ((4, 32, 96), (96, 32)))
    inputs = torch.randn(2, 8, 16), torch.tensor([4, 8, 12, 16], dtype=torch.int32)
    plan = fxprune.plan(net, inputs, ratio=0.3)
    name = next(name for name, size in plan.sizes.items() if size == 96)
    units = plan.removed[name]
    edited = plan.with_removed({**plan.removed, name: units[:-1]})
    wrong = f"{96 - len(units) + 1} would be left"
    assert wrong in str(edited.check(net)[0])
    with pytest.raises(PlanError, match=wrong):
        edited.apply(net)
    edited.with_removed(plan.removed).apply(net)


def test_functions_of_torch_may_have_been_imported_by_name():
    def shifted(s, t):
        if not is_tensor(t):
            return t
        places = arange(t.shape[1], dtype=t.dtype)[:, None] / full((t.shape[1], 1), 2.0, dtype=t.dtype)
        first = zeros(len(t), t.shape[1], 1, dtype=t.dtype)
        first[:, 0] = finfo(t.dtype).eps
        return t + places + first

    before = arange, is_tensor.__code__
    net, x = Middle(shifted).eval(), torch.randn(2, 8, 16)
    plan = fxprune.plan(net, x, ratio=0.5)
    assert (arange, is_tensor.__code__) == before
    assert fxprune.analyze(net, x).captured.rung == KNOWN
    assert fxprune.analyze(net, x).sizes.free
    assert fxprune.verify(net, plan.apply(net), plan, x).exact
