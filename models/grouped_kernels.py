"""Triton kernels of models.fused, for Hopper GPUs: rows in order of their group, each group with its own matrix.

A rows, G groups, K and N the sides of a group's matrix. Tiles are BM rows of one group by BN columns.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from models.fused import MAP_BLOCK, TILE_ROWS, most_tiles


@triton.jit
def _map_tiles(offsets, out, entries, G: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    g = tl.arange(0, GP)
    real = g < G
    start = tl.load(offsets + g - 1, mask=(g > 0) & real, other=0)
    tiles = tl.where(real, (tl.load(offsets + g, mask=real, other=0) - start + BM - 1) // BM, 0)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    earlier = (tl.cumsum(tiles, 0)[None, :] <= entry[:, None]) & real[None, :]  # groups whose tiles all come before
    group = tl.sum(earlier.to(tl.int32), 1)
    first = tl.sum(tl.where(earlier, tiles[None, :], 0), 1)
    begin = tl.sum(tl.where(g[None, :] == group[:, None], start[None, :], 0), 1)
    tl.store(out + entry, group)
    tl.store(out + entries + entry, begin + (entry - first) * BM)
    tl.store(out + 2 * entries, tl.sum(tiles, 0))


@triton.jit
def _rows_by_group(
    x, weight, y, hidden, offsets, tiles, entries, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    count, columns = tl.load(tiles + 2 * entries), tl.cdiv(N, BN)
    # one program a multiprocessor; flattened, so that a tile's loads begin while the one before is stored
    for piece in tl.range(tl.program_id(0), count * columns, tl.num_programs(0), flatten=True):
        tile, n = piece // columns, (piece % columns) * BN
        group, row = tl.load(tiles + tile), tl.load(tiles + entries + tile)
        end = tl.load(offsets + group)
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            part = weight.load([group * N + n, k]).T if TRANSPOSED else weight.load([group * K + k, n])
            total = tl.dot(x.load([row, k]), part, total)
        if RELU:
            total = tl.maximum(total, 0.0)
        if MASKED:
            total = tl.where(hidden.load([row, n]) > 0, total, 0.0)
        r, c = row + tl.arange(0, BM), n + tl.arange(0, BN)
        inside = (r < end)[:, None] & (c < N)[None, :]  # rows from end on belong to the next group
        tl.store(y + r[:, None].to(tl.int64) * N + c[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _products_of_groups(a, b, out, offsets, M, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    columns, lines = tl.cdiv(N, BN), tl.cdiv(M, BM)
    group = tl.program_id(0) // (lines * columns)
    m, n = (tl.program_id(0) // columns) % lines * BM, tl.program_id(0) % columns * BN
    start, end = tl.load(offsets + group - 1, mask=group > 0, other=0), tl.load(offsets + group)
    whole = start + (end - start) // BK * BK
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(start, whole, BK):
        total = tl.dot(a.load([k, m]).T, b.load([k, n]), total)
    if whole < end:  # what a block holds beyond the group's end is another group's, or nothing
        inside = (whole + tl.arange(0, BK) < end)[:, None]
        left, right = tl.where(inside, a.load([whole, m]), 0.0), tl.where(inside, b.load([whole, n]), 0.0)
        total = tl.dot(left.T, right, total)
    r, c = m + tl.arange(0, BM), n + tl.arange(0, BN)
    place = out + (group.to(tl.int64) * M + r[:, None]) * N + c[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(r < M)[:, None] & (c < N)[None, :])


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, programs: int, *args: Any, **options: int) -> None:
    """So many programs of a kernel. Triton looks at each argument of a call anew, which takes the host longer than a
    small product takes the GPU: here that is done once for arguments of one kind."""
    key = (kernel.__name__, torch.cuda.current_device(), *map(_kind, args))
    if key in _compiled:
        _compiled[key][(programs, 1, 1)](*args)
    else:
        _compiled[key] = kernel[(programs, 1, 1)](*args, **options)


def _kind(arg: Any) -> Any:
    """What Triton compiles another kernel for, or finer."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16
    return (arg.base.dtype, *arg.block_shape) if isinstance(arg, TensorDescriptor) else arg


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def map_tiles(offsets: Tensor, num_rows: int) -> Tensor:
    """(3, n) int32: the group of each tile of BM rows, its first row, and, in [2, 0], how many tiles there are."""
    groups, entries = len(offsets), most_tiles(len(offsets), num_rows)
    out, padded = torch.empty(3, entries, dtype=torch.int32, device=offsets.device), triton.next_power_of_2(groups)
    _launch(_map_tiles, entries // MAP_BLOCK, offsets, out, entries, groups, padded, TILE_ROWS, MAP_BLOCK)
    return out


def rows_by_group(
    x: Tensor, weight: Tensor, offsets: Tensor, tiles: Tensor, transposed: bool, relu: bool, hidden: Tensor | None
) -> Tensor:
    """See models.fused. Blocks of 128 x 256 x 64: the best of 35 on an H200 at d 512 and 1,024, E 64 and 128."""
    (num_rows, k), n = x.shape, weight.shape[1 if transposed else 2]
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    bm, bn, bk = TILE_ROWS, 256, 64
    read = TensorDescriptor.from_tensor(x, [bm, bk])
    part = TensorDescriptor.from_tensor(weight.view(-1, weight.shape[2]), [bn, bk] if transposed else [bk, bn])
    looked_at = read if hidden is None else TensorDescriptor.from_tensor(hidden, [bm, bn])
    most = (triton.cdiv(num_rows, bm) + len(offsets)) * triton.cdiv(n, bn)
    _launch(
        _rows_by_group, min(most, _multiprocessors(x.device)),
        read, part, y, looked_at, offsets, tiles, tiles.shape[1], n, k,
        bm, bn, bk, transposed, relu, hidden is not None, num_warps=8, num_stages=3,
    )  # fmt: skip
    return y


def products_of_groups(a: Tensor, b: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """See models.fused. Blocks of 128 x 128 x 32: the best of 16 on an H200."""
    m, n, groups = a.shape[1], b.shape[1], len(offsets)
    out = torch.empty(groups, m, n, dtype=dtype, device=a.device)
    bm, bn, bk = 128, 128, 32
    left, right = TensorDescriptor.from_tensor(a, [bk, bm]), TensorDescriptor.from_tensor(b, [bk, bn])
    programs = groups * triton.cdiv(m, bm) * triton.cdiv(n, bn)
    _launch(_products_of_groups, programs, left, right, out, offsets, m, n, bm, bn, bk, num_warps=4, num_stages=5)
    return out
