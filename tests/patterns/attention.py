"""Attention: heads, fused projections, scales, masks, grouped queries."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from .cases import (
    IMAGE,
    TOKENS,
    WORDS,
    Layers,
    case,
    conv,
    parameter,
    qkv,
)


@case(TOKENS, qkv, "q k v o")
def attention_with_implied_scale(net, x):
    q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@case(TOKENS, qkv, "q k v o")
def attention_with_a_scale_of_the_size(net, x):
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, 4, -1).transpose(1, 2) for layer in (net.q, net.k, net.v))
    weights = ((q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return net.o((weights @ v).transpose(1, 2).reshape(n, t, -1))


@case(TOKENS, qkv, "q k v o")
def attention_with_a_square_root(net, x):
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, 4, 6).permute(0, 2, 1, 3) for layer in (net.q, net.k, net.v))
    weights = F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1]), dim=-1)
    return net.o(torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(n, t, 24))


@case(TOKENS, qkv, "q k v o")
def attention_with_a_literal_scale(net, x):
    q, k, v = (layer(x).reshape(-1, 5, 4, 6).permute(0, 2, 1, 3) for layer in (net.q, net.k, net.v))
    weights = torch.einsum("bhid,bhjd->bhij", q, k) * 0.408
    return net.o(torch.einsum("bhij,bhjd->bihd", weights.softmax(-1), v).reshape(-1, 5, 24))


@case(TOKENS, qkv, "q k v o", batch_dim=None)
def attention_with_a_literal_batch(net, x):
    q, k, v = (layer(x).view(2, 5, 4, 6).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 24))


@case(TOKENS, qkv, "q k v o")
def attention_with_heads_folded_into_the_batch(net, x):
    n, t, _ = x.shape
    q, k, v = (
        layer(x).view(n, t, 4, 6).transpose(1, 2).reshape(n * 4, t, 6) for layer in (net.q, net.k, net.v)
    )
    weights = torch.bmm(q, k.transpose(1, 2)).mul(6**-0.5).softmax(-1)
    return net.o(torch.bmm(weights, v).view(n, 4, t, 6).transpose(1, 2).reshape(n, t, 24))


@case((TOKENS, torch.ones(2, 1, 1, 5, dtype=torch.bool).tril()), qkv, "q k v o")
def attention_with_a_mask(net, x, mask):
    q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


@case(TOKENS, lambda: {**qkv(), "bias": parameter(4, 5, 5)}, "q k v o")
def attention_with_a_bias_a_head(net, x):
    q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    weights = (q @ k.mT * 0.4 + net.bias).softmax(-1)
    return net.o((weights @ v).transpose(1, 2).flatten(2))


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 72), "o": nn.Linear(24, 12)}, "qkv o")
def attention_with_literal_splits(net, x):
    q, k, v = net.qkv(x).split([24, 24, 24], dim=-1)
    q, k, v = (z.view(z.size(0), z.size(1), 4, 6).transpose(1, 2) for z in (q, k, v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.size(0), x.size(1), 24))


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 72), "o": nn.Linear(24, 12)}, "qkv o")
def attention_with_heads_before_the_split(net, x):
    n, t, _ = x.shape
    q, k, v = net.qkv(x).view(n, t, 4, 18).transpose(1, 2).chunk(3, dim=-1)
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 24))


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 72), "o": nn.Linear(24, 12)}, "qkv o")
def attention_with_qkv_selected_by_number(net, x):
    n, t, _ = x.shape
    qkv = net.qkv(x).reshape(n, t, 3, 4, 6).permute(2, 0, 3, 1, 4)
    return net.o(F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(n, t, 24))


def grouped_query() -> Layers:
    return {"q": nn.Linear(12, 24), "k": nn.Linear(12, 12), "v": nn.Linear(12, 12), "o": nn.Linear(24, 12)}


@case(TOKENS, grouped_query, "q k v o")
def grouped_queries_by_repeat_interleave(net, x):
    q = net.q(x).view(-1, 5, 4, 6).transpose(1, 2)
    k, v = (layer(x).view(-1, 5, 2, 6).transpose(1, 2) for layer in (net.k, net.v))
    k, v = k.repeat_interleave(2, dim=1), torch.repeat_interleave(v, 2, dim=1)
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 24))


@case(TOKENS, grouped_query, "q k v o")
def grouped_queries_by_expand(net, x):
    n, t, _ = x.shape
    q = net.q(x).view(n, t, 4, 6).transpose(1, 2)
    k, v = (layer(x).view(n, t, 2, 6).transpose(1, 2) for layer in (net.k, net.v))
    k, v = (z[:, :, None].expand(n, 2, 2, t, 6).reshape(n, 4, t, 6) for z in (k, v))
    return net.o((q @ k.mT * 0.4).softmax(-1).matmul(v).transpose(1, 2).reshape(n, t, 24))


@case(TOKENS, grouped_query, "q k v o")
def grouped_queries_by_flag(net, x):
    q = net.q(x).view(-1, 5, 4, 6).transpose(1, 2)
    k, v = (layer(x).view(-1, 5, 2, 6).transpose(1, 2) for layer in (net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(-1, 5, 24))


@case(
    TOKENS,
    lambda: {"q": nn.Linear(12, 24), "k": nn.Linear(12, 6), "v": nn.Linear(12, 6), "o": nn.Linear(24, 12)},
    "q k v o",
)
def multi_query_attention(net, x):
    q = net.q(x).view(-1, 5, 4, 6).transpose(1, 2)
    k, v = net.k(x).unsqueeze(1), net.v(x).unsqueeze(1)
    return net.o((q @ k.mT * 0.4).softmax(-1).matmul(v).transpose(1, 2).reshape(-1, 5, 24))


@case(
    IMAGE,
    lambda: {"a": conv(3, 16), "qkv": conv(16, 48, 1), "o": conv(16, 16, 1), "b": conv(16, 4)},
    "a qkv o b",
)
def attention_over_space(net, x):
    x = net.a(x)
    n, c, h, w = x.shape
    q, k, v = net.qkv(x).reshape(n, 3, 2, 8, h * w).unbind(1)
    weights = torch.softmax(q.transpose(-2, -1) @ k / math.sqrt(8), -1)
    return net.b(x + net.o((v @ weights.transpose(-2, -1)).reshape(n, c, h, w)))


@case(
    IMAGE,
    lambda: {
        "a": conv(3, 12),
        "theta": conv(12, 6, 1),
        "phi": conv(12, 6, 1),
        "g": conv(12, 6, 1),
        "o": conv(6, 12, 1),
        "b": conv(12, 4),
    },
    "a theta phi g o b",
)
def non_local_block(net, x):
    x = net.a(x)
    q, k, v = (layer(x).flatten(2) for layer in (net.theta, net.phi, net.g))
    y = (v @ torch.softmax(q.mT @ k, -1).mT).view(x.shape[0], 6, 8, 8)
    return net.b(x + net.o(y))


@case(TOKENS, lambda: {"qkv": nn.Linear(12, 72), "o": nn.Linear(24, 12)}, exact=None)
def channel_attention(net, x):
    q, k, v = net.qkv(x).view(-1, 5, 3, 4, 6).permute(2, 0, 3, 4, 1).unbind(0)
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return net.o((weights @ v).permute(0, 3, 1, 2).reshape(-1, 5, 24))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 16), "b": nn.Linear(16, 16), "gamma": parameter(16), "c": nn.Linear(16, 4)},
    "a b gamma c",
)
def layer_scale(net, x):
    x = net.a(x)
    return net.c(x + net.gamma * net.b(x))


@case(
    TOKENS,
    lambda: {
        "a": nn.Linear(12, 16),
        "token": parameter(1, 1, 16),
        "position": parameter(1, 6, 16),
        "b": nn.Linear(16, 4),
    },
    "a token position b",
)
def class_token_and_positions(net, x):
    x = net.a(x)
    x = torch.cat([net.token.expand(x.shape[0], -1, -1), x], dim=1) + net.position
    return net.b(x[:, 0])


@case(
    WORDS,
    lambda: {
        "words": nn.Embedding(10, 16, padding_idx=0),
        "places": nn.Embedding(5, 16),
        "a": nn.Linear(16, 24),
        "b": nn.Linear(24, 4),
    },
    "words places a b",
    frozen={"words.weight[0]": "looked up", "places.weight[0]": "looked up"},
)
def embeddings_of_words_and_places(net, words):
    x = net.words(words) + net.places(torch.arange(words.shape[1]))
    return net.b(torch.relu(net.a(x)))


@case(
    TOKENS,
    lambda: {
        "a": nn.Linear(12, 16),
        "layer": nn.TransformerEncoderLayer(16, 2, 24, batch_first=True),
        "b": nn.Linear(16, 4),
    },
    "a layer.self_attn.in_proj_weight layer.linear1.weight layer.linear2.weight layer.norm1.weight b",
    exact=False,
)
def transformer_encoder_layer(net, x):
    return net.b(net.layer(net.a(x)))


@case(
    TOKENS,
    lambda: {
        "layers": nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        )
    },
    "layers.layers.0.linear1.weight layers.layers.1.self_attn.in_proj_weight "
    "layers.layers.1.self_attn.out_proj.weight",
    exact=True,
)
def transformer_encoder(net, x):
    return net.layers(x)


@case(
    (TOKENS, TOKENS.flip(1)),
    lambda: {"layer": nn.TransformerDecoderLayer(12, 2, 24, batch_first=True)},
    "layer.linear1.weight layer.self_attn.in_proj_weight layer.multihead_attn.in_proj_weight",
)
def transformer_decoder_layer(net, x, memory):
    return net.layer(x, memory)


@case(
    (TOKENS, TOKENS.flip(1)),
    lambda: {
        "into": nn.Linear(12, 12),
        "t": nn.Transformer(12, 2, 1, 1, 24, batch_first=True),
        "last": nn.Linear(12, 5),
    },
    "into.weight t.encoder.layers.0.linear1.weight t.decoder.norm.weight last.weight",
    exact=False,
)
def transformer_between_layers(net, x, y):
    """The width of the residual stream is an attribute of ``nn.Transformer``."""
    return net.last(net.t(net.into(x), net.into(y)))


@case(
    (TOKENS, TOKENS.flip(1)),
    lambda: {"t": nn.Transformer(12, 2, 1, 1, 24, batch_first=True)},
    "t.encoder.layers.0.linear1.weight t.decoder.layers.0.multihead_attn.out_proj.weight",
)
def transformer(net, x, y):
    return net.t(x, y)


@case(TOKENS, qkv, "q k v o")
def attention_with_the_scale_as_alpha(net, x):
    n, t, _ = x.shape
    q, k, v = (
        layer(x).view(n, t, 4, -1).transpose(1, 2).reshape(n * 4, t, -1) for layer in (net.q, net.k, net.v)
    )
    bias = x.new_zeros(1, 1, 1)
    weights = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=q.size(-1) ** -0.5).softmax(-1)
    return net.o(torch.bmm(weights, v).view(n, 4, t, -1).transpose(1, 2).reshape(n, t, -1))


@case(TOKENS, qkv, "q k v o", exact=None)
def linear_attention(net, x):
    q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    x = (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1))
    return net.o(x.transpose(1, 2).flatten(2))


@case(TOKENS, lambda: {"a": nn.Linear(12, 24), "o": nn.Linear(24, 4)}, exact=None, shrinks=False)
def roll_within_heads(net, x):
    return net.o(net.a(x).unflatten(-1, (4, 6)).roll(1, -1).flatten(2))


@case(TOKENS, lambda: {"a": nn.Linear(12, 24), "o": nn.Linear(24, 4)}, exact=None, shrinks=False)
def flip_within_heads(net, x):
    return net.o(net.a(x).unflatten(-1, (4, 6)).flip(-1).flatten(2))


@case(TOKENS, lambda: {"a": nn.Linear(12, 24), "o": nn.Linear(24, 4)}, exact=None, shrinks=False)
def roll_of_heads(net, x):
    return net.o(net.a(x).unflatten(-1, (4, 6)).roll(1, -2).flatten(2))


@case(
    IMAGE,
    lambda: {"a": conv(3, 12), "q": nn.Linear(12, 12), "k": nn.Linear(12, 12), "v": nn.Linear(12, 12),
             "o": nn.Linear(12, 12), "c": nn.Linear(12, 4)},
    "a q k v o c",
)  # fmt: skip
def attention_as_one_function(net, x):
    """Attention pooling as in CLIP (Radford et al., 2021)."""
    x = net.a(x).flatten(2).permute(2, 0, 1)
    x, _ = F.multi_head_attention_forward(
        query=x.mean(0, keepdim=True), key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=3,
        q_proj_weight=net.q.weight, k_proj_weight=net.k.weight, v_proj_weight=net.v.weight,
        in_proj_weight=None, in_proj_bias=torch.cat([net.q.bias, net.k.bias, net.v.bias]),
        bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0, out_proj_weight=net.o.weight,
        out_proj_bias=net.o.bias, use_separate_proj_weight=True, training=net.training, need_weights=False,
    )  # fmt: skip
    return net.c(x.squeeze(0))


@case(
    TOKENS,
    lambda: {"a": nn.Linear(12, 16), "u": nn.Linear(16, 1), "v": nn.Linear(16, 1), "b": nn.Linear(16, 4)},
    "a b",
)
def masks_of_which_one_is_padded(net, x):
    x, n = net.a(x), x.shape[1]
    same = torch.zeros(n, n, dtype=torch.bool)
    mask = F.pad(x.new_ones(n - 1, n - 1), (1, 0, 1, 0)).neg()
    weights = torch.where(same, net.u(x).expand(-1, -1, n), net.v(x).expand(-1, -1, n)) * mask
    weights = weights + (x @ x.mT) * mask + (x @ x.mT) * same
    return net.b(weights.softmax(-1) @ x)
