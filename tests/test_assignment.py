import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from data.randomness import generator
from routers.assignment import balanced_assignment, upper_bound


def exact(scores: np.ndarray) -> float:
    """The best balanced value by scipy: c places an expert that must be filled, one more that may be."""
    tokens, experts = scores.shape
    least, more = divmod(tokens, experts)
    places = np.concatenate([np.repeat(scores, least, 1), scores], 1) if more else np.repeat(scores, least, 1)
    if more:  # rows that fill the places left free may not fill those that must be taken
        free = np.full((experts - more, places.shape[1]), -1e9)
        free[:, experts * least :] = 0
        places = np.concatenate([places, free])
    rows, columns = linear_sum_assignment(places, maximize=True)
    return float(places[rows, columns][rows < tokens].sum())


def drawn(kind: str, tokens: int, experts: int) -> torch.Tensor:
    scores = torch.randn(tokens, experts, generator=generator(kind, tokens, experts), dtype=torch.float64)
    if kind == "ties":
        return scores.round()
    if kind == "identical rows":
        return scores[:1].expand(tokens, experts).clone()
    if kind == "constant":
        return torch.zeros(tokens, experts)
    return scores * 1e3 + 1e5 * torch.arange(experts) if kind == "far apart" else scores


@pytest.mark.parametrize("kind", ["gaussian", "ties", "identical rows", "constant", "far apart"])
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (8, 4), (7, 3), (100, 7), (300, 1), (130, 64), (511, 16), (512, 32)])
def test_the_value_is_scipys_and_the_loads_are_balanced(kind, shape):
    scores = drawn(kind, *shape)
    solved = balanced_assignment(scores)
    load = torch.bincount(solved.expert, minlength=shape[1])
    assert len(solved.expert) == shape[0]
    assert load.max() - load.min() <= (shape[0] % shape[1] > 0)
    best = exact(scores.numpy())
    assert solved.value == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert solved.value == pytest.approx(float(scores.gather(1, solved.expert[:, None]).sum()), rel=1e-9, abs=1e-9)
    assert solved.gap <= 1e-6


def test_the_gap_is_certified_at_4096_tokens_and_64_experts():
    solved = balanced_assignment(torch.randn(4096, 64, generator=generator("gap")))
    assert solved.gap <= 0.001
    assert torch.equal(torch.bincount(solved.expert), torch.full((64,), 64))


def test_the_certificate_holds_for_any_prices_and_tells_a_bad_assignment():
    scores = drawn("gaussian", 50, 4).numpy()
    best = exact(scores)
    for seed in range(20):
        prices = np.random.default_rng(seed).normal(size=4) * 2
        assert upper_bound(scores, prices) >= best - 1e-9
    # one expert of two takes two of three tokens: prices (0, 0) give 3 + 2 + 5 = 10, and the best is 3 + 2 + 5
    assert upper_bound(np.array([[3.0, 1.0], [2.0, 0.0], [1.0, 5.0]]), np.zeros(2)) == 10
    assert exact(np.array([[3.0, 1.0], [2.0, 0.0], [1.0, 5.0]])) == 10
    # all three want expert 0; it may have two of them: 3 + 2 + 0, the bound at price 1 is 2 + 1 + 0 + 1 + 1
    crowded = np.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    assert exact(crowded) == 5 == upper_bound(crowded, np.array([1.0, 0.0]))


def test_prices_only_save_time():
    scores = drawn("gaussian", 96, 5)
    assert balanced_assignment(scores, price_steps=0).value == pytest.approx(balanced_assignment(scores).value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_stop(bad):
    scores = torch.zeros(8, 2)
    scores[3, 1] = bad
    with pytest.raises(FloatingPointError, match="finite"):
        balanced_assignment(scores)


def test_scores_that_differ_by_rounding_alone_end():
    rows = [[3, 9, 0], [9, 3, 6], [0, 3, 6], [1e13, 6, 0], [3, 9, 6], [6, 3, 0]]
    scores = torch.tensor(rows, dtype=torch.float64) * 1e-13
    assert balanced_assignment(scores).value == pytest.approx(exact(scores.numpy()), rel=1e-9)
