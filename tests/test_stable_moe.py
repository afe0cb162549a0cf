import copy
import json
import math

import pytest
import torch
from conftest import (
    EXPERTS,
    LENGTH,
    VOCAB,
    WIDTH,
    check,
    compose_config,
    make_site,
    make_transformer,
    shaken,
    some_batch,
)
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from data.randomness import generator
from routers.stable_moe import StableMoE, distillation, imbalance
from training import checkpoint
from training.job import FINISHED, run
from training.loop import joined
from training.optimizer import step

U = 50


def make_router(share=0.5, coef=0.3, width=U, **site) -> StableMoE:
    return StableMoE(make_site(**site), share, coef, width)


def in_stage_2(router: StableMoE) -> StableMoE:
    router.after_step(torch.zeros(EXPERTS), 1.0)
    return router


def hidden_of(batch, seed=0, dtype=torch.float32):
    return torch.randn(*batch.target.shape, WIDTH, generator=generator(seed, "hidden"), dtype=dtype)


def naive_table(router: StableMoE) -> torch.Tensor:
    """Token by token and expert by expert, the first of the best."""
    table = []
    for word in router.words.detach().double():
        scores = [float((word * centroid).sum()) for centroid in router.centroids.detach().double()]
        table.append(scores.index(max(scores)))
    return torch.tensor(table)


# what is routed


def test_stage_1_routes_by_the_hidden_value_in_training_and_by_the_token_in_evaluation():
    router, batch = shaken(make_router()), some_batch(padding=3)
    hidden, real = hidden_of(batch), batch.tokens.real.flatten()
    scores = (hidden @ router.gate.T).flatten(0, 1)
    for training, expected in ((True, scores.argmax(-1)), (False, naive_table(router)[batch.tokens.id.flatten()])):
        routing = router.train(training)(hidden, batch.tokens)
        check(routing, batch.target.numel(), EXPERTS)
        assert torch.equal(routing.expert, expected)
        weight = scores.gather(1, expected[:, None])[:, 0].sigmoid() * real
        torch.testing.assert_close(routing.weight, weight)
    assert router.trains_differently
    assert not torch.equal(scores.argmax(-1), expected)


@pytest.mark.parametrize("training", [True, False])
def test_stage_2_routes_by_the_table_and_weighs_by_the_hidden_value(training):
    router, batch = in_stage_2(shaken(make_router())).train(training), some_batch(padding=3)
    hidden = hidden_of(batch)
    routing = router(hidden, batch.tokens)
    table = naive_table(router)
    assert torch.equal(router.table, table)
    assert len(table.unique()) > 1
    assert torch.equal(routing.expert, table[batch.tokens.id.flatten()])
    score = (hidden.flatten(0, 1) * router.gate[routing.expert]).sum(-1)
    torch.testing.assert_close(routing.weight, score.sigmoid() * batch.tokens.real.flatten())
    assert float(routing.aux_loss.detach()) == 0


def test_the_table_is_computed_once():
    router = in_stage_2(shaken(make_router()))
    before = router.table.clone()
    with torch.no_grad():
        router.words.neg_()
    in_stage_2(router)
    assert torch.equal(router.table, before)


def test_evaluation_is_the_same_on_both_sides_of_the_border():
    router, batch = shaken(make_router()).eval(), some_batch()
    seen = [r(hidden_of(batch), batch.tokens) for r in (router, in_stage_2(copy.deepcopy(router)))]
    assert torch.equal(seen[0].expert, seen[1].expert)
    assert torch.equal(seen[0].weight, seen[1].weight)


def test_ties_go_to_the_lowest_expert():
    router, batch = make_router(), some_batch()
    with torch.no_grad():
        router.words.zero_()
    for training in (True, False):
        routing = router.train(training)(torch.zeros(4, LENGTH, WIDTH), batch.tokens)
        assert torch.equal(routing.expert, torch.zeros(48, dtype=torch.long))
    assert torch.equal(in_stage_2(router).table, torch.zeros(VOCAB, dtype=torch.long))


def test_agreement_and_stage_are_reported():
    router, batch = shaken(make_router()), some_batch(padding=5)
    hidden, real = hidden_of(batch), batch.tokens.real.flatten()
    learned = (hidden @ router.gate.T).argmax(-1).flatten()
    same = int((learned == naive_table(router)[batch.tokens.id.flatten()])[real].sum())
    for stage in (1, 2):
        report = router(hidden, batch.tokens).report
        assert float(report["agreement"]) == pytest.approx(same / 43)
        assert int(report["stage"]) == stage
        in_stage_2(router)


# losses


def test_imbalance_by_hand():
    # E = 2. First group: four tokens on 0, 0, 0, 1: (n - 2) / 2 = 1/2, -1/2. Second: 1, 1, padding: n = 0, 2, mean 1
    choice = one_hot(torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0]]), 2)
    choice[1, 2:] = 0
    gate = torch.tensor(
        [[0.9, 0.1], [0.8, 0.2], [0.6, 0.3], [0.7, 0.4], [0.5, 0.6], [0.5, 0.4], [0.9, 0.9], [0.9, 0.9]]
    )
    gate = gate.view(2, 4, 2).requires_grad_()
    first = 0.5 * (0.9 + 0.8 + 0.6) / 4 - 0.5 * 0.4 / 4
    second = 1.0 * (0.6 + 0.4) / 2
    loss = imbalance(choice, gate)
    assert loss.item() == pytest.approx((first + second) / 2)
    loss.backward()
    by_hand = torch.zeros(2, 4, 2)
    by_hand[0, :3, 0], by_hand[0, 3, 1], by_hand[1, :2, 1] = 0.5 / 4 / 2, -0.5 / 4 / 2, 1 / 2 / 2
    torch.testing.assert_close(gate.grad, by_hand)


def test_imbalance_is_zero_at_equal_loads_and_e_minus_one_gates_at_collapse():
    gate = torch.rand(3, 8, 4, generator=generator("gate"))
    equal = one_hot(torch.arange(8) % 4, 4).expand(3, 8, 4)
    assert float(imbalance(equal, gate)) == 0
    collapsed = one_hot(torch.full((3, 8), 2), 4)
    assert float(imbalance(collapsed, gate)) == pytest.approx(3 * float(gate[..., 2].mean()))
    assert float(imbalance(torch.zeros(3, 8, 4, dtype=torch.long), gate)) == 0  # nothing but padding


def test_distillation_by_hand():
    # groups of two tokens; the second of the second group is padding. -log softmax: log(1 + e^-2), log(1 + e), log 2
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [9.0, 0.0]]])
    learned = torch.tensor([[0, 0], [1, 1]])
    choice = one_hot(learned, 2)
    choice[1, 1] = 0
    first = (math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2
    assert float(distillation(choice, logits, learned)) == pytest.approx((first + math.log(2)) / 2)


def test_the_loss_is_both_over_routing_groups():
    router, batch = shaken(make_router(coef=0.3)), some_batch(padding=5)
    hidden, real = hidden_of(batch), batch.tokens.real
    learned, expected = (hidden @ router.gate.T).argmax(-1), 0.0
    for rows in (slice(0, 2), slice(2, 4)):
        expert, ids, h = learned[rows][real[rows]], batch.tokens.id[rows][real[rows]], hidden[rows][real[rows]]
        number = len(expert)
        for i in range(EXPERTS):
            mine = h[expert == i]
            excess = (len(mine) - number / EXPERTS) / (number / EXPERTS)
            expected += 0.3 * excess * (mine @ router.gate[i]).sigmoid().sum().item() / number / 2
        log_p = (router.words[ids] @ router.centroids.T).log_softmax(-1)
        expected -= log_p[torch.arange(number), expert].mean().item() / 2
    assert router(hidden, batch.tokens).aux_loss.item() == pytest.approx(expected, rel=1e-5)


def test_distillation_teaches_the_distilled_router_alone_and_balance_the_learned_one_alone():
    batch = some_batch()
    for coef, learns, rests in ((0.0, ("words", "centroids"), ("gate",)), (1e6, ("gate",), ())):
        router, hidden = shaken(make_router(coef=coef)), hidden_of(batch).requires_grad_()
        router(hidden, batch.tokens).aux_loss.backward()
        named = dict(router.named_parameters())
        assert all(bool(named[name].grad.any()) for name in learns)
        assert all(not named[name].grad.any() for name in rests)
        assert bool(hidden.grad.any()) == (coef > 0)
    routing = shaken(make_router())(hidden_of(batch), batch.tokens)
    router = shaken(make_router())
    router(hidden_of(batch), batch.tokens).weight.sum().backward()
    assert router.words.grad is None
    assert router.centroids.grad is None
    assert bool(router.gate.grad.any())
    assert routing.aux_loss.requires_grad


def test_padding_enters_no_loss_and_no_agreement():
    router, batch = shaken(make_router()), some_batch(padding=5)
    hidden, real = hidden_of(batch), batch.tokens.real
    other = batch.tokens._replace(id=torch.where(real, batch.tokens.id, 7))
    one = router(hidden, batch.tokens)
    two = router(torch.where(real[..., None], hidden, 9.0), other)
    assert torch.equal(one.aux_loss, two.aux_loss)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.report["agreement"], two.report["agreement"])


def test_the_loss_is_the_same_at_any_accumulation():
    router, batch = shaken(make_router()), some_batch(padding=5)
    hidden = hidden_of(batch)
    halves = [router(hidden[i : i + 2], batch.apply(lambda t, i=i: t[i : i + 2]).tokens) for i in (0, 2)]
    whole = router(hidden, batch.tokens)
    torch.testing.assert_close(joined(halves, 2 * LENGTH).aux_loss, whole.aux_loss.double())


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_gradients_are_finite_at_tied_and_saturated_scores(value):
    router, batch = shaken(make_router()), some_batch()
    with torch.no_grad():
        router.words.fill_(value)
    hidden = torch.full((4, LENGTH, WIDTH), value, requires_grad=True)
    routing = router(hidden, batch.tokens)
    (routing.weight.sum() + routing.aux_loss).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in (hidden, *router.parameters()))


def test_what_is_learned_by_token_is_distilled():
    """hidden is a function of the token here, so the distilled router can say the same; after stage 1 it does."""
    router, batch = make_router(coef=0.0), some_batch(16)
    hidden = torch.randn(VOCAB, WIDTH, generator=generator("by token"))[batch.tokens.id]
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2)
    before = float(router(hidden, batch.tokens).report["agreement"])
    for _ in range(30):
        router(hidden, batch.tokens).aux_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.6
    assert float(in_stage_2(router)(hidden, batch.tokens).report["agreement"]) == 1


def test_the_balance_loss_evens_the_loads():
    batch = some_batch(16)
    router, hidden = make_router(coef=1.0), hidden_of(batch)
    with torch.no_grad():
        router.gate[2] = router.gate[2] + 0.3  # along what all tokens have in common: one expert takes most
        hidden += 1

    def worst():
        return float(torch.bincount(router(hidden, batch.tokens).expert, minlength=EXPERTS).max()) / 48

    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2)
    before = worst()
    for _ in range(60):
        router(hidden, batch.tokens).aux_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 3
    assert worst() < 1.5


# stages


def test_the_stage_changes_by_progress():
    router = make_router(share=0.25)
    for number in range(1, 8):
        router.after_step(torch.zeros(EXPERTS), number / 8)
        assert (int(router.stage) == 2) == router.tabulated == (number >= 2)


def model_of(path="loop") -> torch.nn.Module:
    return shaken(make_transformer(lambda layer: make_router(share=0.5, layer=layer), path=path))


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def train(model, optimizer, steps: range, of: int = 6) -> list[float]:
    losses = []
    for number in steps:
        batch = some_batch(seed=number)
        output = model(batch.tokens)
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch.target.flatten()) + output.aux_loss
        loss.backward()
        step(optimizer, 1e-2, loss.detach(), 1.0)
        for router in model.routers.values():
            router.after_step(torch.zeros(EXPERTS), (number + 1) / of)
        losses.append(float(loss.detach()))
    return losses


def router_state(model):
    return {name: value.clone() for name, value in model.routers[1].state_dict().items()}


def test_in_stage_2_neither_momentum_nor_decay_moves_what_is_frozen_and_the_gate_learns_on():
    model = model_of()
    optimizer = optimizer_of(model)
    first = router_state(model)
    train(model, optimizer, range(3))
    border = router_state(model)
    train(model, optimizer, range(3, 6))
    last = router_state(model)
    assert all(not torch.equal(first[name], border[name]) for name in ("words", "centroids", "gate", "table", "stage"))
    assert all(torch.equal(border[name], last[name]) for name in ("words", "centroids", "table", "stage"))
    assert not torch.equal(border["gate"], last["gate"])
    assert model.routers[1].words.grad is None


def test_training_goes_on_from_a_checkpoint_in_either_stage(tmp_path):
    whole = model_of()
    losses = train(whole, optimizer_of(whole), range(6))
    for stop in (2, 4):  # in stage 1 and in stage 2
        model = model_of()
        optimizer = optimizer_of(model)
        assert train(model, optimizer, range(stop)) == losses[:stop]
        files = {"model": model.state_dict(), "optimizer": checkpoint.optimizer_tensors(model, optimizer)}
        folder = checkpoint.save(tmp_path, stop, files, {})
        model = model_of()
        optimizer = optimizer_of(model)
        checkpoint.restore(folder, model, optimizer)
        router = model.routers[1]
        assert router.tabulated == (stop == 4) != router.words.requires_grad == router.centroids.requires_grad
        assert train(model, optimizer, range(stop, 6)) == losses[stop:]
        for name, value in whole.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        loaded = load_file(folder / "model.safetensors")
        assert int(loaded["blocks.1.ffn.router.stage"]) == 1 + (stop == 4)


def test_loading_goes_back_to_stage_1_as_well():
    early, late = shaken(make_router()), in_stage_2(shaken(make_router()))
    late.words.grad = torch.ones_like(late.words)
    late.load_state_dict(early.state_dict())
    assert not late.tabulated
    assert late.words.requires_grad
    assert late.words.grad is None


def test_a_copy_loads_into_itself():
    router = make_router()
    copied = copy.deepcopy(router)
    copied.load_state_dict(in_stage_2(make_router()).state_dict())
    assert copied.tabulated
    assert not router.tabulated


def test_a_table_or_stage_that_cannot_be_is_refused_on_loading():
    router = make_router()
    with pytest.raises(ValueError, match=r"a table must hold experts 0\.\.3; got 0\.\.4"):
        make_router().load_state_dict(router.state_dict() | {"table": torch.arange(VOCAB) % 5})
    with pytest.raises(ValueError, match="must be 1 or 2; got 3"):
        make_router().load_state_dict(router.state_dict() | {"stage": torch.tensor(3)})


def test_a_new_stage_compiles_once_more_and_each_is_one_graph():
    router, compiled = shaken(make_router()), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    run = torch.compile(router, fullgraph=True, backend=backend)
    plain = copy.deepcopy(router)
    for number in range(8):
        batch = some_batch(seed=number)
        one, other = run(hidden_of(batch), batch.tokens), plain(hidden_of(batch), batch.tokens)
        assert torch.equal(one.expert, other.expert)
        torch.testing.assert_close(one.weight, other.weight)
        for each in (router, plain):
            each.after_step(torch.zeros(EXPERTS), (number + 1) / 8)
    assert int(router.stage) == 2
    assert len(compiled) == 2


# numbers


def test_nothing_is_cast_below_its_precision():
    batch = some_batch()
    router = shaken(make_router()).double()
    routing = router(hidden_of(batch, dtype=torch.float64), batch.tokens)
    assert routing.weight.dtype == routing.aux_loss.dtype == torch.float64
    router = shaken(make_router())
    with torch.autocast("cpu", torch.bfloat16):
        lower = router(hidden_of(batch), batch.tokens)
    routing = router(hidden_of(batch), batch.tokens)
    assert torch.equal(lower.weight, routing.weight)
    assert torch.equal(lower.aux_loss, routing.aux_loss)


def test_flops_and_first_values():
    router = make_router(num_experts=64, d_model=512)
    assert router.forward_flops == 2 * 64 * (512 + U)
    assert float(router.words.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(router.centroids.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(router.gate.detach().std()) == pytest.approx(0.88 * (0.1 / 512) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "router.stage_1_share must be above 0 and at most 1; got 0.0"),
        ({"share": 1.5}, "router.stage_1_share must be above 0 and at most 1; got 1.5"),
        ({"share": math.nan}, "router.stage_1_share"),
        ({"coef": -0.1}, "router.balance_coef must not be negative; got -0.1"),
        ({"width": 0}, "router.distilled_width must be at least 1; got 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_router(**options)


def test_a_run_sees_both_stages(tiny, tmp_path):
    assert run(compose_config(*tiny, "router=stable_moe", "router.stage_1_share=0.5")) == FINISHED
    (lines,) = (tmp_path / "runs").glob("stable_moe-*/metrics.jsonl")
    stages = [line.get("route/1/stage") for line in map(json.loads, lines.read_text().splitlines())]
    assert [stage for stage in stages if stage] == [1.0] * 6 + [2.0] * 6
