"""What a model's code decides by sizes holds for all sizes: the result is the model, or it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fxprune
from fxprune import exporting
from fxprune.errors import PinnedError
from fxprune.exporting import capture_program


class Deciding(nn.Module):
    """Two layers, and between them code that looks at the sizes."""

    def __init__(self, decide):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.decide = decide

    def forward(self, x):
        return self.b(self.decide(x, self.a(x).relu()))


def _threshold(x, h):
    return h * 2 if x.shape[1] > 100 else h


def _shorter_of_two(x, h):
    return h[:, : min(x.shape[1], 64)]


def _blocks(x, h):
    for _ in range(math.ceil(x.shape[1] / 100)):
        h = h + h.sin()
    return h


def _whole_blocks(x, h):
    for _ in range(x.shape[1] // 100):  # none for the example, nor for a few more
        h = h + h.sin()
    return h


def _batch_of_one(x, h):
    return h - 1 if x.shape[0] == 1 else h


def _sevens(x, h):
    return h - 1 if len(x) % 7 == 0 else h


def _truth_of_a_size(x, h):
    return h - 1 if x.shape[1] // 100 else h


def _shape_in_part(x, h):
    return h if h.size() != (2, 250, 16) else h * 2


def _end_of_a_shape(x, h):
    return h * 2 if h.shape[1:] == (250, 16) else h


def _one_of_shapes(x, h):
    return h * 2 if tuple(h.shape[1:]) in ((250, 16), (50, 16)) else h


def _number_of_entries(x, h):
    return h * 2 if h.numel() > 2 * 100 * 16 else h


def _number_of_entries_by_row(x, h):
    return h * 2 if torch.numel(h) // len(h) >= 100 * 16 else h


def _width_and_length_in_one(x, h):
    return h * 2 if h.flatten(1).shape[1] > 100 * 16 else h


def _width_among_all_sizes(x, h):
    return h * 2 if h.reshape(len(h) * 16, -1).size() == (2 * 16, 250) else h


def _shape_of_torch(x, h):
    return h * 2 if h.size() == torch.Size([2, 250, 16]) else h


def _rows_and_width(x, h):
    return h - 1 if h.shape[1] * h.shape[2] > 1000 else h


def _picks(x, h):
    return (h.sin, h.cos, h.tan)[min(x.shape[1] // 40, 2)]()


def _shape_as_a_whole(x, h):
    return h - 1 if tuple(x.shape[:2]) == (2, 150) else h


@torch.fx.wrap
def window(size, most):
    """A function that stays whole, and returns numbers in lists."""
    return [min(size, most), size], [0 if size <= most else most // 2]


def _list_of_a_function(x, h):
    (inside, whole), _ = window(x.shape[1], 100)
    return h.roll(1, 1) if whole - inside > 0 else h


def _part_of_a_function_on_shapes(x, h):
    _, (shift,) = window(x.shape[1], 100)
    return h.roll(shift, 1) if shift else h


def _in_one_mode(x, h):
    return torch.where(h > 1, h, 0) if x.shape[1] > 100 else h


DECIDE = [_threshold, _shorter_of_two, _blocks, _whole_blocks, _batch_of_one, _sevens,
          _truth_of_a_size, _number_of_entries, _number_of_entries_by_row, _shape_in_part,
          _width_and_length_in_one, _width_among_all_sizes, _shape_of_torch,
          _end_of_a_shape, _one_of_shapes, _rows_and_width, _picks, _shape_as_a_whole,
          _list_of_a_function, _part_of_a_function_on_shapes, _in_one_mode]  # fmt: skip
SIZES = [(2, 12), (1, 12), (7, 12), (3, 30), (2, 50), (2, 150), (2, 250)]


@pytest.mark.parametrize("decide", DECIDE)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_result_is_the_model_or_refuses(decide, ratio):
    torch.manual_seed(0)
    model = Deciding(decide).eval()
    x = torch.randn(2, 12, 8)
    plan = fxprune.plan(model, x, ratio=ratio)
    result = plan.apply(model)
    with torch.no_grad():
        for gone in plan.removed.values():
            model.b.weight[:, list(gone)] = 0
    said = []
    for size in SIZES:
        x = torch.randn(*size, 8)
        try:
            out = result(x)
        except PinnedError as error:
            said.append(str(error))
        else:
            torch.testing.assert_close(out, model(x))
    assert 0 < len(said) < len(SIZES)
    assert all(f"in {decide.__name__}" in error for error in said)


def test_it_is_said_which_line_decides():
    graph = fxprune.analyze(Deciding(_threshold).eval(), torch.randn(2, 12, 8))
    assert "batch, length: any; sizes for which the code decides otherwise" in str(graph.sizes)
    assert "in _threshold" in str(graph.sizes)


def _checked(x, h):
    if h.size() != (x.shape[0], x.shape[1], 16):
        raise ValueError("not the width of the layer")
    return h


def _same_lengths(x, h):
    return h if h.shape[1] - x.shape[1] == 0 and h.shape[1] == x.shape[1] else h[:, :1]


def _same_shapes(x, h):
    if h.sin().shape != h.shape or not h.size() == h.cos().size():
        raise ValueError("not of one shape")
    return h


def _fixed_width(x, h):
    return h if h.shape[-1] * 4 == 64 and h.dim() == 3 else h * 2


def _makes_no_difference(x, h):
    if x.shape[0] % 2:
        return h.sin()
    return h.sin()


@pytest.mark.parametrize(
    "decide", [_checked, _same_lengths, _same_shapes, _fixed_width, _makes_no_difference]
)
def test_what_cannot_come_out_otherwise_is_not_asked_again(decide):
    torch.manual_seed(0)
    model = Deciding(decide).eval()
    result = fxprune.prune(model, torch.randn(2, 12, 8), ratio=0.5)
    assert "decide" not in str(fxprune.analyze(model, torch.randn(2, 12, 8)).sizes)
    for size in SIZES:
        assert result(torch.randn(*size, 8)).shape == (*size, 4)


class Padded(nn.Module):
    """Means over windows, to which images are padded that do not fit."""

    def __init__(self, window):
        super().__init__()
        self.window, self.a, self.b = window, nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        window, (h, w) = self.window, x.shape[-2:]
        below, right = (window - h % window) % window, (window - x.size(-1) % window) % window
        if below or right:
            x = nn.functional.pad(x, (0, right, 0, below))
        x = self.a(x).relu().unflatten(-1, (-1, window)).mean(-1)
        return self.b(x.unflatten(-2, (-1, window)).mean(-2))[..., :h, :w]


@pytest.mark.parametrize(("window", "side", "said"), [(8, 32, "multiples of 8"), (6, 36, "multiples of 6"),
                                                      (7, 28, "multiples of 7"), (1, 30, "any")])  # fmt: skip
def test_sizes_that_differ_by_whole_windows_are_padded_alike(window, side, said):
    torch.manual_seed(0)
    net, x = Padded(window).eval(), torch.randn(2, 3, side, side)
    graph = fxprune.analyze(net, x)
    expected = "batch, height, width: any" if said == "any" else f"batch: any; height, width: {said}"
    assert str(graph.sizes) == expected
    pruned = fxprune.prune(net, x, ratio=0.0)
    for h, w in ((side - window, side + window), (5 * side, window)):
        x = torch.randn(3, 3, h, w)
        torch.testing.assert_close(pruned(x), net(x))
    if window > 1:
        with pytest.raises(PinnedError):
            pruned(torch.randn(1, 3, side + 1, side))


@pytest.mark.parametrize("window", [5, 7, 9])
def test_sizes_of_other_remainders_are_refused(window):
    torch.manual_seed(0)
    net, x = Padded(window).eval(), torch.randn(2, 3, 33, 33)
    assert "decides otherwise" in str(fxprune.analyze(net, x).sizes)
    pruned, right = fxprune.prune(net, x, ratio=0.0), 0
    for side in range(24, 50):
        x = torch.randn(1, 3, side, side)
        try:
            found = pruned(x)
        except PinnedError:
            continue
        torch.testing.assert_close(found, net(x))
        right += 1
    assert right > 1


class Parted(nn.Module):
    """Two parts, and between them a branch that cannot be captured."""

    def __init__(self, decide):
        super().__init__()
        self.one, self.two = Deciding(decide), nn.Linear(4, 2)

    def forward(self, x):
        y = self.one(x)
        if y.mean() > 100:
            return y
        return self.two(y)


def _odd_lengths_differ(x, h):
    return h * 2 if x.shape[1] % 2 else h


@pytest.mark.parametrize("decide", [_threshold, _batch_of_one, _odd_lengths_differ])
def test_parts_of_a_model_refuse_too(decide):
    torch.manual_seed(0)
    model = Parted(decide).eval()
    result = fxprune.prune(model, torch.randn(2, 12, 8), ratio=0.0)
    refused = 0
    for size in [*SIZES, (2, 13)]:
        x = torch.randn(*size, 8)
        try:
            out = result(x)
        except PinnedError:
            refused += 1
        else:
            torch.testing.assert_close(out, model(x))
    assert 0 < refused < len(SIZES)


class Tokens(nn.Module):
    """Asks whether there is any token of a kind."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 2)

    def forward(self, ids):
        x = self.a(ids)
        if (ids == 3).sum():
            x = x * 2
        return self.b(x)


def test_any_number_of_tokens_is_as_true_as_another():
    model = Tokens().eval()
    result = fxprune.prune(model, torch.tensor([[3, 1, 3, 4]]), ratio=0.0)
    few = torch.tensor([[0, 3, 1, 2]])
    torch.testing.assert_close(result(few), model(few))
    with pytest.raises(PinnedError, match="in forward"):
        result(torch.tensor([[0, 1, 1, 2]]))


def _more_than_one(x, h):
    return h * 2 if x.shape[1] > 1 else h


@pytest.mark.parametrize("decide", [_more_than_one, _threshold, _blocks])
def test_torch_export_and_torch_compile_leave_the_sizes_free_that_decide(decide):
    torch.manual_seed(0)
    model, x = Deciding(decide).eval(), torch.randn(2, 12, 8)
    result = fxprune.prune(model, x, ratio=0.0)
    exported = capture_program(result, (x,), {})
    assert exported.sizes == "any batch, length"
    compiled = torch.compile(result, dynamic=True, backend="eager", fullgraph=True)
    for size in [(3, 12), (3, 30)]:
        x = torch.randn(*size, 8)
        torch.testing.assert_close(exported.program.module()(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))
    if decide is not _more_than_one:
        with pytest.raises(AssertionError):
            exported.program.module()(torch.randn(2, 150, 8))


def test_what_cannot_refuse_is_said(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    compiled = {".aoti.pt2": lambda exported, draft, *_: draft.write_text("compiled for a minute")}
    monkeypatch.setattr(exporting, "_WRITERS", {**exporting._WRITERS, **compiled})
    model, x = Deciding(_threshold).eval(), torch.randn(2, 12, 8)
    result = fxprune.prune(model, x, ratio=0.0)
    for name, what in (("net.onnx", "an ONNX model"), ("net.aoti.pt2", "a package of AOTInductor")):
        assert f"which {what} does not refuse" in fxprune.export(result, x, tmp_path / name).sizes
    assert "refuse" not in fxprune.export(result, x, tmp_path / "net.pt2").sizes


def test_decisions_by_sizes_that_a_file_fixes_are_not_said(tmp_path):
    class Fixed(nn.Module):
        def __init__(self, positions):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
            self.table = nn.Parameter(torch.randn(positions, 16))

        def forward(self, x):
            h = self.a(x) + self.table
            return self.b(h * 2 if x.shape[1] > 100 else h)

    pytest.importorskip("onnxscript")
    x = torch.randn(2, 12, 8)
    for positions, free in ((12, "any batch; "), (1, "any batch, length; ")):
        written = fxprune.export(fxprune.prune(Fixed(positions).eval(), x, 0.5), x, tmp_path / "net.onnx")
        assert written.sizes.startswith(free)
        assert ("does not refuse" in written.sizes) is (positions == 1)


class Attending(nn.Module):
    """Attention that is causal where there is more than one query."""

    def __init__(self, slope=0.1):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        self.slope = slope

    def forward(self, x, memory=None):
        x, memory = x if isinstance(x, (list, tuple)) else (x, memory)
        q, k = self.query(x), self.key(x if memory is None else memory)
        many = q.shape[1] > 1
        h = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=many)
        return self.out(nn.functional.leaky_relu(h, 0.1 if many else self.slope))


def test_a_length_of_one_is_taken_where_what_decides_by_it_makes_no_difference():
    model, x = Attending(), torch.randn(2, 12, 8)
    assert "decide" not in str(fxprune.analyze(model, x).sizes)
    pruned = fxprune.prune(model, x, ratio=0.0)
    for length in (1, 2, 30):
        x = torch.randn(3, length, 8)
        torch.testing.assert_close(pruned(x), model(x))


def test_a_length_of_one_is_refused_where_it_does():
    model, x = Attending(slope=0.5), torch.randn(2, 12, 8)
    pruned = fxprune.prune(model, x, ratio=0.0)
    torch.testing.assert_close(pruned(x[:, :2]), model(x[:, :2]))
    with pytest.raises(PinnedError, match="in forward"):
        pruned(x[:, :1])


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("keys", [12, 9, 1])
def test_one_query_is_taken_with_one_key_alone(keys, wrapped):
    """With more of them it makes a difference whether attention is causal."""
    model, x, memory = Attending(), torch.randn(2, 12, 8), torch.randn(2, 12, 8)

    def inputs(queries, keys):
        given = x[:, :queries], memory[:, :keys]
        return ([*given],) if wrapped else given

    pruned = fxprune.prune(model, inputs(12, keys), ratio=0.0)
    for queries in (1, 5):
        given = inputs(queries, min(queries, keys))
        torch.testing.assert_close(pruned(*given), model(*given))
    with pytest.raises(PinnedError, match="in forward"):
        pruned(*inputs(1, 12))


class Between(Attending):
    """Has an input that is not given between those that are."""

    def forward(self, x, mask=None, memory=None):
        return super().forward(x if mask is None else x * mask, memory)


def test_sizes_are_read_behind_all_inputs():
    model, x, memory = Between(), torch.randn(2, 12, 8), torch.randn(2, 9, 8)
    pruned = fxprune.prune(model, (x, None, memory), ratio=0.0)
    for queries, keys in ((5, 9), (1, 1)):
        given = x[:, :queries], None, memory[:, :keys]
        torch.testing.assert_close(pruned(*given), model(*given))


class AtOne(Deciding):
    """Asks at length one for something more, or gives a call a flag that makes a difference there."""

    def __init__(self, kind):
        super().__init__(None)
        self.kind = kind

    def forward(self, x):
        h = self.a(x).relu()
        if self.kind == "batch":
            if h.shape[1] == 1 and h.shape[0] > 4:
                h = h * 2
        else:
            h = h + h.std(1, keepdim=True, unbiased=bool(h.shape[1] > 1))
        return self.b(h)


@pytest.mark.parametrize("kind", ["batch", "flag"])
def test_a_length_of_one_is_refused_where_it_may_make_a_difference(kind):
    model = AtOne(kind)
    pruned = fxprune.prune(model, torch.randn(2, 12, 8), ratio=0.0)
    for batch in (3, 6):
        x = torch.randn(batch, 5, 8)
        torch.testing.assert_close(pruned(x), model(x))
    with pytest.raises(PinnedError, match="in forward"):
        pruned(torch.randn(6, 1, 8))
