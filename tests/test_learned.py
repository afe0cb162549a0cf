"""Every learned, choosing or control router on scores given by hand; loss-free balancing; the controls."""

from collections import Counter

import pytest
import torch
from conftest import EXPERTS, LENGTH, WIDTH, check, make_site, router_of, some_batch

from data.batches import Batch
from data.randomness import generator
from routers.frozen_random import FrozenRandom
from routers.gates import gate_parameter
from routers.loss_free import LossFree
from routers.random_each_step import RandomEachStep
from routers.routing import Router, Routing, load_of

LEARNED = ["top_k_softmax", "top_k_sigmoid", "gshard", "loss_free", "loss_free_top_k", "expert_choice", "s_base"]
CONTROLS = ["random_each_step", "frozen_random"]


def seeing(router: Router, scores: torch.Tensor) -> torch.Tensor:
    """The hidden (B, S, D) of which the router's gate makes these scores (B, S, E)."""
    gate = router.get_parameter("gate") if "gate" in dict(router.named_parameters()) else router.get_buffer("gate")
    with torch.no_grad():
        gate.copy_(torch.eye(*gate.shape))
    return torch.nn.functional.pad(scores, (0, WIDTH - scores.shape[-1]))


def routed(router: Router, scores: torch.Tensor, batch: Batch) -> Routing:
    return router(seeing(router, scores), batch.tokens)


def some_scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, EXPERTS, generator=generator(seed, "scores"))


def one_row(length: int, **site) -> tuple[dict, Batch]:
    return {"routing_group": 1, "sequence_length": length} | site, some_batch(1, length)


# all of them


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "tied", "saturated", "all low", "some"])
def test_gradients_are_finite_and_reach_the_gate(name, training, kind):
    router, batch = router_of(name, make_site()).train(training), some_batch(padding=5)
    scores = {
        "uniform": torch.zeros(4, LENGTH, EXPERTS),
        "tied": torch.tensor([1.0, 1.0, -1.0, -1.0]).expand(4, LENGTH, -1),
        "saturated": 1e4 * some_scores(4, LENGTH).sign(),
        "all low": -1e3 - some_scores(4, LENGTH).abs(),
        "some": some_scores(4, LENGTH),
    }[kind]
    hidden = seeing(router, scores).requires_grad_()
    routing = router(hidden, batch.tokens)
    check(routing, 48, EXPERTS)
    assert bool((routing.weight[~batch.tokens.real.flatten()[routing.token]] == 0).all())
    draws = torch.randn(len(routing.weight), generator=generator("draws"))
    grads = torch.autograd.grad(
        (routing.weight * draws).sum() + routing.aux_loss, [hidden, router.get_parameter("gate")]
    )
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    if kind == "some":
        assert all(float(grad.abs().max()) > 1e-3 for grad in grads)
        assert float(grads[0][~batch.tokens.real].abs().max()) == 0


@pytest.mark.parametrize("name", LEARNED)
def test_scores_stay_in_float32_under_autocast_and_in_float64_where_the_model_is(name):
    router, batch = router_of(name, make_site()), some_batch()
    scores = some_scores(4, LENGTH) * 1e-3 + 1  # bf16 would tie them
    plain = routed(router, scores, batch)
    with torch.autocast("cpu", torch.bfloat16):
        again = routed(router, scores, batch)
    assert torch.equal(plain.expert, again.expert)
    assert torch.equal(plain.weight, again.weight)
    double = routed(router.double(), scores.double(), batch)
    assert double.weight.dtype == double.aux_loss.dtype == torch.float64
    assert all(value.dtype != torch.float32 for value in double.report.values() if name != "expert_choice")
    torch.testing.assert_close(double.weight.float(), plain.weight)


@pytest.mark.parametrize("name", [*LEARNED, *CONTROLS])
def test_padding_moves_no_choice_no_weight_and_no_loss(name):
    router, batch = router_of(name, make_site()), some_batch(padding=5)
    scores = some_scores(4, LENGTH)
    real = batch.tokens.real
    if name == "random_each_step":
        routings = [router(scores, batch.tokens) for _ in range(2)]
    else:
        routings = [routed(router, scores.where(real[..., None], fill), batch) for fill in (-50.0, 50.0)]
    kept = [r.weight > 0 for r in routings]
    assert torch.equal(routings[0].token[kept[0]], routings[1].token[kept[1]])
    assert torch.equal(routings[0].expert[kept[0]], routings[1].expert[kept[1]])
    assert torch.equal(routings[0].weight[kept[0]], routings[1].weight[kept[1]])
    assert torch.equal(routings[0].aux_loss, routings[1].aux_loss)
    assert routings[0].report == routings[1].report


@pytest.mark.parametrize("name", ["top_k_softmax", "top_k_sigmoid", "gshard", "loss_free", "loss_free_top_k"])
def test_of_equal_scores_the_lowest_expert_is_taken(name):
    router = router_of(name, make_site(num_experts=16)).eval()
    scores = torch.zeros(4, LENGTH, 16)
    scores[..., 7:] = 1.0  # a sort that is not stable shuffles sixteen
    k = router.experts_per_token
    expert = routed(router, scores, some_batch()).expert.view(-1, k)
    assert torch.equal(expert, torch.arange(7, 7 + k).expand(48, k))


def test_as_many_assignments_a_token_as_flops_are_counted_for():
    batch = some_batch()
    for name in [*LEARNED, *CONTROLS]:
        router = router_of(name, make_site())
        for training in (True, False):
            routing = router.train(training)(some_scores(4, LENGTH).repeat(1, 1, 4), batch.tokens)
            assert len(routing.token) == 48 * router.experts_per_token, name
        product = 2 * WIDTH * EXPERTS
        learns, fixed = {"random_each_step": (0, 0), "frozen_random": (0, product)}.get(name, (product, 0))
        assert (router.forward_flops, router.fixed_flops) == (learns, fixed)


# loss-free balancing


def test_loss_frees_bias_chooses_but_never_weighs():
    # sigmoids 0.8, 0.6, 0.5 and a bias of 0.25 on expert 2: 0.8, 0.6, 0.75, so experts 0 and 2
    site, batch = one_row(1, num_experts=3)
    odds = torch.tensor([0.8 / 0.2, 0.6 / 0.4, 1.0]).log().view(1, 1, 3)
    for k, before, after, weight in ((1, [0], [0], [0.8]), (2, [0, 1], [0, 2], [8 / 13, 5 / 13])):
        router = LossFree(make_site(**site), k, 0.001)
        assert routed(router, odds, batch).expert.tolist() == before
        router.bias[2] = 0.25
        routing = routed(router, odds, batch)
        assert routing.expert.tolist() == after
        assert routing.weight.tolist() == pytest.approx(weight)
        assert float(routing.report["bias_norm"]) == pytest.approx(0.25)
        assert routing.aux_loss.item() == 0
    router.bias.copy_(torch.tensor([-100.0, 50.0, 100.0]))  # not even where the bias alone chooses
    assert routed(router, odds, batch).weight.tolist() == pytest.approx([5 / 11, 6 / 11])


def test_loss_frees_bias_moves_by_the_sign_of_what_is_missing_once_a_step():
    router, batch = LossFree(make_site(), 1, 0.01), some_batch(padding=4)
    loads = torch.tensor([5, 1, 2, 0])  # the mean is 2
    router.after_step(loads, 0.1)
    torch.testing.assert_close(router.bias, torch.tensor([-0.01, 0.01, 0.0, 0.01]))
    router.after_step(loads, 0.2)
    torch.testing.assert_close(router.bias, torch.tensor([-0.02, 0.02, 0.0, 0.02]))
    before = router.bias.clone()
    for training in (True, False, True):
        routing = routed(router.train(training), some_scores(4, LENGTH), batch)
        routing.weight.sum().backward()
        assert torch.equal(router.bias, before)  # neither evaluation nor a second forward counts
    assert int(load_of(routing, EXPERTS).sum()) == 44
    router.after_step(torch.tensor([7, 7, 7, 7]), 0.3)
    assert torch.equal(router.bias, before)
    assert "bias" in router.state_dict() and "bias" not in dict(router.named_parameters())


@pytest.mark.parametrize("k", [1, 2])
def test_loss_free_lowers_the_violation_on_a_drifting_stream(k):
    def violation(update_rate: float) -> float:
        router, batch, total = LossFree(make_site(num_experts=8), k, update_rate), some_batch(8, 32), 0.0
        for step in range(300):
            drift = torch.sin(torch.arange(8) + step / 100)  # one expert's tide after the other's
            noise = torch.randn(8, 32, 8, generator=generator("drift", step))
            load = load_of(routed(router, drift + noise, batch), 8)
            router.after_step(load, step / 300)
            total += float(load.max() / load.double().mean()) - 1 if step >= 100 else 0
        return total / 200

    assert violation(0.01) < 0.5 * violation(0.0)


def test_loss_free_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match=r"router.k must be in 1..num_experts = 4; got 5"):
        LossFree(make_site(), 5, 0.001)
    with pytest.raises(ValueError, match="router.update_rate must not be negative; got -0.1"):
        LossFree(make_site(), 1, -0.1)


# controls


def test_a_random_expert_is_uniform_and_another_at_every_step():
    router, length = RandomEachStep(make_site()), 500
    batch = some_batch(8, length)
    hidden = torch.zeros(8, length, WIDTH)
    one, again = (router(hidden, batch.tokens).expert for _ in range(2))
    assert torch.equal(one, again)
    other = router(hidden, batch.tokens._replace(key=batch.tokens.key + 1)).expert
    assert float((one == other).double().mean()) == pytest.approx(1 / 4, abs=4 * (3 / 16 / 4000) ** 0.5)
    for drawn in (one, other):
        load = torch.bincount(drawn, minlength=4).double()
        assert float(((load - 1000) ** 2 / 1000).sum()) < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001
    assert not list(router.parameters())


def test_a_random_expert_in_evaluation_is_a_table_of_position_and_token():
    router = RandomEachStep(make_site()).eval()
    batch = some_batch(200)
    tokens = batch.tokens._replace(key=torch.zeros(200, dtype=torch.int64))
    routing = router(torch.zeros(200, LENGTH, WIDTH), tokens)
    seen = zip(tokens.position.flatten().tolist(), tokens.id.flatten().tolist(), routing.expert.tolist(), strict=True)
    assert max(Counter((t, token) for t, token, _ in set(seen)).values()) == 1
    by_position = routing.expert.view(200, LENGTH)[:, 0]
    assert len(set(by_position.tolist())) == EXPERTS  # and not of the position alone
    assert bool((routing.weight == 1).all())
    drawn = {(seed, layer): RandomEachStep(make_site(seed=seed, layer=layer)) for seed in (0, 1) for layer in (0, 1)}
    experts = [tuple(r(torch.zeros(200, LENGTH, WIDTH), tokens).expert.tolist()) for r in drawn.values()]
    assert len(set(experts)) == 4


def test_a_frozen_router_is_argmax_of_a_gate_that_is_no_parameter():
    router, batch = FrozenRandom(make_site()), some_batch(padding=2)
    hidden = torch.randn(4, LENGTH, WIDTH, generator=generator("hidden"), requires_grad=True)
    routing = router(hidden, batch.tokens)
    by_hand = [max(range(EXPERTS), key=lambda e, h=h: float(router.gate[e] @ h)) for h in hidden.detach().flatten(0, 1)]
    assert routing.expert.tolist() == by_hand
    assert torch.equal(routing.weight, batch.tokens.real.flatten().float())
    assert not routing.weight.requires_grad and not list(router.parameters())
    assert torch.equal(router.state_dict()["gate"], gate_parameter(make_site()))
