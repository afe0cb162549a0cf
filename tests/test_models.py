import pytest
import torch
from conftest import (
    EXPERTS,
    LENGTH,
    ROUTERS,
    VOCAB,
    make_site,
    make_transformer,
    model_of,
    one_of_a_kind,
    router_of,
    shaken,
    some_batch,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.randomness import generator
from models.attention import rotary_angles, rotate
from models.dispatch import choose_path, dispatch
from models.experts import Experts
from routers.routing import Routing, make_plan


def naive(x, routing, experts):
    """One assignment after the other, straight from the definition of a routing."""
    y = torch.zeros_like(x)
    for token, expert, weight in zip(routing.token, routing.expert, routing.weight):
        inner = x[token] @ experts.w_in[expert]
        gate = None if experts.w_gate is None else x[token] @ experts.w_gate[expert]
        inner = experts.activation(inner) if gate is None else experts.activation(gate) * inner
        y = y.index_add(0, token[None], (weight * (inner @ experts.w_out[expert]))[None])
    return y


def some_routing(kind: str, tokens: int = 20, dtype=torch.float32) -> Routing:
    draws = generator("routing", kind)
    token, fan_out = torch.arange(tokens), 1
    if kind == "two each":
        token, fan_out = token.repeat_interleave(2), 2
    elif kind == "irregular":
        token, fan_out = torch.randint(tokens, (31,), generator=draws), None
    expert = torch.randint(EXPERTS - 1, token.shape, generator=draws)  # the last expert has none
    weight = torch.rand(token.shape, generator=draws, dtype=dtype)
    weight[::5] = 0
    return Routing(token, expert, weight.requires_grad_(), weight.new_zeros(()), {}, fan_out)


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("kind", ["one each", "two each", "irregular"])
@pytest.mark.parametrize(("path", "dtype"), [("grouped_mm", torch.float32), ("loop", torch.float64)])
def test_dispatch_equals_the_naive_loop_with_all_gradients(activation, kind, path, dtype):
    experts = shaken(Experts(EXPERTS, 16, 32, activation)).to(dtype)
    x = torch.randn(20, 16, generator=generator("x"), dtype=dtype).requires_grad_()
    routing = some_routing(kind, dtype=dtype)
    inputs = [x, routing.weight, *experts.parameters()]
    seen = [dispatch(x, routing, None, experts, path), naive(x, routing, experts)]
    gradients = [torch.autograd.grad((y * torch.linspace(-1, 1, 16, dtype=dtype)).sum(), inputs) for y in seen]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(seen[0], seen[1], atol=tolerance, rtol=tolerance)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=20 * tolerance, rtol=20 * tolerance)


def test_a_plan_of_the_batch_gives_what_a_plan_of_the_step_gives():
    experts, routing = shaken(Experts(EXPERTS, 16, 32, "relu")), some_routing("two each")
    x = torch.randn(20, 16, generator=generator("x"))
    plan = make_plan(routing.expert, EXPERTS)
    assert torch.equal(*(dispatch(x, routing, p, experts, "grouped_mm") for p in (plan, None)))


def test_weight_zero_equals_absent():
    experts = shaken(Experts(EXPERTS, 16, 32, "relu"))
    x = torch.randn(20, 16, generator=generator("x")).requires_grad_()
    masked = some_routing("one each")
    there = masked.weight > 0
    absent = Routing(masked.token[there], masked.expert[there], masked.weight[there], masked.aux_loss)
    seen = [dispatch(x, routing, None, experts, "grouped_mm") for routing in (masked, absent)]
    torch.testing.assert_close(*seen)
    gradients = [torch.autograd.grad((y**2).sum(), [x, *experts.parameters()]) for y in seen]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_one_expert_of_weight_one_equals_the_plain_ffn():
    def make_router(layer):
        return router_of("hash_balanced", make_site(layer=layer, num_experts=1))

    sparse, plain = make_transformer(make_router, num_experts=1), make_transformer()
    batch = some_batch()
    outputs = [model(batch.tokens).logits for model in (sparse, plain)]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
    for logits in outputs:
        logits.square().sum().backward()
    for (name, one), other in zip(sparse.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_first_values_depend_on_seed_and_name_alone():
    models = [model_of(name) for name in ROUTERS]
    models += [
        make_transformer(),
        make_transformer(lambda layer: router_of("switch", make_site(layer=layer, num_experts=8)), 8),
    ]
    states = [dict(model.named_parameters()) for model in models]
    dense = dict(make_transformer().named_parameters())
    for state in states:
        for name, value in dense.items():
            if ".ffn." not in name:
                assert torch.equal(state[name], value), name
            elif name in state and state[name].shape[1:] == value.shape[1:]:
                assert torch.equal(state[name][:1], value), name
    experts = states[ROUTERS.index("switch")]["blocks.1.ffn.experts.w_in"]
    assert torch.equal(experts, states[ROUTERS.index("hash_balanced")]["blocks.1.ffn.experts.w_in"])
    assert torch.equal(experts, states[-1]["blocks.1.ffn.experts.w_in"][:EXPERTS])
    assert not torch.equal(experts[0], experts[1])
    assert not torch.equal(make_transformer(seed=1).embedding, dense["embedding"])
    assert float(experts.detach().std()) == pytest.approx(0.02, rel=0.05)
    residual = states[-1]["blocks.1.ffn.experts.w_out"]
    assert float(residual.detach().std()) == pytest.approx(0.02 / 2, rel=0.05)  # sqrt(2 * 2 layers) = 2


@pytest.mark.parametrize("name", one_of_a_kind([*ROUTERS, None]))
def test_the_future_moves_no_past_logit(name):
    """Declared leaks aside, which must be found."""
    model = shaken(model_of(name, sparse_layers=[0, 1]))
    batch, other = some_batch(seed=0), some_batch(seed=1)
    cut = 7
    mixed = batch.apply(torch.clone)
    for field, value, later in zip(mixed.tokens._fields, mixed.tokens, other.tokens):
        if value is not None and field not in ("position", "real", "key"):
            value[:, cut:] = later[:, cut:]
    mixed.tokens.next[:, cut - 1] = other.tokens.next[:, cut - 1]
    for training in (False, True):
        model.train(training)
        before, after = (model(b.tokens).logits[:, :cut] for b in (batch, mixed))
        moved = float((before - after).abs().max().detach())
        leak = f"future in {'training' if training else 'evaluation'}"
        if any(leak in router.leaks for router in model.routers.values()):
            assert moved > 1e-3, "a declared leak that is not found"
        else:
            assert moved < 1e-5
    assert float((model(batch.tokens).logits - model(mixed.tokens).logits).abs().max().detach()) > 0.1


def test_documents_are_kept_apart_by_the_mask():
    model = shaken(make_transformer())
    batch = some_batch()
    tokens = batch.tokens.id.clone()
    tokens[:, :5] = 3
    document = torch.zeros_like(tokens)
    document[:, 5:] = 1
    changed = tokens.clone()
    changed[:, :5] = 9
    masked = shaken(make_transformer(mask_documents=True))
    apart = [masked(batch.tokens._replace(id=ids), document=document).logits for ids in (tokens, changed)]
    together = [model(batch.tokens._replace(id=ids), document=document).logits for ids in (tokens, changed)]
    torch.testing.assert_close(apart[0][:, 5:], apart[1][:, 5:])
    assert not torch.allclose(together[0][:, 5:], together[1][:, 5:], atol=1e-3)
    torch.testing.assert_close(
        masked(batch.tokens, document=torch.zeros_like(tokens)).logits, model(batch.tokens).logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "rmsnorm", "positions": "learned", "activation": "swiglu"}, {"activation": "gelu"}]
)
@pytest.mark.parametrize("name", one_of_a_kind([*ROUTERS, None]))
def test_counts_agree_with_numel_and_the_flop_counter(name, changes):
    model = model_of(name, path="loop", **changes)
    counts = model.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    matrices = 3 if changes.get("activation") == "swiglu" else 2
    if name in (None, "switch", "hash_balanced", "hash_multi", "base"):
        assert counts["total"] - counts["active"] == (0 if name is None else (EXPERTS - 1) * matrices * 16 * 32)
    batch = some_batch()
    # the counter does not know the CPU's fused attention; the plain one is two products forward and four backward
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(model.prepare(batch)[0].tokens)
        (output.logits.square().mean() + output.aux_loss).backward()
    assert counter.get_total_flops() == model.train_flops_per_token() * batch.target.numel()


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator("rotary")).expand(2, 1, 1, 6, 8)
    q, k = rotate(q, rotary_angles(9, 8)), rotate(k, rotary_angles(9, 8))
    scores = q @ k.mT
    for offset in range(-5, 6):
        diagonal = scores[0, 0].diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(q.norm(dim=-1), q[..., :1, :].norm(dim=-1).expand(1, 1, 6))


def test_the_path_is_chosen_openly():
    cpu = torch.device("cpu")
    assert choose_path("auto", cpu, torch.float32) == "grouped_mm"
    assert choose_path("auto", cpu, torch.float64) == "loop"
    assert choose_path("loop", cpu, torch.float32) == "loop"
    with pytest.raises(ValueError, match="grouped_mm needs"):
        choose_path("grouped_mm", cpu, torch.float64)


def test_on_a_gpu_small_products_take_the_path_of_few_launches(monkeypatch):
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("models.dispatch.find_spec", lambda name: name == "triton")
    assert choose_path("auto", gpu, bf16, 8192 * 512 * 2048) == "grouped_mm"
    assert choose_path("auto", gpu, bf16, 32768 * 512 * 2048) == choose_path("auto", gpu, bf16) == "fused"
    assert choose_path("fused", gpu, bf16, 8192 * 512 * 2048) == "fused"
    monkeypatch.setattr("models.dispatch.find_spec", lambda name: None)
    assert choose_path("auto", gpu, bf16) == "grouped_mm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "divisible"),
        ({"sparse_layers": [2]}, r"layers in 0..1 \(model.num_layers - 1\); got \[2\]"),
        ({"sparse_layers": [1, 1]}, "different layers"),
        ({"num_layers": 0}, "num_layers"),
        ({"activation": "tanh"}, "activation"),
        ({"d_ff": 12}, "multiples of 8"),
    ],
)
def test_models_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_transformer(**changes)


def test_the_vocabulary_is_the_models():
    assert make_transformer()(some_batch().tokens).logits.shape == (4, LENGTH, VOCAB)


@pytest.mark.parametrize("name", one_of_a_kind([*ROUTERS, None]))
def test_a_training_step_is_one_graph(name):
    """No graph break in any router's forward and backward; the compiler's own graph runs to the same values."""
    torch.compiler.reset()
    model = shaken(model_of(name))
    batch = some_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):  # the compiler takes grouped_mm in bf16 alone
        seen = [run(batch.tokens, model.prepare(batch)[1]).logits for run in (model, compiled)]
    torch.testing.assert_close(*seen, atol=0.05, rtol=0.05)
    seen[1].square().mean().backward()
