"""What is right for the example's sizes is right for others, or is said and refused."""

import copy

import pytest
import torch
from torch import nn

import fxprune
from fxprune.capture import free_sizes
from fxprune.errors import PinnedError


class Mixing(nn.Module):
    """``how(t, n, c, h, w)`` brings ``t: (N, HW, C)`` back to ``(N, C, H, W)``."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.o = how, nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        x = self.a(x).relu()
        return self.o(x + self.how(self.b(x).flatten(2).transpose(1, 2), n, 16, h, w))


DEPEND = {
    "reshape": lambda t, n, c, h, w: t.reshape(n, c, h, w),
    "view": lambda t, n, c, h, w: t.contiguous().view(n, c, h, w),
    "rows": lambda t, n, c, h, w: t.reshape(n, h, c, w).transpose(1, 2),
    "columns": lambda t, n, c, h, w: t.reshape(n, w, h * c).reshape(n, c, h, w),
}


def equal_at(model, sizes, ratio=0.5):
    """Whether the result is the masked original at all of these image sizes."""
    example = torch.randn(2, 3, *sizes[0])
    plan = fxprune.plan(model, example, ratio=ratio)
    masked, pruned = copy.deepcopy(model).double(), plan.apply(model)
    for name, mask in plan.masks(model).items():
        masked.get_parameter(name).data.mul_(mask)
    pruned = pruned.double()
    for size in sizes:
        z = torch.randn(2, 3, *size).double()
        torch.testing.assert_close(pruned(z), masked(z))
    return plan, pruned


@pytest.mark.parametrize("name", DEPEND)
def test_what_meets_elsewhere_at_another_size_stays(name):
    torch.manual_seed(0)
    net = Mixing(DEPEND[name]).eval()
    equal_at(net, [(2, 2), (2, 4), (4, 4), (3, 5)])
    frozen = {str(f.axis): f.reason for f in fxprune.analyze(net, torch.randn(2, 3, 2, 2)).frozen}
    assert frozen["a.weight[0]"]


def test_what_meets_alike_at_any_size_narrows():
    torch.manual_seed(0)
    net = Mixing(lambda t, n, c, h, w: t.transpose(1, 2).reshape(n, -1, h, w)).eval()
    _, pruned = equal_at(net, [(2, 2), (2, 4), (4, 4), (3, 5)])
    assert pruned.a.weight.shape[0] == 8


class One(nn.Module):
    """Does something else with a batch of one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        t = self.a(x).relu()
        return self.b(t * 2 if x.shape[0] == 1 else t)


def test_a_batch_of_one_that_is_another_matter_is_refused():
    net = One().eval()
    plan = fxprune.plan(net, torch.randn(1, 16), ratio=0.5)
    pruned = plan.apply(net)
    assert pruned(torch.randn(1, 16)).shape == (1, 16)
    with pytest.raises(PinnedError, match=r"'x' has size 4 in dimension 0.*Next:"):
        pruned(torch.randn(4, 16))


def test_any_other_batch_of_one_is_free():
    class Plain(One):
        def forward(self, x):
            if len(x.shape) != 2:
                raise ValueError("expected rows")
            return self.b(self.a(x).relu())

    plan = fxprune.plan(Plain().eval(), torch.randn(1, 16), ratio=0.5)
    assert plan.notes == ()


class Cached(nn.Module):
    """Keeps what it made for the size of the last call, as detectors keep their anchors."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.size, self.grid = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 4, 1), None, None

    def forward(self, x):
        y = self.b(self.a(x).relu())
        if self.size != y.shape[2:]:
            self.size = y.shape[2:]
            ranges = [torch.arange(n, dtype=y.dtype, device=y.device) + 0.5 for n in self.size]
            self.grid = torch.stack(torch.meshgrid(*ranges, indexing="ij"))
        return torch.cat([y[:, :2] + self.grid, y[:, 2:]], 1)


@pytest.mark.parametrize("ran", [None, 8, 12])
def test_what_was_kept_for_the_size_of_the_last_call_is_computed(ran):
    net = Cached().eval()
    if ran:
        net(torch.randn(1, 3, ran, ran))
    pruned = fxprune.prune(net, torch.randn(1, 3, 8, 8), ratio=0)
    for size in [(1, 8, 8), (2, 12, 10), (3, 7, 9)]:
        x = torch.randn(size[0], 3, *size[1:])
        torch.testing.assert_close(pruned(x), net(x))


class Scaling(nn.Module):
    """Brings images to 64 x 64."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        if x.shape[2] != 64 or x.shape[3] != 64:
            x = nn.functional.interpolate(x, (64, 64))
        return self.b(self.a(x).relu())


def test_sizes_that_make_a_difference_beside_another_batch_are_not_tried_alone(monkeypatch):
    tried, resized = [], free_sizes.sizes.resized
    with monkeypatch.context() as patch:
        patch.setattr(
            free_sizes.sizes, "resized", lambda tree, how: (tried.append(how), resized(tree, how))[1]
        )
        graph = fxprune.analyze(Scaling().eval(), torch.randn(1, 3, 64, 64))
    assert {axis.name for axis in graph.sizes.pinned} == {"height", "width"}
    assert "does something else" in str(graph.sizes)
    assert {"batch": 1, "image": 32} in tried
    assert {"batch": 1} in tried
    assert {"image": 32} not in tried


def test_what_was_kept_and_is_not_what_would_be_computed_is_pinned():
    net = Cached().eval()
    net(torch.randn(1, 3, 8, 8))
    net.grid += 1  # nobody computes that
    graph = fxprune.analyze(net, torch.randn(1, 3, 8, 8))
    assert {axis.name for axis in graph.sizes.pinned} == {"height", "width"}
    assert "does something else" in str(graph.sizes)
    assert "test_sizes.py" in str(graph.sizes)
    pruned = fxprune.prune(net, torch.randn(1, 3, 8, 8), ratio=0.5)
    pruned(torch.randn(2, 3, 8, 8))
    with pytest.raises(PinnedError, match=r"'x' has size 10 in dimension 2 \(height\).*size 8.*Next:"):
        pruned(torch.randn(1, 3, 10, 8))


class Halving(nn.Module):
    """Halves an image twice and brings it back."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.a(x)
        return self.c(y + nn.functional.interpolate(self.b(y), scale_factor=2.0))


class Windows(nn.Module):
    """Attention in windows of four; pads what is no multiple."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        n, length, c = x.shape
        if length % 4:
            x = nn.functional.pad(x, (0, 0, 0, 4 - length % 4))
        return self.b(self.a(x.reshape(n, -1, 4, c)).relu().mean(2))


class Waves(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 8, 3), nn.Conv1d(8, 2, 1)

    def forward(self, x):
        return self.b(self.a(x[:, None]).relu())


class Frames(nn.Module):
    """Videos with the channels in the middle."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        n, t, c, h, w = x.shape
        return self.b(self.a(x.reshape(n * t, c, h, w)).relu()).view(n, t, 2, h, w).mean(1)


class Patches(nn.Module):
    """Patches of 4 pixels; its code asks for sizes, so that it is traced with those of the example."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(48, 8), nn.Linear(8, 2)

    def forward(self, x):
        n, c, h, w = x.shape
        if h % 4 or w % 4:
            raise ValueError("no whole number of patches")
        x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return self.b(self.a(x).relu().mean((1, 2)))


class Grids(nn.Module):
    """Pads a grid of 8 pixels to multiples of 4: what the code does is the same for a few pixels more."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.a(x).relu()
        if (x.shape[2] % 4, x.shape[3] % 4) != (0, 0):
            x = nn.functional.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return self.b(x)


class Edges(nn.Module):
    """Messages along the edges of a graph, which has fewer nodes than edges."""

    def __init__(self, check):
        super().__init__()
        self.message, self.out, self.check = nn.Linear(8 + 5, 16), nn.Linear(16, 3), check

    def forward(self, nodes, edges, attributes):
        if self.check and attributes.shape[0] != edges.shape[1]:
            raise ValueError("each edge has its attributes")
        source, target = edges[0], edges[1]
        sent = self.message(torch.cat([nodes[source], attributes], -1)).relu()
        return self.out(sent.new_zeros(nodes.shape[0], sent.shape[1]).index_add(0, target, sent))


GRAPH = {
    "nodes": torch.randn(7, 8),
    "edges": torch.randint(0, 7, (2, 11)),
    "attributes": torch.randn(11, 5),
}


class Both(nn.Module):
    """An image of one size, and any text."""

    def __init__(self):
        super().__init__()
        self.image, self.place = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(4, 8))
        self.words, self.out = nn.Embedding(10, 8), nn.Linear(8, 2)

    def forward(self, image, ids, mask=None):
        image = self.image(image).flatten(2).transpose(1, 2) + self.place
        words = self.words(ids)
        if mask is not None:
            words = words * mask[..., None]
        return self.out(torch.cat([image, words], 1))


IDS = torch.randint(0, 10, (2, 5))
SIZES = {
    "any": (Cached(), torch.randn(1, 3, 8, 8), "batch, height, width: any"),
    "square": (Cached(), torch.randn(2, 3, 16, 16), "batch, height, width: any"),
    "halving": (Halving(), torch.randn(1, 3, 32, 32), "batch: any; height, width: multiples of 4"),
    "patches": (Patches(), torch.randn(2, 3, 16, 24), "batch: any; height, width: multiples of 4"),
    "grids": (Grids(), torch.randn(1, 3, 64, 64), "batch, height, width: any; sizes for which the code"),
    "edges": (Edges(check=False), GRAPH, "batch, length: any"),
    "edges, checked": (Edges(check=True), GRAPH, "batch, length: any"),
    "volumes": (nn.Conv3d(3, 2, 3), torch.randn(1, 3, 4, 6, 6), "batch, depth, height, width: any"),
    "videos": (
        Frames(),
        torch.randn(2, 4, 3, 8, 6),
        "batch, length, height, width: any; depth: pinned at 3, because the model does not run at another",
    ),
    "windows": (Windows(), torch.randn(2, 32, 8), "batch: any; length: multiples of 4"),
    "waves": (Waves(), torch.randn(2, 50), "batch, length: any"),
    "channels first": (nn.Conv1d(3, 2, 3), torch.randn(2, 3, 9), "batch, length: any"),
    "words": (nn.Embedding(9, 4), IDS, "batch, length: any"),
    "both": (
        Both(),
        {"image": torch.randn(2, 3, 8, 8), "ids": IDS, "mask": torch.ones(2, 5)},
        "batch, length: any; height, width: pinned at 8, because the model does not run at another",
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_free_sizes_in_words(name):
    model, inputs, said = SIZES[name]
    graph = fxprune.analyze(copy.deepcopy(model).eval(), inputs)
    assert str(graph.sizes).startswith(said), str(graph.sizes)
    line = f"sizes of the inputs: {graph.sizes}"
    assert graph.report().text().replace("\n", " ").count("sizes of the inputs: ") == 1
    assert fxprune.plan(graph, ratio=0.5).notes.count(line) == (not graph.sizes.free)


def test_sizes_for_which_the_code_does_something_else_are_refused_by_name():
    pruned = fxprune.prune(Windows().eval(), torch.randn(2, 32, 8), ratio=0.5)
    assert pruned(torch.randn(3, 64, 8)).shape == (3, 16, 8)
    with pytest.raises(PinnedError, match=r"'x' has size 33 in dimension 1 \(length\).*multiple of 4"):
        pruned(torch.randn(2, 33, 8))


def test_what_is_pinned_comes_first_in_the_notes():
    plan = fxprune.plan(One().eval(), torch.randn(1, 16), ratio=0.5)
    assert plan.notes[0].startswith("sizes of the inputs: batch: pinned at 1, because the model's code does ")
    assert "test_sizes.py" in plan.notes[0]


class Exported(nn.Module):
    def __init__(self, more=lambda y: y):
        super().__init__()
        self.a, self.b, self.more = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), more

    def forward(self, x):
        if x.sum().is_inference():  # only torch.export takes it
            return x
        return self.more(self.b(self.a(x).relu()))


def test_what_torch_export_keeps_is_refused_by_name():
    graph = fxprune.analyze(Exported().eval(), torch.randn(2, 3, 8, 8))
    assert graph.captured.rung == "torch.export"
    assert str(graph.sizes) == "batch, height, width: any"
    pruned = fxprune.prune(graph, ratio=0.5)
    assert pruned(torch.randn(3, 3, 9, 11)).shape == (3, 4, 7, 9)
    places = torch.randn(4, 6, 6)
    net = Exported(lambda y: y + places).eval()
    graph = fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    because = "because torch.export, which captured the model, keeps it"
    assert str(graph.sizes) == f"batch: any; height, width: pinned at 8, {because}"
    with pytest.raises(PinnedError, match=r"'x' has size 9 in dimension 2 \(height\).*torch.export"):
        fxprune.prune(graph, ratio=0.5)(torch.randn(3, 3, 9, 11))


class Expanding(nn.Module):
    """Expands positions where the batch has more than one entry alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(10, 16), nn.Linear(16, 4)

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        if places.shape[0] != ids.shape[0]:
            places = places.expand(ids.shape[0], -1)
        return self.b(self.a(ids) * places.cumsum(-1)[..., None])


@pytest.mark.parametrize("batch", [1, 2])
def test_an_expansion_that_a_batch_of_one_does_not_need(batch):
    net = Expanding().eval()
    pruned = fxprune.prune(net, torch.randint(0, 10, (batch, 6)), ratio=0)
    for size in [(1, 6), (4, 6), (3, 9)]:
        ids = torch.randint(0, 10, size)
        torch.testing.assert_close(pruned(ids), net(ids))


def test_what_torch_export_takes_for_granted_of_sizes_holds():
    net = Exported(lambda y: y * 2 if y.shape[2] % 2 == 0 else y).eval()
    graph = fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    assert "multiples of" in str(graph.sizes)
    with pytest.raises(PinnedError, match=r"'x' has size 9 in dimension 2"):
        fxprune.prune(graph, ratio=0.5)(torch.randn(2, 3, 9, 8))


class Anchors(Cached):
    """As YOLO makes its anchors and strides: for the whole shape, batch included."""

    def forward(self, x):
        y = self.b(self.a(x).relu())
        if self.size != y.shape:
            self.size, (h, w) = y.shape, y.shape[2:]
            lines, columns = (torch.arange(n).type_as(y) + 0.5 for n in (h, w))
            places = torch.stack(torch.meshgrid(lines, columns, indexing="ij"), -1).view(-1, 2)
            self.grid = torch.cat([places, y.new_full((h * w, 1), torch.tensor(2.0))], 1).transpose(0, 1)
        y = y.flatten(2)
        return torch.cat([(y[:, :2] + self.grid[:2]) * self.grid[2:], y[:, 2:]], 1)


@pytest.mark.parametrize("ran", [None, (1, 3, 8, 8), (2, 3, 8, 8)])
def test_what_was_kept_for_the_shape_of_the_last_call_is_computed(ran):
    net = Anchors().eval()
    if ran:
        net(torch.randn(ran))
    graph = fxprune.analyze(net, torch.randn(1, 3, 8, 8))
    assert graph.captured.rung == "symbolic tracing with known shapes"
    assert str(graph.sizes) == "batch, height, width: any"
    pruned = fxprune.prune(graph, ratio=0)
    for size in [(1, 8, 8), (2, 12, 10), (3, 7, 9)]:
        x = torch.randn(size[0], 3, *size[1:])
        torch.testing.assert_close(pruned(x), net(x))


class Ends(nn.Module):
    """Convolutions, a flat layer, and ``end`` of its results."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.o, self.end = nn.Conv2d(3, 16, 1), nn.Linear(16, 12), nn.Linear(12, 4), end

    def forward(self, x):
        y = self.b(self.a(x).relu().mean((2, 3), keepdim=True).squeeze()).relu()
        return self.end(self.o(y))


ENDS = {
    "as it is": lambda y: y,
    "squeezed": lambda y: y.squeeze(0),
    "with what has no batch": lambda y: {"y": y, "mean": y.mean().reshape(1, 1)},
}


@pytest.mark.parametrize("end", ENDS)
def test_a_batch_of_one_that_is_squeezed_away_is_free(end):
    torch.manual_seed(0)
    net, x = Ends(ENDS[end]).eval(), torch.randn(1, 3, 4, 4)
    plan = fxprune.plan(net, x, ratio=0.5)
    assert not plan.notes
    pruned = plan.apply(net)
    verdict = fxprune.verify(net, pruned, plan, x, more_inputs=[torch.randn(n, 3, 5, 4) for n in (1, 2, 5)])
    assert verdict.exact
    assert verdict.inputs == 4


def test_what_couples_otherwise_for_a_batch_of_one_stays():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.table, self.o = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 1)), nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x).squeeze()  # (4,) of a batch of one, else (batch, 4)
            return (
                self.o((y.unsqueeze(-1) * self.table).sum(-1)) if y.dim() == 1 else self.o(y * self.table.T)
            )

    net, x = Table().eval(), torch.randn(1, 8)
    plan = fxprune.plan(net, x, ratio=0.5)
    pruned = plan.apply(net)
    fxprune.verify(net, pruned, plan, x)
    with pytest.raises(PinnedError, match="'x' has size 3 in dimension 0"):
        pruned(torch.randn(3, 8))


class Flat(nn.Module):
    """Where the code has a number for what is flattened, other images become other batches."""

    def __init__(self, *shape):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 16, 1), nn.Linear(16 * 16, 12), nn.Linear(12, 4)
        self.shape = shape

    def forward(self, x):
        return self.o(self.b(self.a(x).reshape(self.shape)).relu())


@pytest.mark.parametrize(
    ("shape", "dim", "bad"),
    [((-1, 256), 2, (2, 3, 8, 4)), ((-1, 256), 2, (2, 3, 8, 8)), ((2, 256), 0, (4, 3, 4, 4))],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_that_numbers_in_the_code_fold_are_refused(shape, dim, bad, batch):
    shape = (batch, *shape[1:]) if shape[0] > 0 else shape
    torch.manual_seed(0)
    net, x = Flat(*shape).eval(), torch.randn(batch, 3, 4, 4)
    plan = fxprune.plan(net, x, ratio=0.5)
    assert "pinned at" in plan.notes[0]
    pruned = plan.apply(net)
    assert fxprune.verify(net, pruned, plan, x).exact
    own = fxprune.plan(net, x, ratio=0.5, into="module")
    assert fxprune.verify(net, own.apply(net), own, x).exact
    with pytest.raises((PinnedError, RuntimeError), match=rf"size {bad[dim]} in dimension {dim}|invalid for"):
        pruned(torch.randn(bad))


def test_directions_of_a_recurrent_layer_are_no_batch():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.o = nn.LSTM(8, 12, bidirectional=True, batch_first=True), nn.Linear(24, 4)

        def forward(self, x):
            y, (h, _) = self.r(x)
            return self.o(y), h

    assert fxprune.analyze(Both().eval(), torch.randn(2, 5, 8)).sizes.free


def test_values_of_inputs_are_said_and_refused_by_name():
    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.heads = nn.Linear(8, 16), nn.ModuleList(nn.Linear(16, 3) for _ in range(3))

        def forward(self, x, task=0, scale=1.0):
            return scale * self.heads[task](self.a(x).relu())

    net, x = Tasks().eval(), torch.randn(2, 8)
    plan = fxprune.plan(net, {"x": x, "task": 1, "scale": 1.0}, ratio=0.5)
    assert [note for note in plan.notes if "analysed with task=1 alone" in note]
    with pytest.raises(PinnedError, match=r"'task' was 1 .* got 2\. Next"):
        plan.apply(net)(x, task=2)
    assert not fxprune.plan(net, x, ratio=0.5).notes


def test_a_type_of_numbers_stands_for_its_dtype():
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            if len(x) > 100:
                raise ValueError
            return self.b(self.a(x).relu()).to(float)

    net, x = Typed().eval(), torch.randn(2, 8)
    graph = fxprune.analyze(net, x)
    assert graph.captured.rung == "symbolic tracing with known shapes"
    assert graph.sizes.free
    torch.testing.assert_close(fxprune.plan(graph, ratio=0.0).apply(net)(x), net(x))


def test_checks_stay_where_a_result_is_traced_again():
    pruned = fxprune.prune(Folding().eval(), torch.randn(2, 3, 4, 4), ratio=0.5)
    again = torch.fx.symbolic_trace(pruned)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(again(x), pruned(x))
    with pytest.raises(PinnedError, match="height"):
        again(torch.randn(2, 3, 8, 8))


class Folding(nn.Module):
    """Numbers in the code make other images into more samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 4)

    def forward(self, x):
        return self.b(self.a(x).relu().view(-1, 8 * 16))


def test_what_was_decided_for_the_example_is_not_decided_anew_for_each_size():
    """Each look at other sizes runs the model twice: to follow the calls, and to say where they part."""
    runs = []

    class Parting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            runs.append(tuple(x.shape) if self.training else None)
            y = self.a(x)
            if self.training and y.sum() > 0:  # the other mode is not captured
                return y
            if y.dtype is torch.float16:  # asks for a type, which decides nothing
                y = y * 1
            return self.b(y.relu() if x.shape[2] == 8 else y.sigmoid())

    net = Parting().eval()
    graph = fxprune.analyze(net, torch.randn(2, 3, 8, 8))
    assert str(graph.sizes).startswith("batch: any; height, width: pinned at 8, because the model's code ")
    assert any("evaluation mode alone" in note for note in graph.captured.notes)
    assert len(runs) <= 14


class Positions(nn.Module):
    """Tokens with a table of 16 positions; ``how(self, length)`` gives those of a sequence."""

    def __init__(self, how):
        super().__init__()
        self.how, self.token, self.a, self.b = (
            how,
            nn.Embedding(20, 16),
            nn.Linear(16, 32),
            nn.Linear(32, 4),
        )
        self.table = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("numbers", torch.arange(16))

    def forward(self, ids):
        x = self.token(ids) + self.how(self, ids.shape[1])
        return self.b(self.a(x).relu())


def asserted(self, length):
    assert length <= 16
    return self.table[torch.arange(length)]


def interpolated(self, length):
    if length <= 16:
        return self.table[:length]
    return nn.functional.interpolate(self.table.T[None], length, mode="linear")[0].T


LONGEST = {
    "slice": lambda self, length: self.table[:length],
    "numbers": lambda self, length: self.table[self.numbers[:length]],
    "assertion": asserted,
    "another way": interpolated,
}


@pytest.mark.parametrize("name", LONGEST)
def test_an_example_of_the_greatest_length_leaves_shorter_ones_free(name):
    torch.manual_seed(0)
    net, ids = Positions(LONGEST[name]).eval(), torch.randint(0, 20, (2, 16))
    assert str(fxprune.analyze(net, ids).sizes).startswith("batch: any; length: up to 16")
    plan = fxprune.plan(net, ids, ratio=0.5)
    assert plan.notes[-1].startswith("sizes of the inputs: batch: any; length: up to 16")
    pruned, masked = plan.apply(net), copy.deepcopy(net)
    for tensor, mask in plan.masks(net).items():
        masked.get_parameter(tensor).data.mul_(mask)
    for shape in [(2, 16), (3, 15), (1, 5), (2, 1)]:
        ids = torch.randint(0, 20, shape)
        torch.testing.assert_close(pruned(ids), masked(ids))
    with pytest.raises((PinnedError, RuntimeError), match="16"):
        pruned(torch.randint(0, 20, (2, 17)))


class PatchTable(nn.Module):
    """PatchTable of ``size``, of which there are at most sixteen."""

    def __init__(self, size):
        super().__init__()
        self.size, self.a, self.b = size, nn.Linear(3 * size * size, 16), nn.Linear(16, 4)
        self.table = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // self.size, self.size, w // self.size, self.size)
        x = self.a(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        return self.b((x + self.table[: x.shape[1]]).relu()).mean(1)


@pytest.mark.parametrize(("size", "smaller"), [(8, (16, 24)), (4, (12, 16)), (32, (96, 32))])
def test_images_may_be_smaller_where_no_larger_one_is_taken(size, smaller):
    torch.manual_seed(0)
    example = torch.randn(1, 3, 4 * size, 4 * size)
    pruned = fxprune.prune(PatchTable(size).eval(), example)
    said = f"sizes of the inputs: batch: any; height, width: multiples of {size} up to {4 * size}"
    assert said in pruned.meta["fxprune"].notes
    assert pruned(torch.randn(3, 3, *smaller)).shape == (3, 4)


def test_a_larger_image_is_refused_where_the_code_asks_for_its_size():
    class Asking(PatchTable):
        def forward(self, x):
            return super().forward(x if x.shape[2] <= 32 else x[:, :, :32])

    pruned = fxprune.prune(Asking(8).eval(), torch.randn(1, 3, 32, 32))
    assert pruned(torch.randn(3, 3, 16, 24)).shape == (3, 4)
    with pytest.raises(
        PinnedError, match=r"size 40 in dimension 2 .*for size 32 or less by a multiple of 8: "
    ):
        pruned(torch.randn(1, 3, 40, 32))


@pytest.mark.parametrize(("size", "side"), [(8, 32), (16, 64), (4, 48)])
def test_the_size_that_a_network_was_built_for_is_not_the_largest(size, side):
    class Built(PatchTable):
        def forward(self, x):
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5)
            x = self.a(x.flatten(3).flatten(1, 2))
            own = self.table[0] if (h, w) == (2 * side, 2 * side) else self.table[1]
            return self.b((x + own).relu()).mean(1)

    torch.manual_seed(0)
    pruned = fxprune.prune(Built(size).eval(), torch.randn(1, 3, side, side))
    said = f"height, width: multiples of {size}"
    assert any(said in note and "up to" not in note for note in pruned.meta["fxprune"].notes)
    for other in (side - size, side + size, 3 * side):
        assert pruned(torch.randn(2, 3, other, side)).shape == (2, 4)
    with pytest.raises(PinnedError, match=r"asks for a number that depends on the sizes"):
        pruned(torch.randn(1, 3, 2 * side, 2 * side))


def test_a_longest_text_and_an_image_are_free_at_once():
    class Both(Positions):
        def __init__(self):
            super().__init__(asserted)
            self.image = nn.Conv2d(3, 16, 3)

        def forward(self, ids, image):
            x = self.token(ids) + self.how(self, ids.shape[1]) + self.image(image).mean((2, 3))[:, None]
            return self.b(self.a(x).relu())

    given = torch.randint(0, 20, (2, 16)), torch.randn(2, 3, 8, 8)
    sizes = fxprune.analyze(Both().eval(), given).sizes
    assert str(sizes).startswith("batch, height, width: any; length: up to 16")
    assert not sizes.pinned
    assert not sizes.free


@pytest.mark.parametrize("side", [3, 6, 8, 40])
def test_sizes_are_never_tried_below_one(side):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x):
            assert side % x.shape[2] == 0
            return self.b(self.a(x).relu())

    graph = fxprune.analyze(Fixed().eval(), torch.randn(2, 3, side, side))
    step = {3: 2, 6: 3, 8: 4, 40: 32}[side]
    assert {(axis.step, axis.at_most) for axis in graph.sizes.axes if axis.dim > 1} == {(step, True)}


class Tiles(nn.Module):
    """Attention-like sums over windows of ``size``."""

    def __init__(self, size):
        super().__init__()
        self.size, self.a, self.b = size, nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.a(x).relu()
        n, c, h, w = x.shape
        tiles = x.reshape(n, c, h // self.size, self.size, w // self.size, self.size)
        return self.b(x + tiles.mean((2, 4)).tile(h // self.size, w // self.size))


@pytest.mark.parametrize("size", [96, 160, 224])
def test_windows_that_are_no_divisor_of_32_leave_multiples_of_the_image_free(size):
    pruned = fxprune.prune(Tiles(size).eval(), torch.randn(1, 3, size, size))
    assert (
        f"sizes of the inputs: batch: any; height, width: multiples of {size}" in pruned.meta["fxprune"].notes
    )
    pruned(torch.randn(2, 3, size, 2 * size))


@pytest.mark.parametrize("size", [64, 96])
def test_chunks_leave_multiples_of_the_length_free(size):
    class Chunks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            n, length, _ = x.shape
            x = self.a(x).relu()
            return self.b(x.view(n, length // size, size, -1).mean(2))

    sizes = fxprune.analyze(Chunks().eval(), torch.randn(1, 2 * size, 8)).sizes
    assert str(sizes) == f"batch: any; length: multiples of {2 * size}"


def rows_of_length(t, shape):
    return t.reshape(shape)


def columns_of_length(t, shape):
    return t.flatten().view(shape)


def by_pairs(t, shape):
    return t.reshape(shape[0], shape[2], 2, -1).reshape(shape)


@pytest.mark.parametrize("how", [rows_of_length, columns_of_length, by_pairs])
@pytest.mark.parametrize("length", [32, 64])
def test_a_reshape_that_does_nothing_at_one_length_mixes_channels_at_another(how, length):
    """As long as there are channels, channels and positions change places without a reshape."""

    class Waving(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = nn.Conv1d(3, 64, 1), nn.Conv1d(64, 64, 1), nn.Conv1d(64, 2, 1)

        def forward(self, x):
            assert x.shape[2] % 32 == 0
            x = self.a(x).relu()
            return self.o(x + how(self.b(x).transpose(1, 2), x.shape))

    torch.manual_seed(0)
    net = Waving().eval()
    plan = fxprune.plan(net, torch.randn(2, 3, length), ratio=0.5)
    assert "length: multiples of 32" in plan.notes[-1]
    masked, pruned = copy.deepcopy(net).double(), plan.apply(net).double()
    for name, mask in plan.masks(net).items():
        masked.get_parameter(name).data.mul_(mask)
    for other in (32, 64, 96):
        x = torch.randn(3, 3, other).double()
        torch.testing.assert_close(pruned(x), masked(x))


class Wave(nn.Module):
    """``how(self, x)`` of waveforms or of channels-first sequences."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv1d(1, 16, 4, 4), nn.Conv1d(16, 8, 1)

    def forward(self, x):
        return self.how(self, x)

    def layers(self, x):
        return self.b(self.a(x if x.dim() == 3 else x[:, None]).relu())


def padded(self, x):
    rest = x.shape[-1] % 4
    return self.layers(nn.functional.pad(x, (0, 4 - rest)) if rest else x)


def louder(self, x):
    return self.layers(x) * (2 if x.shape[-1] > 405 else 1)


def by_count(self, x):
    count = int(x.shape[-1] / 4)
    return self.layers(x) / (count if count < 101 else 7)


@pytest.mark.parametrize("shape", [(2, 1, 400), (2, 400), (1, 1, 396)])
@pytest.mark.parametrize("how", [padded, louder, by_count])
def test_a_last_dimension_at_which_the_code_does_something_else_is_pinned(how, shape):
    torch.manual_seed(0)
    net = Wave(how).eval()
    pruned = fxprune.prune(net, torch.randn(shape), ratio=0.0)
    for length in (shape[-1], 36, 401, 404, 405, 432, 464, 2 * shape[-1]):
        x = torch.randn(*shape[:-1], length)
        try:
            found = pruned(x)
        except PinnedError as error:
            assert "length" in str(error)  # noqa: PT017
            continue
        torch.testing.assert_close(found, net(x))
    assert "length: pinned at" in str(fxprune.analyze(net, torch.randn(shape)).sizes)


def test_features_are_no_length():
    net = nn.Sequential(nn.Linear(400, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    assert str(fxprune.analyze(net, torch.randn(2, 400)).sizes) == "batch: any"


class Padded(nn.Module):
    """Pads to windows of 8, as Swin does, and shifts where one does not cover the image."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = nn.functional.avg_pool2d(self.a(x), 16)
        x = nn.functional.pad(x, (0, 0, 0, (8 - x.shape[2] % 8) % 8))
        if x.shape[2] > 8:
            x = x.roll(2, 2) * 2
        return self.b(x)


@pytest.mark.parametrize(("size", "right", "wrong"), [(64, 100, 160), (256, 300, 100)])
def test_decisions_about_numbers_that_are_the_same_at_the_sizes_tried(size, right, wrong):
    """At 64 and about 100, and at 256 and about 290, the padded image is equally high."""
    net = Padded().eval()
    pruned = fxprune.prune(net, torch.randn(2, 3, size, size), ratio=0)
    x = torch.randn(3, 3, size, size)
    torch.testing.assert_close(pruned(x), net(x))
    for height in (right, wrong):
        x = torch.randn(2, 3, height, 64)
        try:
            found = pruned(x)
        except PinnedError:
            assert height == wrong or size == 256
        else:
            assert height == right
            torch.testing.assert_close(found, net(x))


class Table(nn.Module):
    """Keeps a table for the length of its last input in a buffer, which has another shape at first."""

    def __init__(self, make):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.make = make
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x):
        n = x.shape[1]
        if self.table.shape[0] != n:
            self.table = self.make(self.table, n)
        return self.b(self.a(x).relu() * self.table)


def _ramp(table, n):
    return torch.arange(n, dtype=torch.float32)[:, None] / n


def _grown(table, n):
    return torch.cat([table, torch.ones(n - len(table), 1)])


def _random(table, n):
    return torch.rand(n, 1)


@pytest.mark.parametrize("ran", [False, True])
def test_a_table_for_the_sizes_of_each_input_is_made_anew(ran):
    net = Table(_ramp).eval()
    x = torch.randn(2, 6, 8)
    if ran:
        net(x)
    graph = fxprune.analyze(net, x)
    assert graph.captured.rung == "symbolic tracing with known shapes"
    result = fxprune.prune(graph, ratio=0.0)
    for n in (6, 9, 4, 9):
        x = torch.randn(3, n, 8)
        torch.testing.assert_close(result(x), net(x))


@pytest.mark.parametrize("make", [_grown, _random])
def test_a_table_that_its_sizes_do_not_make_is_not_taken_for_one_that_they_make(make):
    with pytest.raises(fxprune.errors.CaptureError, match="must not change its shape"):
        fxprune.analyze(Table(make).eval(), torch.randn(2, 6, 8))


class Listening(nn.Module):
    """Words that attend to speech: ``how(self, speech)`` gives the speech as ``(N, frames, C)``."""

    def __init__(self, how):
        super().__init__()
        self.how, self.words, self.mix = how, nn.Embedding(11, 16), nn.Linear(16, 16)
        self.up, self.conv, self.wave = nn.Linear(6, 16), nn.Conv1d(6, 16, 3, 2, 1), nn.Conv1d(1, 16, 4, 4)
        self.places = nn.Parameter(torch.randn(20, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, speech, words):
        speech = self.how(self, speech).relu()
        words = self.mix(self.words(words))
        seen = (words @ speech.transpose(1, 2)).softmax(-1) @ speech
        return self.head((words + seen).relu())


def by_frame(self, speech):
    return self.up(speech)


def with_channels_first(self, speech):
    return self.conv(speech).transpose(1, 2)


def of_fixed_length(self, speech):
    return with_channels_first(self, speech) + self.places


def of_a_wave(self, speech):
    return self.wave(speech.unsqueeze(1)).transpose(1, 2)


LISTENING = {
    by_frame: ((9, 6), (4, 6), "batch, frames, length: any"),
    with_channels_first: ((6, 40), (6, 33), "batch, length: any"),
    of_fixed_length: ((6, 40), (6, 40), "frames: pinned at 6"),
    of_a_wave: ((40,), (57,), "batch, length: any"),
}


@pytest.mark.parametrize("how", LISTENING)
def test_words_and_the_speech_beside_them_have_lengths_of_their_own(how):
    torch.manual_seed(0)
    net = Listening(how).eval()
    shape, other, said = LISTENING[how]
    x = torch.randn(2, *shape), torch.randint(0, 11, (2, 5))
    plan = fxprune.plan(net, x, ratio=0.5)
    assert "removes 16 of 32 units" in repr(plan)
    sizes = fxprune.analyze(net, x).sizes
    assert said in str(sizes)
    masked, pruned = copy.deepcopy(net).double(), plan.apply(net).double()
    for name, mask in plan.masks(net).items():
        masked.get_parameter(name).data.mul_(mask)
    for words in (5, 1, 8):
        z = torch.randn(3, *other).double(), torch.randint(0, 11, (3, words))
        torch.testing.assert_close(pruned(*z), masked(*z))
