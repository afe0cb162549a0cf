"""Experts: parameters and arithmetic, on rows that are already in order of their expert.

E experts, A rows, D width, F hidden width
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "swiglu": F.silu}


class Experts(nn.Module):
    """E independent FFNs: act(x W_in) W_out, with W_gate for swiglu: (silu(x W_gate) * (x W_in)) W_out. No biases.

    Raises ValueError for an unknown activation.
    """

    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"model.activation must be one of {', '.join(ACTIVATIONS)}; got {activation}")
        self.num_experts, self.activation = num_experts, ACTIVATIONS[activation]
        self.w_in = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.w_out = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.w_gate = nn.Parameter(torch.empty(num_experts, d_model, d_ff)) if activation == "swiglu" else None

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """One grouped product for all experts. x (A, D) in order of expert, offsets (E,) int32 group ends -> (A, D)."""
        return self.ffn(x, self.w_in, self.w_gate, self.w_out, partial(grouped, offsets=offsets))

    def loop(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The same, one expert after the other: the oracle, for every dtype. Waits for the device."""
        gates = [None] * self.num_experts if self.w_gate is None else self.w_gate.unbind(0)
        weights = zip(self.w_in.unbind(0), gates, self.w_out.unbind(0))
        sizes = torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist()
        return torch.cat([self.ffn(rows, *weight) for rows, weight in zip(x.split(sizes), weights)])

    def dense(self, x: Tensor) -> Tensor:
        """Expert 0 on every row, as a plain FFN. x (..., D) -> (..., D)."""
        return self.ffn(x, self.w_in[0], None if self.w_gate is None else self.w_gate[0], self.w_out[0])

    def ffn(self, x: Tensor, w_in: Tensor, w_gate: Tensor | None, w_out: Tensor, product=torch.matmul) -> Tensor:
        inner = product(x, w_in)
        inner = self.activation(inner) if w_gate is None else self.activation(product(x, w_gate)) * inner
        return product(inner, w_out)


def grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of group e times weight[e], in autocast's type where that is on. x (A, K), weight (E, K, N) -> (A, N)."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return F.grouped_mm(x, weight, offs=offsets)
