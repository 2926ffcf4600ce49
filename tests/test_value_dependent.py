"""Packed sequences, whose lengths are a matter of values: followed, and free from call to call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import call, check
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxprune

WORDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 0], [5, 1, 0, 0, 0]])
LENGTHS = torch.tensor([5, 4, 2])
LAYERS = ["words.weight", "into.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight", "last.weight"]


class Tagger(nn.Module):
    """Words to scores, with a recurrent layer over packed sequences."""

    def __init__(self, layer: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.into = nn.Linear(8, 12)
        self.rnn = layer(12, 6, batch_first=True, **options)
        self.out = nn.Linear(12 if options.get("bidirectional") else 6, 8)
        self.last = nn.Linear(8, 3)

    def packed(self, words: Tensor, lengths: Any) -> Any:
        return pack_padded_sequence(
            self.into(self.words(words)), lengths, batch_first=True, enforce_sorted=False
        )

    def scores(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.out(x)))

    def forward(self, words: Tensor, lengths: Any) -> Tensor:
        x, _ = self.rnn(self.packed(words, lengths))
        return self.scores(pad_packed_sequence(x, batch_first=True)[0])


class ByList(Tagger):
    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(words, lengths.cpu().tolist())


class Counting(Tagger):
    """Takes no lengths, packs by names of the module, and has one length for all results."""

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        x = self.into(self.words(words))
        lengths = (words != 0).sum(1).cpu()
        x = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, lengths = rnn.pad_packed_sequence(self.rnn(x)[0], batch_first=True, total_length=7)
        return self.scores(x), lengths


class Rebuilt(Tagger):
    """Dropout, as it is written for packed sequences."""

    def forward(self, words: Tensor, lengths: Any) -> Tensor:
        x = self.packed(words, lengths)
        x = rnn.PackedSequence(torch.tanh(x.data), x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return self.scores(self.rnn(x)[0].data)


class Final(Tagger):
    """Reads the hidden state behind the last word of each sequence."""

    def forward(self, words: Tensor, lengths: Any) -> Tensor:
        _, (h, _) = self.rnn(self.packed(words, lengths))
        return self.scores(torch.cat([h[-2], h[-1]], 1))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Tagger(), (WORDS, LENGTHS)),
        (Tagger(nn.GRU, num_layers=2, bidirectional=True), (WORDS, LENGTHS)),
        (ByList(), (WORDS, LENGTHS)),
        (Counting(nn.RNN), (WORDS,)),
        (Rebuilt(), (WORDS, LENGTHS)),
        (Final(bidirectional=True), (WORDS, LENGTHS)),
    ],
    ids=["padded", "two directions", "by list", "computed lengths", "rebuilt", "final state"],
)
def test_packed(model: nn.Module, inputs: Any) -> None:
    """Hidden units go with the layers before and after, also for other lengths."""
    check(model, inputs, narrows=LAYERS, exact=True)


def test_a_list_of_lengths_stays_free() -> None:
    """Lengths that are given as a list are not those of the example for ever."""
    model = Tagger()
    _, pruned = check(model, (WORDS, [5, 4, 2]), narrows=LAYERS, exact=True, batch_dim=None)
    same = fxprune.plan(model, (WORDS, LENGTHS)).apply(model)
    for lengths in ([5, 4, 2], [1, 5, 3]):
        got, wanted = call(pruned, (WORDS, lengths)), call(same, (WORDS, torch.tensor(lengths)))
        assert got.shape[1] == 5
        assert torch.equal(got, wanted)


class Inspecting(Tagger):
    def forward(self, words: Tensor, lengths: list[int]) -> Tensor:
        return super().forward(words[:, : max(lengths)], lengths)


def test_a_list_that_is_looked_at_leaves_regions() -> None:
    """Its numbers would be burned in, so that the code around the layers stays as it is."""
    model = Inspecting()
    graph = fxprune.analyze(model, (WORDS, [5, 4, 2]))
    assert graph.captured.rung == "regions"
    assert "lengths of packed sequences" in graph.captured.report
    pruned = fxprune.prune(model, (WORDS, [5, 4, 2]))
    assert pruned.words.weight.shape[1] < 8
    assert pruned(WORDS, [3, 2, 1]).shape == (3, 3, 3)
