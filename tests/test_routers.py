import math
import re

import pytest
import torch
from conftest import EXPERTS, LENGTH, ROOT, ROUTERS, VOCAB, WIDTH, check, make_site, router_of, shaken, some_batch

from data.randomness import generator, uniform
from routers.base_layers import BalancedAssignment
from routers.gates import balance_loss, within_capacity
from routers.routing import Plan, Routing, load_metrics, load_of, make_plan
from routers.switch import Switch
from training.loop import joined


def hidden_of(batch, seed=0):
    return torch.randn(*batch.target.shape, WIDTH, generator=generator(seed, "hidden"))


def one_hot(experts: list[int], number: int) -> torch.Tensor:
    return torch.eye(number, dtype=torch.long)[torch.tensor(experts)][None]


# every router


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_a_routing_keeps_its_promises_and_its_plan_is_its_own(name, training):
    router = shaken(router_of(name, make_site())).train(training)
    batch = some_batch(padding=3)
    routing = router(hidden_of(batch), batch.tokens)
    check(routing, batch.target.numel(), EXPERTS)
    padding = ~batch.tokens.real.flatten()[routing.token]
    assert torch.equal(routing.weight[padding], torch.zeros(int(padding.sum())))
    plan = router.plan(batch.tokens)
    if plan is not None:
        expected = make_plan(routing.expert, EXPERTS, router.segments)
        assert all(torch.equal(a, b) for a, b in zip(plan, expected, strict=True))


DRAWLESS = ("hash_modulo", "hash_distilled")  # the table is what it is


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in DRAWLESS])
def test_same_seed_same_router_other_seed_or_layer_another(name):
    def state(**changes):
        return router_of(name, make_site(**changes)).state_dict()

    first = state()
    assert all(torch.equal(first[key], value) for key, value in state().items())
    for change in ({"seed": 1}, {"layer": 0}):
        assert any(not torch.equal(first[key], value) for key, value in state(**change).items())


@pytest.mark.parametrize("name", ROUTERS)
def test_evaluation_is_pure_and_free_of_batch_mates(name):
    router = shaken(router_of(name, make_site(routing_group=1))).eval()
    batch = some_batch()
    hidden = hidden_of(batch)
    whole, again = router(hidden, batch.tokens), router(hidden, batch.tokens)
    alone = [router(hidden[i : i + 1], batch.apply(lambda t, i=i: t[i : i + 1]).tokens) for i in range(4)]
    assert torch.equal(whole.expert, again.expert)
    assert torch.equal(whole.expert, torch.cat([r.expert for r in alone]))
    torch.testing.assert_close(whole.weight, torch.cat([r.weight for r in alone]))


def test_a_plan_sorts_assignments_by_expert_and_keeps_their_order():
    plan = make_plan(torch.tensor([2, 0, 2, 3, 0]), 5)
    assert isinstance(plan, Plan)
    assert plan.order.tolist() == [1, 4, 0, 2, 3]
    assert plan.inverse.tolist() == [2, 0, 3, 4, 1]
    assert plan.offsets.tolist() == [2, 2, 4, 5, 5]
    assert plan.offsets.dtype == torch.int32


def test_load_metrics_by_hand():
    # 5 real tokens and one of padding over 4 experts: loads 2, 1, 1, 0; the fifth is over capacity
    weight = torch.tensor([1.0, 0.5, 0.25, 0.25, 0.0, 0.0])
    routing = Routing(
        torch.arange(6), torch.tensor([0, 0, 1, 2, 0, 0]), weight, torch.tensor(0.5), {"x": torch.tensor(7)}
    )
    real = torch.tensor([[True, True, True], [True, True, False]])
    metrics = {name: float(value) for name, value in load_metrics(routing, real, 4).items()}
    assert load_of(routing, 4).tolist() == [2, 1, 1, 0]
    entropy = (0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4)
    assert metrics == pytest.approx(
        {"max_over_mean": 2.0, "entropy": entropy, "dropped": 0.2, "weight": 0.5, "unused": 1, "aux_loss": 0.5, "x": 7}
    )


def test_routings_of_micro_batches_join_to_that_of_the_batch():
    router = shaken(router_of("switch", make_site()))
    batch = some_batch()
    hidden = hidden_of(batch)
    halves = [router(hidden[i : i + 2], batch.apply(lambda t, i=i: t[i : i + 2]).tokens) for i in (0, 2)]
    whole, both = router(hidden, batch.tokens), joined(halves, 2 * LENGTH)
    assert torch.equal(whole.token, both.token)
    assert torch.equal(whole.expert, both.expert)
    torch.testing.assert_close(whole.weight, both.weight)
    torch.testing.assert_close(whole.aux_loss.double(), both.aux_loss)


# Switch


OPTIONS = {"gate": "hidden", "weight": "probability", "capacity_factor": None, "eval_capacity_factor": None}
OPTIONS |= {"load_balance_coef": 0.01, "z_loss_coef": 0.0, "jitter": 0.0}


def make_switch(**options) -> Switch:
    return shaken(Switch(make_site(), **OPTIONS | options))


def test_switchs_loss_is_one_at_uniform_and_e_over_k_at_collapse():
    uniform_p = torch.full((1, 8, 4), 0.25)
    assert float(balance_loss(one_hot([0, 1, 2, 3] * 2, 4), uniform_p)) == pytest.approx(1)
    for k in (1, 2, 4):  # all tokens on k experts with probability 1 / k each
        p = torch.zeros(1, 8, 4)
        p[..., :k] = 1 / k
        assert float(balance_loss(one_hot([i % k for i in range(8)], 4), p)) == pytest.approx(4 / k)


def test_switchs_loss_by_hand_ignores_padding_and_averages_groups():
    # E = 2. First group: experts 0, 0, 1 of p0 = 0.9, 0.6, 0.2, a fourth token is padding: f = 2/3, 1/3; P0 = 1.7/3
    p0 = torch.tensor([[0.9, 0.6, 0.2, 0.99], [0.5, 0.5, 0.5, 0.5]])
    choice = torch.cat([one_hot([0, 0, 1, 0], 2), one_hot([0, 1, 0, 1], 2)])
    choice[0, 3] = 0
    first = 2 * (2 / 3 * 1.7 / 3 + 1 / 3 * 1.3 / 3)
    assert float(balance_loss(choice, torch.stack([p0, 1 - p0], -1))) == pytest.approx((first + 1) / 2)


def test_switchs_loss_counts_before_dropping_and_has_no_gradient_through_counts():
    batch = some_batch()
    loose, tight = make_switch(), make_switch(capacity_factor=0.5)
    hidden = hidden_of(batch)
    a, b = loose(hidden, batch.tokens), tight(hidden, batch.tokens)
    assert torch.equal(a.aux_loss, b.aux_loss)
    assert (b.weight == 0).sum() > (a.weight == 0).sum() == 0
    a.aux_loss.backward()
    probability = (hidden @ loose.gate.T).softmax(-1)
    share = torch.nn.functional.one_hot(probability.argmax(-1), 4).view(2, -1, 4).double().mean(1)
    expected = 0.01 * 4 * (share * probability.view(2, -1, 4).mean(1)).sum(-1).mean()
    (grad,) = torch.autograd.grad(expected, loose.gate)
    torch.testing.assert_close(loose.gate.grad, grad)


def test_padding_takes_no_room_in_switch_and_enters_no_loss():
    router = make_switch(capacity_factor=1.0)
    batch = some_batch(padding=5)
    hidden = hidden_of(batch)
    changed = torch.where(batch.tokens.real[..., None], hidden, 9.0)
    one, other = router(hidden, batch.tokens), router(changed, batch.tokens)
    assert torch.equal(one.aux_loss, other.aux_loss)
    assert torch.equal(one.weight, other.weight)
    moved = torch.cat([hidden[-1:, -5:] * 0 + 9, hidden[-1:, :-5]], 1)  # the padding first: the same tokens drop
    first = batch.tokens._replace(real=batch.tokens.real.flip(1))
    kept = router(torch.cat([hidden[:-1], moved]), first).weight.view(4, -1)[-1, 5:]
    assert torch.equal(kept > 0, one.weight.view(4, -1)[-1, :-5] > 0)


def test_capacity_drops_by_position():
    # 6 tokens, 2 experts, factor 1: three each. Expert 0 is wanted by tokens 0, 1, 3, 4, 5: the last two find no room
    kept = within_capacity(one_hot([0, 0, 1, 0, 0, 0], 2), 1.0).any(-1)
    assert kept.tolist() == [[True, True, True, True, False, False]]
    # ceil(1.25 * 5 / 2) = 4; padding takes no room and finds none
    choice = one_hot([0, 0, 0, 0, 0, 0], 2)
    choice[0, 1] = 0
    assert within_capacity(choice, 1.25).any(-1).tolist() == [[True, False, True, True, True, False]]
    assert within_capacity(one_hot([0, 0, 0], 2), 0.1).any(-1).tolist() == [[True, False, False]]


def test_switchs_weight_is_its_probability_and_ties_go_to_the_lowest_expert():
    router, batch = make_switch(), some_batch()
    hidden = hidden_of(batch)
    probability = (hidden @ router.gate.T).softmax(-1)
    routing = router(hidden, batch.tokens)
    torch.testing.assert_close(routing.weight, probability.amax(-1).flatten())
    assert torch.equal(routing.expert, probability.argmax(-1).flatten())
    tied = router(torch.zeros_like(hidden), batch.tokens)
    assert torch.equal(tied.expert, torch.zeros(48, dtype=torch.long))
    torch.testing.assert_close(tied.weight, torch.full((48,), 0.25))


def test_jitter_multiplies_the_routers_input_in_training_only():
    plain, jittered = make_switch(), make_switch(jitter=0.5)
    batch = some_batch()
    hidden = hidden_of(batch)
    columns = torch.arange(WIDTH)
    draw = uniform(batch.tokens.key[:, None, None], 1, batch.tokens.position[..., None], columns)
    assert float(draw.min()) >= 0 and float(draw.max()) < 1 and abs(float(draw.mean()) - 0.5) < 0.05
    by_hand = plain(hidden * (0.5 + draw), batch.tokens)
    torch.testing.assert_close(jittered(hidden, batch.tokens).weight, by_hand.weight)
    assert not torch.equal(jittered(hidden, batch.tokens).weight, plain(hidden, batch.tokens).weight)
    assert torch.equal(jittered(torch.zeros_like(hidden), batch.tokens).weight, torch.full((48,), 0.25))
    assert torch.equal(jittered.eval()(hidden, batch.tokens).weight, plain(hidden, batch.tokens).weight)


def test_switchs_gate_starts_truncated_normal_of_variance_a_tenth_over_fan_in():
    gate = Switch(make_site(num_experts=64, d_model=512, vocab_size=64), **OPTIONS).gate.detach()
    deviation = (0.1 / 512) ** 0.5
    assert float(gate.abs().max()) <= 2 * deviation
    assert float(gate.std()) == pytest.approx(0.88 * deviation, rel=0.02)  # of a normal cut at two deviations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, "router.capacity_factor must be above 0"),
        ({"eval_capacity_factor": -1.0}, "router.eval_capacity_factor must be above 0"),
        ({"load_balance_coef": -1.0}, "router.load_balance_coef must not be negative; got -1.0"),
        ({"z_loss_coef": -1.0}, "router.z_loss_coef"),
        ({"jitter": 1.5}, "router.jitter"),
        ({"gate": "both"}, "router.gate must be one of hidden, token; got both"),
        ({"weight": "one"}, "router.weight must be one of"),
    ],
)
def test_switch_refuses_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Switch(make_site(), **OPTIONS | options)


def test_capacity_in_training_and_in_evaluation_are_two_choices():
    batch, tight = some_batch(), {"capacity_factor": 0.5}
    hidden = hidden_of(batch)
    router = make_switch(**tight)
    assert router.trains_differently
    assert (router(hidden, batch.tokens).weight == 0).any()
    assert not (router.eval()(hidden, batch.tokens).weight == 0).any()
    both = make_switch(**tight, eval_capacity_factor=0.5)
    assert not both.trains_differently
    assert torch.equal(both(hidden, batch.tokens).weight, both.eval()(hidden, batch.tokens).weight)


def test_a_straight_through_weight_is_one_with_the_probabilitys_gradient():
    plain, through = make_switch(), make_switch(weight="straight_through")
    batch = some_batch()
    hidden = hidden_of(batch)
    weight = through(hidden, batch.tokens).weight
    torch.testing.assert_close(weight, torch.ones(48))
    p = plain(hidden, batch.tokens).weight
    (expected,) = torch.autograd.grad(p.log().sum(), plain.gate)  # d(p / const p) = d log p
    (got,) = torch.autograd.grad(weight.sum(), through.gate)
    torch.testing.assert_close(got, expected)


def test_a_token_gate_looks_at_the_token_alone():
    router, batch = make_switch(gate="token"), some_batch()
    routing = router(hidden_of(batch), batch.tokens)
    probability = router.gate.softmax(-1)[batch.tokens.id]
    torch.testing.assert_close(routing.weight, probability.amax(-1).flatten())
    assert torch.equal(routing.expert, probability.argmax(-1).flatten())
    assert torch.equal(router(hidden_of(batch, 1), batch.tokens).weight, routing.weight)


def test_the_z_loss_is_the_mean_of_logsumexp_squared_over_real_tokens():
    router, batch = make_switch(load_balance_coef=0.0, z_loss_coef=0.5).requires_grad_(False), some_batch(padding=4)
    hidden = torch.zeros(4, LENGTH, WIDTH)  # every score 0: logsumexp = log 4
    assert float(router(hidden, batch.tokens).aux_loss) == pytest.approx(0.5 * math.log(4) ** 2)
    hidden[-1, -4:] = 100.0  # padding
    assert float(router(hidden, batch.tokens).aux_loss) == pytest.approx(0.5 * math.log(4) ** 2)


# BASE


def test_base_is_balanced_over_each_group_in_training_and_greedy_in_evaluation():
    router = shaken(BalancedAssignment(make_site(), "auto"))
    batch = some_batch(padding=3)  # groups of 24 and 21 real tokens
    hidden = hidden_of(batch)
    scores = hidden @ router.centroids.T
    routing = router(hidden, batch.tokens)
    expert = routing.expert.view(2, 24)
    assert torch.bincount(expert[0]).tolist() == [6, 6, 6, 6]
    assert sorted(torch.bincount(expert[1, :21], minlength=4).tolist()) == [5, 5, 5, 6]
    assert float(routing.report["assignment_gap"]) <= 1e-6
    chosen = scores.view(-1, EXPERTS).gather(1, routing.expert[:, None])[:, 0].sigmoid()
    torch.testing.assert_close(routing.weight, chosen * batch.tokens.real.flatten())
    greedy = router.eval()(hidden, batch.tokens)
    assert torch.equal(greedy.expert, scores.argmax(-1).flatten())
    assert not greedy.report


def test_bases_centroids_start_orthogonal_with_gain_a_tenth():
    centroids = BalancedAssignment(make_site(), "auto").centroids.detach()
    torch.testing.assert_close(centroids @ centroids.T, 0.01 * torch.eye(EXPERTS), atol=1e-6, rtol=0)


def test_bases_scores_learn_through_the_weight_alone():
    router = shaken(BalancedAssignment(make_site(), "auto"))
    batch = some_batch()
    hidden = hidden_of(batch).requires_grad_()
    routing = router(hidden, batch.tokens)
    (grad,) = torch.autograd.grad(routing.weight.sum(), hidden, retain_graph=True)
    chosen = router.centroids[routing.expert].view_as(hidden)
    slope = (routing.weight * (1 - routing.weight)).view(4, LENGTH, 1)
    torch.testing.assert_close(grad, slope * chosen)


def test_a_site_never_depends_on_pythons_hash():
    assert torch.equal(torch.randint(VOCAB, (3,), generator=make_site().generator("a")), torch.tensor(GOLDEN_DRAW))


GOLDEN_DRAW = [20, 9, 6]


def test_no_file_of_a_router_is_long_and_nothing_shared_names_a_method():
    for path in (ROOT / "routers").glob("*.py"):
        limit = 200 if path.name == "routing.py" else 150  # the interface
        assert len(path.read_text().splitlines()) <= limit, path.name
    names = r"hash_|switch(?!yard)|\bbase_|sinkhorn|gshard|loss_free|stable_moe|expert_choice|multi-hash"
    for folder in ("models", "training", "analysis"):
        for path in (ROOT / folder).glob("*.py"):
            assert not re.findall(names, path.read_text(), re.I), path


def test_the_z_loss_is_taken_group_by_group_so_that_padding_moves_no_other_group():
    router, batch = make_switch(load_balance_coef=0.0, z_loss_coef=1.0).requires_grad_(False), some_batch(padding=7)
    hidden = hidden_of(batch)
    halves = [router(hidden[i : i + 2], batch.apply(lambda t, i=i: t[i : i + 2]).tokens).aux_loss for i in (0, 2)]
    torch.testing.assert_close(router(hidden, batch.tokens).aux_loss, sum(halves) / 2)
