"""Attention: causal or masked among a text's own tokens, and from a decoder's to its encoder's.

B batch, S positions, R positions of the source, D width, H heads
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.experts import with_bias


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, d_model: int, num_heads: int, biases: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.out = nn.Parameter(torch.empty(d_model, d_model))
        self.qkv_bias = nn.Parameter(torch.zeros(3 * d_model)) if biases else None
        self.out_bias = nn.Parameter(torch.zeros(d_model)) if biases else None

    def forward(self, x: Tensor, rotation: Tensor | None, mask: Tensor | None) -> Tensor:
        """x (B, S, D) -> (B, S, D). rotation: of queries and keys, see rotate; None for none.

        mask (B, 1, S, S) bool, True where a query may look; None for plain causal.
        """
        batch, length, width = x.shape
        qkv = linear(x, self.qkv, self.qkv_bias).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, S, D/H)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return linear(y.transpose(1, 2).reshape(batch, length, width), self.out, self.out_bias)


class CrossAttention(nn.Module):
    """Multi-head attention of a decoder's positions to its encoder's output, without rotation."""

    def __init__(self, d_model: int, num_heads: int, biases: bool):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Parameter(torch.empty(d_model, d_model))
        self.kv = nn.Parameter(torch.empty(2 * d_model, d_model))
        self.out = nn.Parameter(torch.empty(d_model, d_model))
        self.q_bias = nn.Parameter(torch.zeros(d_model)) if biases else None
        self.kv_bias = nn.Parameter(torch.zeros(2 * d_model)) if biases else None
        self.out_bias = nn.Parameter(torch.zeros(d_model)) if biases else None

    def forward(self, x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, D), source (B, R, D) -> (B, S, D). mask (B, 1, S or 1, R) bool, True where a query may look.

        A query that may look at nothing gets zeros.
        """
        batch, length, width = x.shape
        q = linear(x, self.q, self.q_bias).view(batch, length, self.num_heads, -1).transpose(1, 2)
        kv = linear(source, self.kv, self.kv_bias).view(batch, source.shape[1], 2, self.num_heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, R, D/H)
        y = scaled_dot_product_attention(q, k, v, attn_mask=opened(mask))
        y = linear(y.transpose(1, 2).reshape(batch, length, width), self.out, self.out_bias)
        return y * mask.any(-1)[:, 0, :, None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b."""
    return with_bias(x @ weight.T, bias)


def opened(mask: Tensor) -> Tensor:
    """A query that may look at nothing looks at everything: softmax over nothing would be no number."""
    return mask | ~mask.any(-1, keepdim=True)


def document_mask(document: Tensor) -> Tensor:
    """(B, 1, S, S) bool: a query looks at itself and what stands before it in its own document."""
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]


def response_mask(document: Tensor, real: Tensor) -> Tensor:
    """(B, 1, S, S) bool: the same, but padding is seen by itself alone."""
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return document_mask(document) & (real[:, None, None] | itself)


def source_mask(query: Tensor | None, document: Tensor, real: Tensor) -> Tensor:
    """(B, 1, Q, R) bool: where queries of these documents (B, Q) look in a source, documents and real (B, R).

    query None: everywhere but on padding, (B, 1, 1, R).
    """
    keys = real[:, None, None]
    return keys if query is None else keys & (query[:, None, :, None] == document[:, None, None])


def rotary_angles(length: int, width: int) -> Tensor:
    """(2, S, W/2) cosines and sines of position * 10000^(-2i/W) for heads of width W (Su et al., arXiv 2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (i, i + W/2) of each head by their angles, in float32. x (..., S, W)."""
    cosine, sine = rotation[:, : x.shape[-2]]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)
