"""Top-k and GShard on scores given by hand."""

import pytest
import torch
from conftest import LENGTH, make_site, some_batch
from test_learned import one_row, routed, some_scores

from data.randomness import uniform
from routers.gshard import GShard
from routers.switch import Switch
from routers.top_k import TopK


def top_k(site: dict, **changes) -> TopK:
    options = {"k": 2, "score": "softmax", "renormalise": True, "load_balance_coef": 1.0, "z_loss_coef": 0.0}
    return TopK(make_site(**site), **options | changes)


def gshard(site: dict, capacity: float | None = None, eval_capacity: float | None = None) -> GShard:
    return GShard(make_site(**site), 1.0, capacity, eval_capacity)


# top-k


def test_top_ks_weights_by_hand():
    site, batch = one_row(1, num_experts=3)
    scores = torch.tensor([0.5, 0.2, 0.3]).log().view(1, 1, 3)
    assert routed(top_k(site), scores, batch).expert.tolist() == [0, 2]
    assert routed(top_k(site), scores, batch).weight.tolist() == pytest.approx([5 / 8, 3 / 8])
    assert routed(top_k(site, renormalise=False), scores, batch).weight.tolist() == pytest.approx([0.5, 0.3])
    odds = torch.tensor([0.4 / 0.6, 0.8 / 0.2, 0.6 / 0.4]).log().view(1, 1, 3)
    sigmoid = {"score": "sigmoid"}
    assert routed(top_k(site, **sigmoid), odds, batch).expert.tolist() == [1, 2]
    assert routed(top_k(site, **sigmoid), odds, batch).weight.tolist() == pytest.approx([8 / 14, 6 / 14])
    assert routed(top_k(site, **sigmoid, renormalise=False), odds, batch).weight.tolist() == pytest.approx([0.8, 0.6])


def test_top_k_tells_scores_apart_whose_sigmoids_are_equal():
    site, batch = one_row(1)
    scores = torch.tensor([30.0, 20.0, 40.0, 50.0]).view(1, 1, 4)  # all 1 in float32
    assert routed(top_k(site, score="sigmoid"), scores, batch).expert.tolist() == [3, 2]


def test_top_ks_loss_by_hand_over_all_choices():
    # experts 0, 1 and 2, 1: f = 1/4, 2/4, 1/4; P = 0.3, 0.3, 0.4
    site, batch = one_row(2, num_experts=3)
    shares = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]])
    expected = 3 * (0.3 / 4 + 0.3 / 2 + 0.4 / 4)
    assert routed(top_k(site), shares.log(), batch).aux_loss.item() == pytest.approx(expected)
    # sigmoids of 0.8 times the shares, which as shares of their sum are the same again
    odds = (0.8 * shares / (1 - 0.8 * shares)).log()
    assert routed(top_k(site, score="sigmoid"), odds, batch).aux_loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_top_ks_loss_is_one_at_uniform_and_e_over_k_at_collapse(score):
    site, batch = one_row(4)
    rolling = torch.stack([torch.tensor([1.0, 1.0, 0.0, 0.0]).roll(i) for i in range(4)])[None]
    assert routed(top_k(site, score=score), rolling, batch).aux_loss.item() == pytest.approx(1)
    collapsed = torch.tensor([0.0, 0.0, -90.0, -90.0]).expand(1, 4, 4)
    assert routed(top_k(site, score=score), collapsed, batch).aux_loss.item() == pytest.approx(2)


def test_top_1_is_switch():
    batch, scores = some_batch(padding=3), some_scores(4, LENGTH)
    one = top_k({}, k=1, renormalise=False, z_loss_coef=0.1)
    other = Switch(make_site(), "hidden", "probability", None, None, 1.0, 0.1, 0.0)
    assert torch.equal(one.gate, other.gate)  # the same first values: runs of one seed are pairs
    for mine, theirs in zip(routed(one, scores, batch)[:4], routed(other, scores, batch)[:4], strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "router.renormalise needs router.k above 1, .*; got k = 1"),
        ({"k": 5}, r"router.k must be in 1..num_experts = 4; got 5"),
        ({"k": 0}, "router.k must"),
        ({"score": "tanh"}, "router.score must be one of softmax, sigmoid; got tanh"),
        ({"load_balance_coef": -1.0}, "router.load_balance_coef must not be negative; got -1.0"),
        ({"z_loss_coef": -1.0}, "router.z_loss_coef must not be negative"),
    ],
)
def test_top_k_refuses_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        top_k({}, **options)


# GShard


def test_gshards_weights_and_loss_by_hand():
    # p = 0.6, 0.3, 0.1 and 0.2, 0.3, 0.5: firsts 0 and 2, so f = 1/2, 0, 1/2 and P = 0.4, 0.3, 0.3
    site, batch = one_row(2, num_experts=3)
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]]).log()
    routing = routed(gshard(site).eval(), scores, batch)
    assert routing.expert.tolist() == [0, 1, 2, 1]
    assert routing.weight.tolist() == pytest.approx([2 / 3, 1 / 3, 5 / 8, 3 / 8])
    assert routing.aux_loss.item() == pytest.approx(3 * (0.4 / 2 + 0.3 / 2))


def test_gshard_keeps_the_second_expert_in_training_as_often_as_twice_its_weight():
    rows, length = 50, 80
    batch = some_batch(rows, length)
    router = gshard({"sequence_length": length})
    for share in (0.05, 0.2, 0.4):
        scores = torch.tensor([1 - share, share, 1e-9, 1e-9]).log().expand(rows, length, -1)
        weight = routed(router, scores, batch).weight.view(-1, 2)
        torch.testing.assert_close(weight[:, 0], torch.full((4000,), 1 - share))  # with and without the second
        kept = weight[:, 1] > 0
        assert float(kept.double().mean()) == pytest.approx(2 * share, abs=4 * 0.5 / 4000**0.5)
        torch.testing.assert_close(weight[kept, 1], torch.full((int(kept.sum()),), share))
        assert bool((routed(router.eval(), scores, batch).weight > 0).all())
        router.train()
    even = torch.tensor([0.0, 0.0, -9.0, -9.0]).expand(rows, length, -1)
    assert bool((routed(router, even, batch).weight > 0).all())  # 2 p_2 = 1: always


def test_gshards_draw_comes_from_key_layer_and_position():
    batch, scores = some_batch(), some_scores(4, LENGTH)
    weight = routed(gshard({}), scores, batch).weight.view(4, LENGTH, 2)
    best = scores.softmax(-1).sort(-1, descending=True).values
    second = best[..., 1] / (best[..., 0] + best[..., 1])
    draw = uniform(batch.tokens.key[:, None], 1, batch.tokens.position, 0)
    assert torch.equal(weight[..., 1] > 0, draw < 2 * second)
    assert 0 < int((weight[..., 1] > 0).sum()) < 48


def test_gshards_first_choices_take_room_before_second_ones():
    # 4 tokens, 2 experts, factor 0.75: room for 3 choices each. Firsts 0, 0, 1, 0; seconds 1, 1, 0, 1
    site, batch = one_row(4, num_experts=2)
    scores = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    router = gshard(site, None, 0.75).eval()
    kept = routed(router, scores, batch).weight.view(4, 2) > 0
    # expert 0: three firsts fill it. Expert 1: one first, then the seconds of tokens 0 and 1
    assert kept.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    assert not router.leaks & {"future in training", "mates in training"}
    assert router.leaks == {"future in evaluation", "mates in evaluation"}
    assert bool((routed(gshard(site, 0.75, None).eval(), scores, batch).weight > 0).all())


def test_a_second_choice_that_gshard_drops_by_chance_takes_no_room():
    rows, length = 1, 200
    site, batch = one_row(length, num_experts=2)
    scores = torch.tensor([0.9, 0.1]).log().expand(rows, length, -1)
    kept = routed(gshard(site, 1.0), scores, batch).weight.view(-1, 2) > 0  # room for 200 each
    free = routed(gshard(site), scores, batch).weight.view(-1, 2) > 0
    assert torch.equal(kept, free)
    tight = routed(gshard(site, 0.1), scores, batch).weight.view(-1, 2) > 0  # room for 20 each
    drawn = free[:, 1].nonzero().flatten()
    assert len(drawn) > 20
    assert torch.equal(tight[:, 1].nonzero().flatten(), drawn[:20])
    assert torch.equal(tight[:, 0].nonzero().flatten(), torch.arange(20))


def test_gshard_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match="num_experts must be at least 2 for two experts a token; got 1"):
        gshard({"num_experts": 1})
    with pytest.raises(ValueError, match="router.capacity_factor must be above 0, or null for no limit; got 0"):
        gshard({}, 0.0)
    with pytest.raises(ValueError, match="router.eval_capacity_factor must be above 0"):
        gshard({}, None, -1.0)
    with pytest.raises(ValueError, match="router.load_balance_coef must not be negative"):
        GShard(make_site(), -0.1, None, None)
