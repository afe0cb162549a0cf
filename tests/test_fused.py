"""The fused path: on a CPU, where its operators are plain torch, and its kernels where they run."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from models.dispatch import dispatch, looped
from models.experts import Experts, SegmentedExperts, StackedExperts
from models.fused import Fused, map_tiles, most_tiles, products_of_groups, rows_by_group
from routers.routing import Routing, some_each

SIZES = [70, 0, 1, 130, 55]  # rows of each group
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU"))]


def draws(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(seen: Tensor, right: Tensor) -> bool:
    """Within 2e-2 of the largest value in bf16, 1e-5 in float32."""
    return bool((seen.float() - right.float()).abs().max() <= (2e-2 if seen.is_cuda else 1e-5) * right.abs().max())


def near(seen: Tensor, right: Tensor) -> bool:
    """Within 2e-2 by norm in bf16, 1e-5 in float32."""
    return bool((seen.float() - right.float()).norm() <= (2e-2 if seen.is_cuda else 1e-5) * right.float().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "n"), [(64, 96), (136, 520)])
def test_the_operators_are_products_of_each_groups_rows(device, k, n):
    offsets = torch.tensor(SIZES, device=device).cumsum(0).to(torch.int32)
    x, weight, hidden = (
        draws(256, k, device=device),
        draws(5, k, n, seed=1, device=device),
        draws(256, n, seed=2, device=device),
    )
    right = torch.cat([rows @ matrix for rows, matrix in zip(x.float().split(SIZES), weight.float())])
    tiles = map_tiles(offsets, 256)
    transposed = weight.transpose(1, 2).contiguous()
    assert close(rows_by_group(x, weight, offsets, tiles, False, False, None), right)
    assert close(rows_by_group(x, transposed, offsets, tiles, True, False, None), right)
    assert close(rows_by_group(x, weight, offsets, tiles, False, True, None), right.relu())
    assert close(rows_by_group(x, weight, offsets, tiles, False, False, hidden), right * (hidden > 0))
    outer = torch.stack([a.T @ b for a, b in zip(x.float().split(SIZES), hidden.float().split(SIZES))])
    seen = products_of_groups(x, hidden, offsets, torch.float32)
    assert close(seen, outer) and seen.dtype == torch.float32 and not seen[1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "experts",
    [
        Experts(4, 16, 24, "relu"),
        Experts(4, 16, 24, "swiglu", biases=True),
        SegmentedExperts(4, 16, 32, "gelu", 2),
        StackedExperts(4, 16, 24, "relu", 2),
    ],
    ids=["relu", "swiglu with biases", "segments", "stack"],
)
def test_fused_and_loop_agree_with_all_gradients(experts, device):
    """On a GPU in bf16 too, by the norm of each gradient."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    experts = deepcopy(experts).to(device, dtype)
    for index, parameter in enumerate(experts.parameters()):
        parameter.data = draws(*parameter.shape, seed=index, device=device) / 4
    fan_out = max(experts.segments, 2)
    choice = torch.randint(4, (1, 40, fan_out), generator=torch.Generator().manual_seed(3))
    choice[choice == 2] = 1  # an expert without a token
    choice, weight = choice.to(device), draws(1, 40, fan_out, seed=4).abs().to(device)
    seen = {}
    for path in ("fused", "loop"):
        leaves = draws(40, 16, seed=5, device=device).requires_grad_(), weight.clone().requires_grad_()
        experts.zero_grad()
        y = dispatch(leaves[0], some_each(choice, leaves[1]), None, experts, path)
        (y * draws(*y.shape, seed=6, device=device)).sum().backward()
        seen[path] = [y, *(leaf.grad for leaf in leaves), *(p.grad for p in experts.parameters())]
    assert all(near(fused, looped) for fused, looped in zip(seen["fused"], seen["loop"], strict=True))
    assert all(not p.grad[2].any() for p in experts.parameters() if p.dim() == 3)


def test_an_irregular_routing_takes_the_fused_path_too():
    experts = Experts(4, 16, 24, "relu")
    for index, parameter in enumerate(experts.parameters()):
        parameter.data = draws(*parameter.shape, seed=index)
    token, expert = torch.tensor([3, 3, 0, 7]), torch.tensor([1, 2, 2, 0])
    routing = Routing(token, expert, torch.ones(4), torch.zeros(()))
    x = draws(8, 16)
    assert close(*(dispatch(x, routing, None, experts, path) for path in ("fused", "loop")))


def test_the_compiler_finds_one_graph_with_the_gradients_of_the_loop():
    offsets = torch.tensor(SIZES).cumsum(0).to(torch.int32)
    x, w_in, w_out = draws(256, 16), draws(5, 16, 24, seed=1), draws(5, 24, 16, seed=2)

    def ffn(*leaves: Tensor) -> Tensor:
        return Fused(offsets, 256).relu_ffn(*leaves).square().sum()

    def right(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return looped(looped(x, w_in, None, offsets).relu(), w_out, None, offsets).square().sum()

    seen = []
    for function in (torch.compile(ffn, fullgraph=True, backend="aot_eager"), right):
        leaves = [each.clone().requires_grad_() for each in (x, w_in, w_out)]
        function(*leaves).backward()
        seen.append([leaf.grad for leaf in leaves])
    assert all(close(*pair) for pair in zip(*seen, strict=True))


def test_weights_keep_their_type_and_rows_take_autocasts():
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    w_in, w_out = draws(2, 16, 8).requires_grad_(), draws(2, 8, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = Fused(offsets, 8).relu_ffn(draws(8, 16), w_in, w_out)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and w_in.grad.dtype == torch.float32


def test_the_map_has_room_for_a_cut_tile_in_every_group():
    assert most_tiles(5, 256) == 64 and most_tiles(60, 640) == 128  # 2 + 5 and 5 + 60, in blocks of 64
