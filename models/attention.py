"""Causal self-attention. B batch, S sequence, D width, H heads"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Multi-head causal self-attention, no biases. rotary: rotate queries and keys (Su et al., arXiv 2104.09864)."""

    def __init__(self, d_model: int, num_heads: int, rotary: bool):
        super().__init__()
        self.num_heads, self.rotary = num_heads, rotary
        self.qkv = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.out = nn.Parameter(torch.empty(d_model, d_model))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, S, D) -> (B, S, D). mask (B, 1, S, S) bool, True where a query may look; None for plain causal."""
        batch, length, width = x.shape
        q, k, v = (x @ self.qkv.T).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, S, D/H)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2).reshape(batch, length, width) @ self.out.T


def rotate(x: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of each head by position * 10000^(-2i/D). x (..., S, D)."""
    length, width = x.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequency  # (S, D/2)
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.chunk(2, -1)  # the products are in float32, whatever x is
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)
