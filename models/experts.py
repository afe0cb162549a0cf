"""Experts: parameters and arithmetic, on rows that are already in order of their expert.

E experts, A rows, D width, F hidden width, N segments
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fused import Fused

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "swiglu": F.silu}
# (A, K) rows, (groups, K, N) weights, (groups, N) biases or None -> (A, N), each row by its group's
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Exchange = Callable[[Tensor], Tensor]  # (A, F/N) -> (A, F): to each row the segments of all its token's rows


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y + bias in y's type, which is autocast's where that is on."""
    return y if bias is None else y + bias.to(y.dtype)


class ExpertLayer(nn.Module):
    """What dispatch may rely on: num_experts, segments, and forward on rows in order of their expert."""

    num_experts: int
    segments: int = 1
    own_first_values: tuple[str, ...] = ()  # parameters that start as they are made here, not as the model draws them

    def forward(self, x: Tensor, product: Product, exchange: Exchange | None = None) -> Tensor:
        """x (A, D) in order of group -> (A, D / segments)."""
        raise TypeError(f"{type(self).__name__} is a layer of experts without a forward")

    def dense(self, x: Tensor) -> Tensor:
        """Expert 0 on every row, without dispatch. x (..., D) -> (..., D)."""
        return self(x, lambda rows, weight, bias: with_bias(rows @ weight[0], None if bias is None else bias[0]))

    def flops(self) -> int:
        """Of one expert's matrix products in a forward pass of one row."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() > 2) // self.num_experts


class Experts(ExpertLayer):
    """E independent FFNs: act(x W_in) W_out, with W_gate for swiglu: (silu(x W_gate) * (x W_in)) W_out.

    biases: b of the same name is added to each product. Raises ValueError for an unknown activation.
    """

    own_first_values = ("b_in", "b_out", "b_gate")

    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation: str, biases: bool = False):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"model.activation must be one of {', '.join(ACTIVATIONS)}; got {activation}")
        self.num_experts, self.activation = num_experts, ACTIVATIONS[activation]
        self.w_in = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.w_out = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.w_gate = nn.Parameter(torch.empty(num_experts, d_model, d_ff)) if activation == "swiglu" else None
        gated = biases and activation == "swiglu"
        self.b_in = nn.Parameter(torch.zeros(num_experts, d_ff)) if biases else None
        self.b_out = nn.Parameter(torch.zeros(num_experts, d_model)) if biases else None
        self.b_gate = nn.Parameter(torch.zeros(num_experts, d_ff)) if gated else None

    def forward(self, x: Tensor, product: Product, exchange: Exchange | None = None) -> Tensor:
        return self.ffn(x, self.w_in, self.w_gate, product)

    def ffn(self, x: Tensor, w_in: Tensor, w_gate: Tensor | None, product: Product) -> Tensor:
        """Both products, in one pass where the path can."""
        if isinstance(product, Fused) and self.activation is F.relu and w_gate is None and self.b_in is None:
            return product.relu_ffn(x, w_in, self.w_out)
        return product(self.inner(x, w_in, w_gate, product), self.w_out, self.b_out)

    def inner(self, x: Tensor, w_in: Tensor, w_gate: Tensor | None, product: Product) -> Tensor:
        """The hidden values, (A, F); of experts in segments, (A, F / N)."""
        b_in, b_gate = (None if b is None else b.view(len(w_in), -1) for b in (self.b_in, self.b_gate))
        inner = product(x, w_in, b_in)
        return self.activation(inner) if w_gate is None else self.activation(product(x, w_gate, b_gate)) * inner


class SegmentedExperts(Experts):
    """Both matrices cut into N segments, each from an expert of its own (Roller et al., arXiv 2106.04426, section 3.2).

    v = act([x A_1^{k_1}, ..., x A_N^{k_N}]), y = [v B_1^{k_1}, ..., v B_N^{k_N}]; A (D, F/N), B (F, D/N). Parameters
    and FLOPs are those of E experts and of one FFN. Raises ValueError if N does not divide D and F into multiples of 8.
    """

    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation: str, segments: int, biases: bool = False):
        super().__init__(num_experts, d_model, d_ff, activation, biases)
        if segments < 1 or d_model % (8 * segments) or d_ff % (8 * segments):
            rule = "(one to each table) must be at least 1 and divide model.d_model and model.d_ff into multiples of 8"
            raise ValueError(f"experts.segments {rule}; got {segments}, {d_model} and {d_ff}")
        self.segments = segments
        for name, parameter in [(n, p) for n, p in self.named_parameters() if p.dim() > 2]:  # biases are cut in use
            rows, columns = parameter.shape[1:]
            setattr(self, name, nn.Parameter(torch.empty(num_experts, segments, rows, columns // segments)))

    def forward(self, x: Tensor, product: Product, exchange: Exchange | None = None) -> Tensor:
        w_in, w_out = self.w_in.flatten(0, 1), self.w_out.flatten(0, 1)
        inner = self.inner(x, w_in, None if self.w_gate is None else self.w_gate.flatten(0, 1), product)
        b_out = None if self.b_out is None else self.b_out.view(len(w_out), -1)
        return product(inner if exchange is None else exchange(inner), w_out, b_out)

    def dense(self, x: Tensor) -> Tensor:
        def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            whole = torch.cat([rows @ part for part in weight[: self.segments]], -1)
            return with_bias(whole, None if bias is None else bias[: self.segments].flatten())

        return self(x, product)


class StackedExperts(ExpertLayer):
    """Stacks of L residual sub-layers x + ffn(norm(x)), W_out from zero (Lewis et al., arXiv 2103.16716).

    Returns what the stack adds to its input. norm is LayerNorm without bias, its gain each expert's own. Raises
    ValueError without a sub-layer.
    """

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, activation: str, sublayers: int, biases: bool = False
    ):
        super().__init__()
        if sublayers < 1:
            raise ValueError(f"experts.sublayers must be at least 1; got {sublayers}")
        self.num_experts = num_experts
        sizes = num_experts, d_model, d_ff, activation, biases
        self.sublayers = nn.ModuleList(Sublayer(*sizes) for _ in range(sublayers))

    def forward(self, x: Tensor, product: Product, exchange: Exchange | None = None) -> Tensor:
        y = x
        for sublayer in self.sublayers:
            y = y + sublayer(y, product)
        return y - x


class Sublayer(Experts):
    own_first_values = (*Experts.own_first_values, "w_out", "gain")

    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation: str, biases: bool):
        super().__init__(num_experts, d_model, d_ff, activation, biases)
        self.gain = nn.Parameter(torch.ones(num_experts, d_model))
        nn.init.zeros_(self.w_out)

    def forward(self, x: Tensor, product: Product, exchange: Exchange | None = None) -> Tensor:
        gain = self.gain[:, :, None]  # onto the matrices that read the normed rows: rows know no expert here
        w_gate = None if self.w_gate is None else gain * self.w_gate
        return self.ffn(F.layer_norm(x, x.shape[-1:]), gain * self.w_in, w_gate, product)
