"""Recurrent layers and cells."""

from __future__ import annotations

import torch
from torch import nn

from .cases import (
    TOKENS,
    WORDS,
    case,
)


@case(
    WORDS,
    lambda: {
        "words": nn.Embedding(10, 12),
        "rnn": nn.LSTM(12, 8, batch_first=True),
        "b": nn.Linear(8, 6),
        "c": nn.Linear(6, 4),
    },
    "words rnn.weight_ih_l0 b c",
)
def lstm_in_a_tagger(net, words):
    x, _ = net.rnn(net.words(words))
    return net.c(torch.relu(net.b(x)))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 8), "rnn": nn.LSTM(8, 6), "b": nn.Linear(6, 8), "c": nn.Linear(8, 4)},
    "a rnn.weight_ih_l0 b c", batch_dim=1,
)  # fmt: skip
def state_by_its_type(net, x):
    """Code for several kinds of recurrent layers."""
    _, state = net.rnn(net.a(x))
    if isinstance(state, tuple):
        state, _ = state
    return net.c(net.b(state[-1]))


@case(
    TOKENS,
    lambda: {
        "a": nn.Linear(12, 8),
        "rnn": nn.GRU(8, 6, num_layers=2, bidirectional=True, batch_first=True),
        "b": nn.Linear(12, 4),
    },
    "a rnn.weight_ih_l0",
)
def gru_of_two_layers_and_directions(net, x):
    x, h = net.rnn(net.a(x))
    return net.b(x[:, -1]), h


@case(
    TOKENS,
    lambda: {
        "a": nn.Linear(12, 8),
        "rnn": nn.LSTM(8, 6, proj_size=4, batch_first=True),
        "b": nn.Linear(4, 4),
    },
    "a rnn.weight_ih_l0",
)
def lstm_with_a_projection(net, x):
    x, _ = net.rnn(net.a(x))
    return net.b(x[:, -1])


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 8), "rnn": nn.RNN(8, 6, batch_first=True), "b": nn.Linear(6, 4)},
    "a rnn.weight_ih_l0",
)
def plain_rnn(net, x):
    return net.b(net.rnn(net.a(x))[0])


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 8), "cell": nn.GRUCell(8, 6), "b": nn.Linear(6, 4)},
    "a cell.weight_ih",
)
def gru_cell_in_a_loop(net, x):
    x = net.a(x)
    h = torch.zeros(x.shape[0], 6, dtype=x.dtype)
    for t in range(5):
        h = net.cell(x[:, t], h)
    return net.b(h)
