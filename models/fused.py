"""Grouped products with the activation folded in, and their gradients: the path of a Hopper GPU.

A rows in order of their group, G groups, K and N the sides of a group's matrix, D width, F hidden width. The operators
are opaque to the compiler: Triton kernels on a GPU, and on a CPU the same in plain torch, which the tests hold against
the loop.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake
from torch.nn.functional import embedding

LIBRARY = Library("switchyard", "FRAGMENT")
TILE_ROWS = 128  # a group's last tile is cut
MAP_BLOCK = 64  # entries of the map of tiles that one program makes


def most_tiles(groups: int, num_rows: int) -> int:
    """Entries of the map of tiles: as many as there can be, rounded up to whole blocks."""
    return -(-(-(-num_rows // TILE_ROWS) + groups) // MAP_BLOCK) * MAP_BLOCK


def _split(x: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    return x.split(torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist())


def _map_tiles(offsets: Tensor, num_rows: int) -> Tensor:
    """Which tile of rows belongs to which group, for rows_by_group. offsets (G,) int32: where each group ends."""
    from models import grouped_kernels  # needs Triton, which comes with torch for GPUs alone

    return grouped_kernels.map_tiles(offsets, num_rows)


def _rows_by_group(
    x: Tensor, weight: Tensor, offsets: Tensor, tiles: Tensor, transposed: bool, relu: bool, hidden: Tensor | None
) -> Tensor:
    """x (A, K), each row times its group's matrix: weight (G, K, N), or (G, N, K) if transposed -> (A, N) in x's type.

    relu: of the result. hidden (A, N): 0 where it is not above 0, the gradient of a relu.
    """
    from models import grouped_kernels

    return grouped_kernels.rows_by_group(x, weight, offsets, tiles, transposed, relu, hidden)


def _products_of_groups(a: Tensor, b: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b over each group's rows: a (A, M), b (A, N) -> (G, M, N) in this type, 0 for a group without rows."""
    from models import grouped_kernels

    return grouped_kernels.products_of_groups(a, b, offsets, dtype)


def _map_tiles_plainly(offsets: Tensor, num_rows: int) -> Tensor:
    return offsets.new_empty(3, 0)


def _rows_by_group_plainly(
    x: Tensor, weight: Tensor, offsets: Tensor, tiles: Tensor, transposed: bool, relu: bool, hidden: Tensor | None
) -> Tensor:
    matrices = weight.transpose(1, 2) if transposed else weight
    y = torch.cat([rows @ matrix for rows, matrix in zip(_split(x, offsets), matrices)])
    y = y.relu() if relu else y
    return y if hidden is None else y * (hidden > 0)


def _products_of_groups_plainly(a: Tensor, b: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    parts = zip(_split(a, offsets), _split(b, offsets))
    return torch.stack([left.T.float() @ right.float() for left, right in parts]).to(dtype)


def _shape_of_map_tiles(offsets: Tensor, num_rows: int) -> Tensor:
    return offsets.new_empty(3, 0 if offsets.device.type == "cpu" else most_tiles(len(offsets), num_rows))


def _shape_of_rows_by_group(
    x: Tensor, weight: Tensor, offsets: Tensor, tiles: Tensor, transposed: bool, relu: bool, hidden: Tensor | None
) -> Tensor:
    return x.new_empty(len(x), weight.shape[1 if transposed else 2])


def _shape_of_products_of_groups(a: Tensor, b: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(len(offsets), a.shape[1], b.shape[1], dtype=dtype)


def operator(on_gpu: Callable[..., Tensor], on_cpu: Callable[..., Tensor], shape: Callable[..., Tensor]) -> Any:
    """An operator that the compiler leaves as it is. torch's custom_op does the same for five times the host's time."""
    name = on_gpu.__name__.removeprefix("_")
    LIBRARY.define(name + infer_schema(on_gpu, mutates_args=()))
    LIBRARY.impl(name, on_gpu, "CUDA")
    LIBRARY.impl(name, on_cpu, "CPU")
    register_fake(f"switchyard::{name}", shape, lib=LIBRARY)
    return getattr(torch.ops.switchyard, name).default


map_tiles = operator(_map_tiles, _map_tiles_plainly, _shape_of_map_tiles)
rows_by_group = operator(_rows_by_group, _rows_by_group_plainly, _shape_of_rows_by_group)
products_of_groups = operator(_products_of_groups, _products_of_groups_plainly, _shape_of_products_of_groups)


class Fused:
    """The product of models.experts over rows in order of group. offsets (G,) int32; tiles are shared by its calls."""

    def __init__(self, offsets: Tensor, num_rows: int):
        self.offsets, self.tiles = offsets, map_tiles(offsets, num_rows)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (A, K), weight (G, K, N), bias (G, N) or None -> (A, N), in autocast's type where that is on."""
        y: Tensor = _Product.apply(lowered(x), weight, self.offsets, self.tiles)
        if bias is None:
            return y
        rows = torch.arange(len(x), dtype=self.offsets.dtype, device=x.device)
        group = torch.searchsorted(self.offsets, rows, right=True)
        return y + embedding(group, bias).to(y.dtype)

    def relu_ffn(self, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        """relu(x W_in) W_out, of which x and the hidden rows are saved. x (A, D), w_in (G, D, F), w_out (G, F, D)."""
        return _ReluFFN.apply(lowered(x), w_in, w_out, self.offsets, self.tiles)


def lowered(x: Tensor) -> Tensor:
    """x in the type that autocast wants, if it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Product(torch.autograd.Function):
    """Weights in any type: they are rounded to x's here, and get their gradient in their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, tiles: Tensor) -> Tensor:
        rounded, ctx.dtype = weight.to(x.dtype), weight.dtype
        ctx.save_for_backward(x, rounded, offsets, tiles)
        return rows_by_group(x, rounded, offsets, tiles, False, False, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets, tiles = ctx.saved_tensors
        dy = dy.contiguous()
        dx = rows_by_group(dy, weight, offsets, tiles, True, False, None) if ctx.needs_input_grad[0] else None
        dw = products_of_groups(x, dy, offsets, ctx.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


class _ReluFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, offsets: Tensor, tiles: Tensor) -> Tensor:
        first, second, ctx.dtype = w_in.to(x.dtype), w_out.to(x.dtype), w_in.dtype
        hidden = rows_by_group(x, first, offsets, tiles, False, True, None)
        ctx.save_for_backward(x, hidden, first, second, offsets, tiles)
        return rows_by_group(hidden, second, offsets, tiles, False, False, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, w_in, w_out, offsets, tiles = ctx.saved_tensors
        dy = dy.contiguous()
        inner, learns = rows_by_group(dy, w_out, offsets, tiles, True, False, hidden), ctx.needs_input_grad
        dw_out = products_of_groups(hidden, dy, offsets, ctx.dtype) if learns[2] else None
        dw_in = products_of_groups(x, inner, offsets, ctx.dtype) if learns[1] else None
        dx = rows_by_group(inner, w_in, offsets, tiles, True, False, None) if learns[0] else None
        return dx, dw_in, dw_out, None, None
