"""Causal self-attention. B batch, S sequence, D width, H heads"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Multi-head causal self-attention without biases."""

    def __init__(self, d_model: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.out = nn.Parameter(torch.empty(d_model, d_model))

    def forward(self, x: Tensor, rotation: Tensor | None, mask: Tensor | None) -> Tensor:
        """x (B, S, D) -> (B, S, D). rotation: of queries and keys, see rotate; None for none.

        mask (B, 1, S, S) bool, True where a query may look; None for plain causal.
        """
        batch, length, width = x.shape
        q, k, v = (x @ self.qkv.T).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, S, D/H)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2).reshape(batch, length, width) @ self.out.T


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
