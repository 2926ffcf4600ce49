"""Dead channels go without a change of the result, or stay with a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fxprune
from fxprune import dead_channels
from fxprune.errors import VerificationError

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def settled(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.eval()


def unchanged(model: nn.Module, x: Tensor) -> nn.Module:
    before = copy.deepcopy(model.state_dict())
    pruned = fxprune.lossless(model, x)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
        other = torch.randn(x.shape) * 5
        torch.testing.assert_close(pruned(other), model(other), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return pruned


class Convs(nn.Module):
    def __init__(self, padding: int, bias: bool) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=padding, bias=bias)
        self.after = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.b(self.norm(self.a(x)).relu())).relu().mean((2, 3)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("masks", [False, True])
def test_convolutions(padding: int, bias: bool, masks: bool) -> None:
    """What a ReLU lets through of the shift goes into the next layer; where that pads, one channel stays."""
    torch.manual_seed(0)
    model = settled(Convs(padding, bias))
    prune.ln_structured(model.a, "weight", 0.5, n=2, dim=0)
    dead = (model.a.weight == 0).flatten(1).all(1)
    if not masks:
        prune.remove(model.a, "weight")
    pruned = unchanged(model, X)
    shift = (
        model.norm.bias - model.norm.running_mean * model.norm.weight / (model.norm.running_var + 1e-5).sqrt()
    )
    shift = shift + model.a.bias * model.norm.weight / (model.norm.running_var + 1e-5).sqrt()
    assert 1 < int((dead & (shift > 0)).sum()) < int(dead.sum())  # of both kinds there are some
    assert pruned.get_parameter("b.weight").shape[1] == int((~dead).sum()) + padding
    notes = [note for note in pruned.meta["fxprune"].notes if "beside padding" in note]
    count = int((dead & (shift > 0)).sum()) - 1
    assert [note.partition(":")[0] for note in notes] == padding * [
        f"{count} dead channels of a.bias[0] are read as multiples of others that stay",
        "1 dead channels of a.bias[0] stay",
    ]


class Block(nn.Module):
    """Of a transformer: attention, and a feed-forward layer whose dead units still carry ``gelu(bias)``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(nn.functional.gelu(self.up(self.other(x))))


def test_feed_forward_layers_of_transformers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Block(), Block(), nn.Linear(8, 3)).eval()
    for block in (model[1], model[2]):
        prune.ln_structured(block.up, "weight", 6, n=2, dim=0)
        prune.remove(block.up, "weight")
    pruned = unchanged(model, torch.randn(2, 7, 5))
    assert pruned.get_parameter("1.up.weight").shape == (10, 8)
    assert pruned.get_parameter("2.down.weight").shape == (8, 10)


def test_a_stream_that_several_layers_make() -> None:
    """A channel is dead where all that add to it are zero."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.head(x + self.b(x))

    model = Residual().eval()
    with torch.no_grad():
        model.a.weight[:4] = 0
        model.b.weight[2:6] = 0
    pruned = unchanged(model, torch.randn(3, 5))
    assert pruned.get_parameter("head.weight").shape[1] == 6


def test_what_meets_data_is_not_dead() -> None:
    """The four channels carry the gate, all of them the same: one is enough."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.head = nn.Linear(5, 8), nn.Linear(5, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) + self.gate(x))

    model = Gated().eval()
    with torch.no_grad():
        model.a.weight[:4] = 0
        model.a.bias[:4] = 0
    assert unchanged(model, torch.randn(3, 5)).get_parameter("head.weight").shape[1] == 8 - 3


def test_nothing_dead_and_everything_dead() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    assert unchanged(model, torch.randn(3, 5)).get_parameter("0.weight").shape == (8, 5)
    nn.init.zeros_(model[0].weight)
    assert unchanged(model.train(), torch.randn(3, 5)).get_parameter("0.weight").shape == (1, 5)


class Between(nn.Module):
    """A convolution, a ReLU that lets half of the shifts through, and a layer that reads it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.layer, self.head = nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.a(x).relu()).relu())


@pytest.mark.parametrize(
    ("layer", "left"),
    [
        (nn.Conv2d(8, 8, 3, groups=4), 4),  # each of its groups loses one of its two channels
        (nn.ConvTranspose2d(8, 8, 2, stride=2), 4),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), 4),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate"), 4),
    ],
)
def test_constants_go_into_any_layer_to_which_they_add_the_same_everywhere(
    layer: nn.Module, left: int
) -> None:
    torch.manual_seed(0)
    model = Between(layer).eval()
    with torch.no_grad():
        if isinstance(
            layer, nn.ConvTranspose2d
        ):  # else it adds another amount at each place of a 2 x 2 square
            layer.weight.copy_(layer.weight.mean((2, 3), keepdim=True).expand_as(layer.weight))
        model.a.weight[::2] = 0
        model.a.bias[::2] = 1
    pruned = unchanged(model, X)
    assert pruned.get_parameter("a.weight").shape[0] == left, pruned.meta["fxprune"].notes


def test_rows_of_a_grouped_convolution_stay_equally_long() -> None:
    torch.manual_seed(0)
    model = Between(nn.Conv2d(8, 8, 3, groups=2)).eval()
    with torch.no_grad():
        for values in (model.a.weight, model.a.bias):
            values[[0, 1, 2, 5]] = 0
    pruned = unchanged(model, X)
    assert pruned.get_parameter("a.weight").shape[0] == 6
    (note,) = [note for note in pruned.meta["fxprune"].notes if "a.weight[0]" in note]
    assert note.startswith("2 dead channels of a.weight[0] stay: rows (of a grouped convolution")


def test_one_constant_stays_for_all_where_they_add_another_amount_at_each_place() -> None:
    torch.manual_seed(0)
    model = Between(nn.ConvTranspose2d(8, 8, 3, stride=2)).eval()
    with torch.no_grad():
        model.a.weight[::2] = 0
        model.a.bias[::2] = torch.tensor([1.0, 3.0, -1.0, -1.0])
    pruned = unchanged(model, X)
    assert pruned.get_parameter("a.weight").shape[0] == 5  # of the two that let something through, one stays


def test_layers_that_are_functions_take_up_constants_too() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
            self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.conv2d(self.a(x).relu(), self.b.weight)
            x = nn.functional.batch_norm(
                x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias
            )
            return nn.functional.linear(x.relu().mean((2, 3)), self.weight, self.bias)

    model = settled(Functions())
    with torch.no_grad():
        model.a.weight[::2] = 0
        model.a.bias[::2] = 1
        model.b.weight[:3] = 0
    pruned = unchanged(model, X)
    assert pruned.get_parameter("b.weight").shape == (3, 4, 1, 1)


def test_heads_lose_channels_that_are_zero() -> None:
    """Queries and keys end in a product with each other, and no weight reads them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Block(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        for row in (0, 4, 8, 12, 17, 22):  # of queries, keys and values, 8 rows each: two heads of 4
            model[1].qkv.weight[row] = 0
            model[1].qkv.bias[row] = 0
        model[1].qkv.weight[1] = 0  # a query that is zero but for its bias
    pruned = unchanged(model, torch.randn(2, 7, 5))
    assert pruned.get_parameter("1.qkv.weight").shape[0] == 24 - 6
    assert pruned.get_parameter("1.out.weight").shape[1] == 6


def test_channels_that_are_summed_up_go_only_where_they_are_zero() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).relu().sum(-1)

    model = Sums().eval()
    with torch.no_grad():
        model.a.weight[:4] = 0
        model.a.bias[:4] = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    assert unchanged(model, torch.randn(3, 5)).get_parameter("a.weight").shape[0] == 6


class Sized(nn.Module):
    """Half of the channels are constants; what these add depends on the size of the image."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.head = SIZED[name], nn.Linear(8, 4)
        with torch.no_grad():
            self.a.weight[:4], self.a.bias[:4], self.norm.bias[:4] = 0, 0, 1.5

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self, self.norm(self.a(x)).relu(), x))
        return out


SIZED: dict[str, Any] = {
    "padding": lambda net, y, x: net.b(y).mean((2, 3)),
    "padded before": lambda net, y, x: F.pad(y, (1, 1, 1, 1)).mean((2, 3)),
    "average": lambda net, y, x: F.avg_pool2d(y, 3, 1, 1).mean((2, 3)),
    "sum": lambda net, y, x: y.sum((2, 3)),
    "a size": lambda net, y, x: y.mean((2, 3)) * x.shape[2],
}


@pytest.mark.parametrize("name", SIZED)
def test_what_the_size_of_the_example_makes_constant_is_no_constant(name: str) -> None:
    """On an image of 2 x 2 all that is left is one place, beside padding on all sides."""
    model = Sized(name).eval()
    pruned = fxprune.lossless(model, torch.randn(2, 3, 2, 2))
    for size in (2, 12, 7):
        x = torch.randn(3, 3, size, size)
        torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)


class Around(nn.Module):
    """Attention as one module, in which queries, keys and values begin and end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_attention_modules_lose_channels_that_are_zero() -> None:
    torch.manual_seed(0)
    model = Around().eval()
    with torch.no_grad():
        model.attention.in_proj_bias.normal_()
        for row in (0, 4, 8, 12, 17, 22):  # of queries, keys and values, 8 rows each: two heads of 4
            model.attention.in_proj_weight[row] = 0
            model.attention.in_proj_bias[row] = 0
    pruned = unchanged(model, torch.randn(2, 7, 5))
    assert pruned.get_parameter("attention.in_proj_weight").shape[0] == 24 - 6
    model.attention.in_proj_bias.data[[0, 12, 17]] = 1.0  # queries, keys and values that are not zero
    kept = unchanged(model, torch.randn(2, 7, 5))
    assert kept.get_parameter("attention.in_proj_weight").shape[0] == 24
    assert any("attention gives something else without" in note for note in kept.meta["fxprune"].notes)


class Flat(nn.Module):
    """Convolutions whose last one is flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()).flatten(1))


def test_copies_of_channels_are_read_as_one() -> None:
    """A copy beside padding and one in front of a flattening; not one that has another shift."""
    torch.manual_seed(0)
    model = settled(Flat())
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias, *model.norm.state_dict().values()):
            if tensor.dim():
                tensor[[2, 5]] = tensor[[0, 0]]
                tensor[4] = tensor[1]
        model.norm.bias[4] += 0.5
        for tensor in (model.b.weight, model.b.bias):
            tensor[3] = tensor[1]
        model.b.weight[2] = 0  # dead, beside a copy: its bias goes into the head, the copy's values do not
    pruned = unchanged(model, X)
    assert pruned.get_parameter("a.weight").shape[0] == 4
    assert pruned.get_parameter("head.weight").shape[1] == 2 * 64
    assert pruned.meta["fxprune"].removed == {"a.weight[0]": [2, 5], "b.weight[0]": [2, 3]}


def test_copies_stay_where_something_else_reads_them() -> None:
    """Constants of the graph tell them apart, and a sum over channels counts both."""

    class Net(nn.Module):
        def __init__(self, apart: bool) -> None:
            super().__init__()
            self.a, self.b, self.apart = nn.Linear(5, 4), nn.Linear(4, 3), apart

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x * torch.arange(4)) if self.apart else self.b(x) + x.sum(1, keepdim=True)

    for apart in (True, False):
        torch.manual_seed(0)
        model = Net(apart)
        model.a.weight.data[2], model.a.bias.data[2] = model.a.weight[1], model.a.bias[1]
        assert unchanged(model.eval(), torch.randn(3, 5)).get_parameter("a.weight").shape == (4, 5)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_what_a_normalisation_scales_by_zero_is_dead(kind: type[nn.Module]) -> None:
    """The layer in front may compute what it likes; what another layer reads unscaled has to stay."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self, both: bool) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 8, 3), kind(8, affine=True)
            self.b, self.c = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
            self.both = both

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            b = self.b(self.norm(a).relu())
            return (b + self.c(a) if self.both else b).mean((2, 3))

    for both in (False, True):
        model = settled(Net(both))
        norm: Any = model.norm
        norm.weight.data[:4] = 0
        norm.bias.data[:4] = torch.tensor([-1.0, 0.0, 0.5, 2.0])
        pruned = unchanged(model, X)
        assert pruned.get_submodule("a").weight.shape[0] == (8 if both else 4)


class Parts(nn.Module):
    """Two parts with a decision on values in front, the second on what the first returns."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 12, 3, padding=padding), nn.ReLU(), nn.Conv2d(12, 4, 1))
        self.between = False

    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 1000:
            x = x - 1
        y = self.first(x)
        if self.between:
            y = y + y.max()
        return self.second(y)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("between", [False, True])
def test_models_that_are_captured_in_parts(padding: int, between: bool) -> None:
    """Within a part and from one to the next; constants are folded; where the next layer pads, one stays."""
    torch.manual_seed(0)
    model = settled(Parts(padding))
    model.between = between
    first, second = model.first, model.second
    with torch.no_grad():
        first[0].weight[:4], first[0].bias[:4] = 0, 0
        first[1].running_mean[:4], first[1].bias[:4] = 0, torch.tensor([-1.0, -0.5, 0.5, 2.0])
        second[0].weight[:6], second[0].bias[:6] = 0, torch.arange(6.0) - 2
    assert fxprune.analyze(model, X).captured.regions
    pruned: Any = unchanged(model, X)
    assert type(pruned) is Parts
    went = 0 if between else 3 if padding else 4
    assert pruned.first[0].weight.shape[0] == 8 - went
    assert pruned.second[0].weight.shape[0] == 6
    notes = " ".join(pruned.meta["fxprune"].notes)
    assert ("differs between places" in notes) is (padding == 1 and not between)


class Helper(nn.Module):
    """Returns several tensors, and has no parameters."""

    def __init__(self, halves: bool) -> None:
        super().__init__()
        self.halves = halves

    def forward(self, x: Tensor) -> Any:
        return x.chunk(2, 1) if self.halves else {"a": x.relu(), "b": [x * 2]}


class ByHelper(nn.Module):
    """Layers that a decision on values keeps apart; what goes between them goes through a helper."""

    def __init__(self, halves: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.helper = Helper(halves)
        self.b, self.c = (nn.Conv2d(4 if halves else 8, 5, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 1000:
            x = x - 1
        found = self.helper(self.a(x))
        p, q = found if self.helper.halves else (found["a"], found["b"][0])
        return self.b(p) + self.c(q)


@pytest.mark.parametrize("halves", [False, True])
def test_parts_are_linked_by_helpers_without_parameters(halves: bool) -> None:
    model: Any = ByHelper(halves).eval()
    with torch.no_grad():
        model.a.weight[:4], model.a.bias[:4] = 0, torch.tensor([0.0, 0.0, 0.5, -0.5])
    pruned: Any = unchanged(model, X)
    assert type(pruned) is ByHelper
    assert pruned.a.weight.shape[0] == (5 if halves else 4)  # of each half one channel stays


def test_parts_take_other_sizes_where_the_code_around_them_does_not() -> None:
    """A detector brings images of all sizes, a list of them, to one: its parts are run without it."""

    class Detects(Parts):
        def forward(self, images: Any) -> Tensor:  # type: ignore[override]
            if any(image.shape[0] != 3 for image in images):
                raise ValueError("no images")
            return super().forward(torch.stack(list(images)))

    for padding in (0, 1):
        torch.manual_seed(0)
        model: Any = settled(Parts(padding))
        model.__class__ = Detects
        with torch.no_grad():
            model.first[0].weight[:4], model.first[0].bias[:4] = 0, 0
            model.first[1].running_mean[:4], model.first[1].bias[:4] = 0, 1
        pruned: Any = fxprune.lossless(model, ([X[0], X[1]],))
        assert pruned.first[0].weight.shape[0] == (5 if padding else 4)
        other = torch.randn(3, 3, 11, 17)
        torch.testing.assert_close(pruned(other), model(other), rtol=1e-5, atol=1e-5)


def test_what_meets_others_stays_with_a_note() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    model: Any = Sum().eval()
    with torch.no_grad():
        model.a.weight[:3], model.a.bias[:3] = 0, 0
    pruned = unchanged(model, X)
    (note,) = pruned.meta["fxprune"].notes
    assert (
        note == "3 channels of a.weight[0] that a layer makes zero stay: at add they meet others that are not"
    )


def test_what_rounding_decides_is_compared_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector sorts by scores: in single precision rounding changes which boxes come."""
    model = settled(Convs(0, bias=True))
    prune.ln_structured(model.a, "weight", 0.5, n=2, dim=0)
    compare = dead_channels._apart

    def sorts(one: nn.Module, *others: Any) -> float:
        return compare(one, *others) if next(one.parameters()).dtype == torch.float64 else 1.0

    monkeypatch.setattr(dead_channels, "_apart", sorts)
    fxprune.lossless(model, X)
    monkeypatch.setattr(dead_channels, "_apart", lambda *_: 1.0)
    with pytest.raises(VerificationError, match="differs"):
        fxprune.lossless(model, X)


def test_parts_whose_padded_layer_sees_one_place_in_the_example() -> None:
    """At other sizes it adds other amounts: one constant stays for all."""
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self, refuses: bool) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 10), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
            self.refuses = refuses

        def forward(self, x: Tensor) -> Tensor:
            if self.refuses and x.shape != X.shape:
                raise ValueError("another size")
            while x.sum() > 1000:
                x = x - 1
            return self.body(x).mean((2, 3))

    for refuses in (True, False):
        model: Any = Small(refuses).eval()
        with torch.no_grad():
            model.body[0].weight[:4], model.body[0].bias[:4] = 0, torch.arange(1.0, 5.0)
        assert fxprune.analyze(model, X).captured.regions
        pruned = unchanged(model, X)
        assert pruned.body[0].weight.shape[0] == 5
        model.refuses = pruned.refuses = False
        other = torch.randn(2, 3, 17, 14)
        torch.testing.assert_close(pruned(other), model(other), rtol=1e-5, atol=1e-5)


class Several(nn.Module):
    """Two layers that pad read the channels, one of them behind a shift and a ReLU; neither has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.shift = nn.Parameter(torch.zeros(8, 1, 1))
        self.b = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.c = nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y) * self.c((y + self.shift).relu())


@pytest.mark.parametrize(("shift", "stay"), [(-9.0, 2), (-1.0, 1)])
@pytest.mark.parametrize("masks", [False, True])
def test_constants_that_several_layers_read(masks: bool, shift: float, stay: int) -> None:
    """One of them stays for all layers; where it is zero for one of these, another stays for that one."""
    torch.manual_seed(0)
    model = Several().eval()
    with torch.no_grad():
        model.a.weight[:6], model.a.bias[:6] = 0, torch.arange(1.0, 7.0)
        model.shift[5], model.shift[3] = shift, 3.0
    if masks:
        for layer in (model.b, model.c):
            prune.ln_structured(layer, "weight", 2, n=2, dim=0)
    pruned: Any = unchanged(model, X)
    assert pruned.get_parameter("a.weight").shape[0] == 2 + stay, pruned.meta["fxprune"].notes
    other = torch.randn(1, 3, 20, 7)
    torch.testing.assert_close(pruned(other), model(other), rtol=1e-5, atol=1e-5)


def test_one_constant_stays_for_each_row_of_a_grouped_convolution() -> None:
    torch.manual_seed(0)
    model = Between(nn.Conv2d(8, 8, 3, groups=2, padding=1)).eval()
    with torch.no_grad():
        model.a.weight[[0, 1, 3, 5, 6, 7]] = 0
        model.a.bias[[0, 1, 3, 5, 6, 7]] = torch.tensor([1.0, 2.0, 5.0, 1.0, 3.0, 4.0])
    pruned = unchanged(model, X)
    assert pruned.meta["fxprune"].removed == {"a.weight[0]": [0, 1, 5, 6]}


def test_layers_that_are_called_twice() -> None:
    """One that reads other multiples in each call keeps the constants."""

    class Twice(nn.Module):
        def __init__(self, same: bool) -> None:
            super().__init__()
            self.a, self.b, self.same = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), same

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.b(y) * self.b(-2 * y if self.same else torch.tanh(y))

    for same in (False, True):
        torch.manual_seed(0)
        model = Twice(same).eval()
        with torch.no_grad():
            model.a.weight[:4], model.a.bias[:4] = 0, torch.arange(1.0, 5.0)
        assert unchanged(model, X).get_parameter("a.weight").shape[0] == (5 if same else 8)


def test_constants_of_which_other_sizes_are_not_known_stay() -> None:
    model = Between(nn.Conv2d(8, 8, 3, padding=1)).eval()
    with torch.no_grad():
        model.a.weight[:4], model.a.bias[:4] = 0, torch.arange(1.0, 5.0)
    graph = fxprune.analyze(model, X, fill_outputs=())
    for any_size, left in ((True, 8), (False, 5)):
        _, pruned = dead_channels.without_dead_channels(graph, (X,), {}, any_size)
        assert pruned.get_parameter("a.weight").shape[0] == left


def test_weights_of_few_bits_take_up_nothing_that_they_cannot_hold() -> None:
    torch.manual_seed(0)
    model = settled(Convs(1, bias=True))
    prune.ln_structured(model.a, "weight", 0.5, n=2, dim=0)
    prune.remove(model.a, "weight")
    model, x = model.bfloat16(), X.bfloat16()
    pruned = fxprune.lossless(model, x)
    with torch.no_grad():
        wanted = model.float()(X)
        assert float((pruned.float()(X) - wanted).abs().max()) < 1e-2 * float(wanted.abs().max())


@pytest.mark.parametrize("padding", [0, 1])
def test_layers_with_masks_one_behind_the_other(padding: int) -> None:
    """A weight and its mask are one reader: what it reads is folded once; copies are merged."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=padding), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0, torch.arange(1.0, 5.0)
        model[0].weight[7], model[0].bias[7] = model[0].weight[6], model[0].bias[6]
    for layer in (model[0], model[2]):
        prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
    pruned = unchanged(model, X)
    assert pruned.get_submodule("0").weight.shape[0] == 3 + padding, pruned.meta["fxprune"].notes


class Depthwise(nn.Module):
    """Channels that pass a depthwise convolution that pads, or not."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=padding, groups=8)
        self.after, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.after(self.b(self.norm(self.a(x)).relu())).relu())


@pytest.mark.parametrize("padding", [0, 1])
def test_a_depthwise_filter_of_zeros_makes_its_channel_dead(padding: int) -> None:
    """What comes in makes no difference then; where the filter is not zero, beside padding it does."""
    torch.manual_seed(0)
    model = settled(Depthwise(padding))
    with torch.no_grad():
        model.a.weight[:3] = 0
        model.norm.bias[:3], model.norm.running_mean[:3], model.a.bias[:3] = torch.tensor([2.0, 3, -1]), 0, 0
        model.b.weight[[1, 4, 5]] = 0  # of a channel that is dead already, and of two that are not
        model.after.bias[[1, 4, 5]] = 9.0
    pruned = unchanged(model, X)
    (gone,) = pruned.meta["fxprune"].removed.values()
    assert gone == [1, 2, 4, 5] if padding else gone == [0, 1, 2, 4, 5]
    other = torch.randn(1, 3, 20, 7)
    torch.testing.assert_close(pruned(other), model(other), rtol=1e-5, atol=1e-5)


def test_channels_that_all_layers_multiply_by_zeros() -> None:
    """Also where one of the layers is masked; not where a sum reads them, too."""

    class Unread(nn.Module):
        def __init__(self, sums: bool) -> None:
            super().__init__()
            self.a, self.b, self.c, self.sums = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3), sums

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x) + self.c(x.relu())
            return y + x.sum(-1, keepdim=True) if self.sums else y

    for sums in (False, True):
        torch.manual_seed(0)
        model = Unread(sums).eval()
        mask = torch.ones(3, 8)
        mask[:, :4] = 0
        prune.custom_from_mask(model.b, "weight", mask)
        model.c.weight.data[:, 2:6] = 0
        pruned = unchanged(model, torch.randn(3, 5))
        assert pruned.get_parameter("a.weight").shape[0] == (8 if sums else 6)
