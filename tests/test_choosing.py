"""Expert choice and S-BASE on scores given by hand."""

import math

import pytest
import torch
from conftest import EXPERTS, LENGTH, compose_config, make_site, some_batch
from test_learned import one_row, routed, seeing, some_scores

from data.randomness import generator
from routers.expert_choice import ExpertChoice
from routers.routing import load_of
from routers.sinkhorn import Sinkhorn, log_plan
from training.targets import target

# expert choice


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 5])
def test_each_expert_takes_its_best_tokens_of_the_group(factor, padding):
    batch, scores = some_batch(padding=padding), some_scores(4, LENGTH)
    scores[0, 3] = scores[0, 7] = scores[1, 2]  # ties
    routing = routed(ExpertChoice(make_site(), factor), scores, batch)
    probability, real = scores.softmax(-1).view(48, EXPERTS), batch.tokens.real.flatten()
    expected = {}
    for start in (0, 24):
        tokens = [t for t in range(start, start + 24) if real[t]]
        for expert in range(EXPERTS):
            best = sorted(tokens, key=lambda t, e=expert: (-float(probability[t, e]), t))
            for token in best[: math.ceil(factor * len(tokens) / EXPERTS)]:
                expected[token, expert] = float(probability[token, expert])
    served = routing.weight > 0
    pairs = zip(routing.token[served].tolist(), routing.expert[served].tolist(), strict=True)
    assert dict(zip(pairs, routing.weight[served].tolist(), strict=True)) == pytest.approx(expected)
    assert routing.fan_out is None
    assert len(routing.token) == 48 * factor  # shapes do not depend on padding
    missed = {t for t in range(48) if real[t]} - {token for token, _ in expected}
    assert float(routing.report["unchosen"]) == pytest.approx(len(missed) / int(real.sum()))


def test_expert_choice_by_hand():
    # 4 tokens, 2 experts, C = 2. p_0 = 0.9, 0.8, 0.4, 0.6: expert 0 takes tokens 0 and 1, expert 1 tokens 2 and 3
    site, batch = one_row(4, num_experts=2)
    first = torch.tensor([0.9, 0.8, 0.4, 0.6])
    scores = torch.stack([first, 1 - first], -1).log()[None]
    router = ExpertChoice(make_site(**site), 1)
    routing = routed(router, scores, batch)
    assert routing.token.tolist() == [0, 1, 2, 3]
    assert routing.expert.tolist() == [0, 0, 1, 1]
    assert routing.weight.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.4])
    greedy = routed(router.eval(), scores, batch)
    assert greedy.expert.tolist() == [0, 0, 1, 0]
    assert greedy.weight.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.6])


def test_expert_choice_sees_the_future_in_training_alone_and_says_so():
    batch, scores = some_batch(), some_scores(4, LENGTH)
    router = ExpertChoice(make_site(), 1)
    changed = scores.clone()
    changed[:, LENGTH // 2 :] = some_scores(4, LENGTH // 2, seed=1)

    def of_the_past(scores):
        routing = routed(router, scores, batch)
        past = (routing.weight > 0) & (routing.token % LENGTH < LENGTH // 2)
        return set(zip(routing.token[past].tolist(), routing.expert[past].tolist(), strict=True))

    assert of_the_past(scores) != of_the_past(changed)
    router.eval()
    assert of_the_past(scores) == of_the_past(changed)
    assert router.leaks == {"future in training", "mates in training"}
    assert router.trains_differently


@pytest.mark.parametrize("factor", [0, 5])
def test_expert_choice_refuses_a_capacity_out_of_range(factor):
    with pytest.raises(ValueError, match=rf"router.capacity_factor must be in 1..num_experts = 4; got {factor}"):
        ExpertChoice(make_site(), factor)


def test_expert_choice_takes_a_whole_capacity_factor():
    node = {"_target_": "routers.expert_choice.ExpertChoice", "capacity_factor": 1.5}
    with pytest.raises(ValueError, match="capacity_factor"):
        target(node, skip=1)


# S-BASE


def test_the_plan_of_two_tokens_and_two_experts_by_hand():
    # sums of 1 make it p, 1 - p over 1 - p, p, and (p / (1 - p))^2 = exp(1 + 2 - 0 - 0.5)
    scores = torch.tensor([[[1.0, 0.0], [0.5, 2.0]]]).double()
    plan, violation = log_plan(scores, torch.ones(1, 2, dtype=torch.bool), 200)
    p = 1 / (1 + math.exp(-2.5 / 2))
    torch.testing.assert_close(plan.exp(), torch.tensor([[[p, 1 - p], [1 - p, p]]]).double())
    assert float(violation) < 1e-9


def test_the_plan_solves_the_transport_problem_with_padding_and_empty_groups():
    scores = some_scores(3, 24).double() * 2
    real = torch.ones(3, 24, dtype=torch.bool)
    real[1, -7:], real[2] = False, False
    plan, violation = log_plan(scores, real, 2000)
    plan = plan.exp()
    for group, number in ((0, 24), (1, 17)):
        kept = plan[group, :number]
        torch.testing.assert_close(kept.sum(1), torch.ones(number).double())
        torch.testing.assert_close(kept.sum(0), torch.full((4,), number / 4).double())
        tilt = kept.log() - scores[group, :number]  # log P - s is a price of the token plus one of the expert
        tilt = tilt - tilt.mean(0) - tilt.mean(1, keepdim=True) + tilt.mean()
        assert float(tilt.abs().max()) < 1e-9
    assert float(plan[~real].sum()) == 0
    assert float(violation) < 1e-9
    few, violation = log_plan(scores, real, 2)
    sums = [few.exp()[g, :n].sum(1) for g, n in ((0, 24), (1, 17))]
    assert float(violation) == pytest.approx(float((torch.cat(sums) - 1).abs().max()))
    assert float(violation) > 1e-3
    assert bool(torch.isfinite(log_plan(scores, torch.zeros_like(real), 3)[1]))


@pytest.mark.parametrize(("rows", "length", "experts"), [(2, 12, 4), (8, 128, 16), (8, 256, 64)])
def test_the_plans_sums_hold_to_a_thousandth_at_the_yamls_defaults(rows, length, experts):
    options = compose_config("router=s_base").router
    for seed in range(5):
        scores = torch.randn(1, rows * length, experts, generator=generator("gaussian", seed))
        for given in (scores, scores + torch.randn(experts, generator=generator("favourites", seed))):
            real = torch.ones(1, rows * length, dtype=torch.bool)
            plan, violation = log_plan(given / options.temperature, real, options.iterations)
            assert float(violation) < 1e-3
            sums = (plan.exp().sum(1) * experts / (rows * length) - 1).abs().max()
            assert float(sums) < 1e-3
            load = torch.bincount(plan.argmax(-1).flatten(), minlength=experts)
            greedy = torch.bincount(given.argmax(-1).flatten(), minlength=experts)
            assert int(load.max()) <= int(greedy.max())


def test_s_base_takes_the_plans_best_in_training_and_the_scores_in_evaluation():
    batch = some_batch(padding=3)
    scores = some_scores(4, LENGTH) + torch.tensor([3.0, 0.0, 0.0, 0.0])
    router = Sinkhorn(make_site(), 0.1, 500)
    routing = routed(router, scores, batch)
    real, places = batch.tokens.real.flatten(), torch.arange(48)
    plan, violation = log_plan(scores.view(2, 24, 4) / 0.1, real.view(2, 24), 500)
    assert torch.equal(routing.expert[real], plan.argmax(-1).flatten()[real])
    assert torch.equal(routing.report["plan_violation"], violation)
    expected = scores.softmax(-1).view(48, 4)[places, routing.expert] * real
    torch.testing.assert_close(routing.weight, expected)
    assert int(load_of(routing, EXPERTS).max()) <= 13  # 45 tokens, of which greedy gives the favourite most
    greedy = routed(router.eval(), scores, batch)
    assert torch.equal(greedy.expert, scores.argmax(-1).flatten())
    assert int(load_of(greedy, EXPERTS).max()) > 30
    assert not greedy.report
    assert router.leaks == {"future in training", "mates in training"}
    assert router.trains_differently


def test_s_bases_scores_learn_through_the_weight_alone():
    router, batch = Sinkhorn(make_site(), 0.2, 20), some_batch()
    hidden = seeing(router, some_scores(4, LENGTH)).requires_grad_()
    routing = router(hidden, batch.tokens)
    (grad,) = torch.autograd.grad(routing.weight.sum(), hidden)
    again = hidden.detach().requires_grad_()
    weight = again[..., :EXPERTS].softmax(-1).gather(-1, routing.expert.view(4, LENGTH, 1))
    torch.testing.assert_close(grad, torch.autograd.grad(weight.sum(), again)[0])


def test_s_base_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match="router.temperature must be above 0; got 0"):
        Sinkhorn(make_site(), 0.0, 10)
    with pytest.raises(ValueError, match="router.iterations must be at least 1; got 0"):
        Sinkhorn(make_site(), 1.0, 0)
