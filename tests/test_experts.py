import re

import pytest
import torch
from conftest import EXPERTS, LENGTH, WIDTH, compose_config, make_site, make_transformer, shaken, some_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, relu, silu
from torch.utils.flop_counter import FlopCounterMode

from data.randomness import generator
from models.blocks import Inserted
from models.experts import Experts, SegmentedExperts, StackedExperts
from models.feedforward import FeedForward, SparseFeedForward
from models.settings import ModelSettings
from routers.base_layers import BalancedAssignment
from routers.gated_hash import GatedHash
from routers.hash import Hash
from routers.routing import Router, some_each
from training.optimizer import make_optimizer
from training.settings import TrainSettings

F = 32
ACTS = {"relu": relu, "gelu": gelu}


class Fixed(Router):
    """Routes as it is told: expert and weight (B, S, k)."""

    def __init__(self, expert, weight, segments=1):
        super().__init__(make_site())
        self.expert, self.weight = expert, weight
        self.experts_per_token, self.segments = expert.shape[-1], segments

    def forward(self, hidden, tokens):
        return some_each(self.expert, self.weight)


def drawn(*shape, name="x"):
    return torch.randn(*shape, generator=generator(name), dtype=torch.float64)


def some_experts(k=1):
    return torch.randint(EXPERTS - 1, (4, LENGTH, k), generator=generator("experts"))  # the last has no token


def gated(kind, experts, read):
    """act of what read(matrices) gives of w_in, times w_in's own with swiglu."""
    inner = read(experts.w_in)
    return silu(read(experts.w_gate)) * inner if kind == "swiglu" else ACTS[kind](inner)


def assert_same_with_gradients(seen, inputs, tolerance=1e-12):
    torch.testing.assert_close(*seen, atol=tolerance, rtol=tolerance)
    direction = torch.linspace(-1, 1, seen[0].numel(), dtype=seen[0].dtype).view_as(seen[0])
    gradients = [torch.autograd.grad((y * direction).sum(), inputs) for y in seen]
    for one, other in zip(*gradients, strict=True):
        assert bool(other.any())
        torch.testing.assert_close(one, other, atol=20 * tolerance, rtol=20 * tolerance)


def hash_router(layer=1, num_hashes=1, num_experts=EXPERTS, **site):
    site = make_site(layer=layer, num_experts=num_experts, sparse_layers=(1,), **site)
    return Hash(site, "token", "balanced", num_hashes, True, 64, None)


def gated_hash(layer=1, k=2):
    return GatedHash(make_site(layer=layer), "token", "balanced", k, "sigmoid", True, 64, None)


def base(layer=1, **site):
    return BalancedAssignment(make_site(layer=layer, **site), "auto")


STACK = {"kind": StackedExperts, "options": {"sublayers": 2}, "placement": "insert"}


def multi(segments, activation="relu", **changes):
    parts = {"kind": SegmentedExperts, "options": {"segments": segments}, "activation": activation}
    return make_transformer(lambda layer: hash_router(layer, segments), d_ff=64, **parts | changes)


# stacks and inserted layers


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_an_inserted_stack_equals_its_definition_row_by_row_with_all_gradients(activation):
    """y = h + g_a (stack_a(h) - h), stack_a: z = z + ffn(gain * (z - mean) / deviation), sub-layer after sub-layer."""
    experts = shaken(StackedExperts(EXPERTS, WIDTH, F, activation, sublayers=3)).double()
    weight = drawn(4, LENGTH, 1, name="weight").sigmoid().requires_grad_()
    expert, h = some_experts(), drawn(4, LENGTH, WIDTH).requires_grad_()
    layer = Inserted(SparseFeedForward(experts, Fixed(expert, weight), None, "loop"))
    y, routing = layer(h, some_batch().tokens, None)

    by_hand = []
    for row, a, g in zip(h.flatten(0, 1), expert.flatten(), weight.flatten()):
        z = row
        for sublayer in experts.sublayers:
            normed = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * sublayer.gain[a]
            z = z + gated(activation, sublayer, lambda w, x=normed, a=a: x @ w[a]) @ sublayer.w_out[a]
        by_hand.append(g * z + (1 - g) * row)
    assert routing is not None
    assert_same_with_gradients([y.flatten(0, 1), torch.stack(by_hand)], [h, weight, *experts.parameters()], 1e-10)


def test_the_inserted_layer_reads_and_routes_on_the_raw_residual_stream():
    model, seen = shaken(make_transformer(base, **STACK)), {}
    model.routers[1].register_forward_pre_hook(lambda _, inputs: seen.update(routed=inputs[0]))
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.update(stream=output[0]))
    model(some_batch().tokens)
    assert torch.equal(seen["routed"], seen["stream"])
    assert all(isinstance(block.ffn, FeedForward) for block in model.blocks)


def test_bases_centroid_and_gate_act_on_the_stream_as_defined():
    layer = shaken(make_transformer(base, path="loop", **STACK)).double().eval().inserted["1"]
    h, tokens = drawn(4, LENGTH, WIDTH).requires_grad_(), some_batch().tokens
    centroids = layer.ffn.router.centroids
    by_hand = []
    for row in h.flatten(0, 1):
        a = int((row @ centroids.T).argmax())
        z = row
        for sublayer in layer.ffn.experts.sublayers:
            normed = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * sublayer.gain[a]
            z = z + relu(normed @ sublayer.w_in[a]) @ sublayer.w_out[a]
        by_hand.append(row + (row @ centroids[a]).sigmoid() * (z - row))
    y, _ = layer(h, tokens, None)
    assert_same_with_gradients([y.flatten(0, 1), torch.stack(by_hand)], [h, *layer.parameters()], 1e-10)


@pytest.mark.parametrize("make_router", [base, None])
@pytest.mark.parametrize("path", ["loop", "grouped_mm"])
def test_a_fresh_inserted_layer_changes_nothing_and_learns(make_router, path):
    model, without = make_transformer(make_router, path=path, **STACK), make_transformer()
    batch = some_batch(padding=3)
    output = model(batch.tokens)
    assert torch.equal(output.logits, without(batch.tokens).logits)
    output.logits.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if name.startswith("inserted.")}
    assert all(bool(grad.any()) for name, grad in grads.items() if name.endswith("w_out"))


def test_a_stack_starts_at_zero_and_at_gain_one_whatever_the_seed():
    for seed in (0, 1):
        model = make_transformer(base, seed=seed, **STACK)
        for sublayer in model.sparse[1].experts.sublayers:
            assert not sublayer.w_out.any()
            assert bool((sublayer.gain == 1).all())
            assert float(sublayer.w_in.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_one_stacked_expert_of_weight_one_equals_the_dense_inserted_layer():
    def one_expert(layer):
        return hash_router(layer, num_experts=1)

    sparse, dense = (
        shaken(make_transformer(make_router, num_experts=1, path="loop", **STACK)).double()
        for make_router in (one_expert, None)
    )
    assert not torch.equal(dense.blocks[1].ffn.experts.w_out, make_transformer().blocks[1].ffn.experts.w_out)
    outputs = [model(some_batch().tokens).logits for model in (sparse, dense)]
    torch.testing.assert_close(*outputs, atol=1e-9, rtol=1e-9)
    for logits in outputs:
        logits.square().mean().backward()
    named = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, atol=1e-7, rtol=1e-7, msg=name)


def test_a_dense_inserted_layer_starts_as_expert_0_of_the_routed_one():
    routed, dense = (dict(make_transformer(make, **STACK).named_parameters()) for make in (base, None))
    for name, value in dense.items():
        assert torch.equal(value, routed[name][: len(value)]), name
    assert {name.replace("router.centroids", "") for name in routed} - set(dense) == {"inserted.1.ffn."}


def test_the_gains_of_a_stack_do_not_decay():
    model = make_transformer(base, **STACK)
    optimizer = make_optimizer(model, TrainSettings(**compose_config().train))
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for sublayer in model.sparse[1].experts.sublayers:
        assert sublayer.gain not in decayed
        assert sublayer.w_in in decayed


# multi-hash


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("segments", [1, 2, 4])
def test_segmented_experts_equal_a_loop_over_tokens_with_all_gradients(segments, activation):
    width, f = 8 * segments, 16 * segments
    experts = shaken(SegmentedExperts(EXPERTS, width, f, activation, segments)).double()
    expert, h = some_experts(segments), drawn(4, LENGTH, width).requires_grad_()
    ones = torch.ones(expert.shape, dtype=torch.float64)
    layer = SparseFeedForward(experts, Fixed(expert, ones, segments), None, "loop")
    y, _ = layer(h, some_batch().tokens, None)

    by_hand = []
    for row, chosen in zip(h.flatten(0, 1), expert.flatten(0, 1)):

        def side_by_side(x, weight, chosen=chosen):
            return torch.cat([x @ weight[k, n] for n, k in enumerate(chosen)])

        v = gated(activation, experts, lambda w, x=row, read=side_by_side: read(x, w))
        by_hand.append(side_by_side(v, experts.w_out))
    assert y.shape == h.shape
    assert_same_with_gradients([y.flatten(0, 1), torch.stack(by_hand)], [h, *experts.parameters()], 1e-11)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_multi_hashs_grouped_path_equals_the_loop(segments, activation):
    grouped, looped = (shaken(multi(segments, activation, path=path)) for path in ("grouped_mm", "loop"))
    batch = some_batch(padding=3)
    outputs = [model(batch.tokens).logits for model in (grouped, looped)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_one_segment_equals_a_hash_to_the_bit(activation):
    plain = make_transformer(hash_router, d_ff=64, activation=activation)
    models, batch = [multi(1, activation), plain], some_batch(padding=3)
    outputs = [model(batch.tokens).logits for model in models]
    assert torch.equal(*outputs)
    for logits in outputs:
        logits.square().sum().backward()
    for (name, one), (same, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert name == same
        assert torch.equal(one.view_as(other), other), name
        assert torch.equal(one.grad.view_as(other), other.grad), name


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_equal_tables_make_multi_hash_one_hash_of_the_same_first_values(activation):
    """Segments are cuts of the whole expert's matrices, so N hashes that agree are one."""
    plain, split = make_transformer(hash_router, d_ff=64, activation=activation), multi(2, activation)
    split.routers[1].table[:] = plain.routers[1].table
    plain, split = (model.double() for model in (plain, split))
    plain.path = split.path = "loop"
    for model in (plain, split):
        model.sparse[1].path = "loop"
    batch = some_batch()
    outputs = [model(batch.tokens).logits for model in (plain, split)]
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=1e-10)
    split.routers[1].table[:, 1] = (split.routers[1].table[:, 1] + 1) % EXPERTS
    assert float((split(batch.tokens).logits - outputs[0]).detach().abs().max()) > 1e-4


def test_every_number_of_hashes_has_the_parameters_and_flops_of_one():
    seen = set()
    for segments in (1, 2, 4, 8):
        parts = {"kind": SegmentedExperts, "options": {"segments": segments}}
        experts = SegmentedExperts(EXPERTS, 64, 128, "swiglu", segments)
        assert sum(p.numel() for p in experts.parameters()) == EXPERTS * 3 * 64 * 128
        assert experts.flops() == 2 * 3 * 64 * 128
        if segments <= 2:  # of width 16
            model = make_transformer(lambda layer, n=segments: hash_router(layer, n), d_ff=64, **parts)
            seen.add((*model.parameter_counts().values(), model.train_flops_per_token()))
    plain = make_transformer(hash_router, d_ff=64)
    assert seen == {(*plain.parameter_counts().values(), plain.train_flops_per_token())}


def test_segments_draw_tables_of_their_own_and_the_first_is_the_hashs():
    tables = hash_router(num_hashes=4).table
    assert torch.equal(tables[:, :1], hash_router().table)
    assert all(not torch.equal(tables[:, 0], tables[:, n]) for n in (1, 2, 3))


@pytest.mark.parametrize("kind", ["relu", "swiglu"])
def test_a_segmented_expert_without_dispatch_is_the_whole_one(kind):
    whole, cut = shaken(Experts(1, WIDTH, F, kind)), SegmentedExperts(1, WIDTH, F, kind, 2)
    with torch.no_grad():
        for name, parameter in cut.named_parameters():
            parameter[0] = torch.stack(getattr(whole, name)[0].chunk(2, dim=1))
    x = torch.randn(3, 5, WIDTH, generator=generator("x"))
    torch.testing.assert_close(cut.dense(x), whole.dense(x))


@pytest.mark.parametrize("segments", [0, 3, 4])
def test_segments_that_do_not_divide_the_sizes_are_refused(segments):
    rule = "experts.segments (one to each table) must be at least 1 and divide model.d_model and model.d_ff into"
    with pytest.raises(ValueError, match=re.escape(f"{rule} multiples of 8; got {segments}, 16 and 32")):
        SegmentedExperts(EXPERTS, WIDTH, F, "relu", segments)


def test_a_router_of_other_segments_than_the_experts_is_refused():
    with pytest.raises(ValueError, match=r"experts.segments must be as many as the router asks for.*: 2; got 1"):
        make_transformer(lambda layer: hash_router(layer, 2))


def test_a_stack_without_sublayers_is_refused():
    with pytest.raises(ValueError, match="experts.sublayers must be at least 1; got 0"):
        StackedExperts(EXPERTS, WIDTH, F, "relu", 0)


# shared experts


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize(("k", "num_shared"), [(1, 1), (2, 2), (1, 3)])
def test_shared_experts_are_added_and_widths_are_divided(k, num_shared, activation):
    parts = {"num_shared": num_shared, "activation": activation, "path": "loop", "d_ff": 128}
    model = make_transformer(lambda layer: gated_hash(layer, k), **parts)
    layer = shaken(model).double().sparse[1]
    each = 128 // (k + num_shared)
    assert layer.experts.w_in.shape == (EXPERTS, WIDTH, each)
    assert layer.shared.w_in.shape == (1, WIDTH, num_shared * each)
    h, tokens = drawn(4, LENGTH, WIDTH).requires_grad_(), some_batch(padding=3).tokens
    (y, _), routing, rows = layer(h, tokens, None), layer.router(h, tokens), h.flatten(0, 1)
    by_hand = list(gated(activation, layer.shared, lambda w: rows @ w[0]) @ layer.shared.w_out[0])
    for token, a, weight in zip(routing.token, routing.expert, routing.weight):
        inner = gated(activation, layer.experts, lambda w, x=rows[token], a=a: x @ w[a])
        by_hand[token] = by_hand[token] + weight * (inner @ layer.experts.w_out[a])
    assert_same_with_gradients([y.flatten(0, 1), torch.stack(by_hand)], [h, *layer.parameters()], 1e-11)


def test_a_width_that_cannot_be_divided_is_refused():
    with pytest.raises(
        ValueError, match="model.d_ff must split into 3 experts of a width that is a multiple of 8; got 32"
    ):
        make_transformer(lambda layer: gated_hash(layer, 2), num_shared=1)


# counts

FFN = 16 * 64  # a matrix of the plain FFN at width 16, F 64
COUNTED = {  # what: make_router, changes, matrices of F x D that idle, that stand beside the dense model's
    "replace": (hash_router, {}, 3, 3),
    "base in place": (base, {}, 3, 3),
    "k = 2": (gated_hash, {}, 1, 1),  # four experts of half the width
    "k = 2 and two shared": (gated_hash, {"num_shared": 2}, 0.5, 0.5),  # four of a quarter, and half an FFN for all
    "k = 1 and one shared": (lambda layer: gated_hash(layer, 1), {"num_shared": 1}, 1.5, 1.5),
    "one segment": (hash_router, {"kind": SegmentedExperts, "options": {"segments": 1}}, 3, 3),
    "two segments": (
        lambda layer: hash_router(layer, 2),
        {"kind": SegmentedExperts, "options": {"segments": 2}},
        3,
        3,
    ),
    "two segments and one shared": (
        lambda layer: hash_router(layer, 2),
        {"kind": SegmentedExperts, "options": {"segments": 2}, "num_shared": 1},
        1.5,
        1.5,
    ),
    "inserted": (hash_router, {"placement": "insert"}, 3, 4),
    "inserted base": (base, STACK, 6, 8),
    "dense, inserted": (None, STACK, 0, 2),
    "dense, an FFN inserted": (None, {"placement": "insert"}, 0, 1),
}


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("what", COUNTED)
def test_counts_agree_with_numel_by_hand_and_the_flop_counter(what, activation):
    make_router, changes, idle, more = COUNTED[what]
    matrices = 3 if activation == "swiglu" else 2
    model = make_transformer(make_router, path="loop", d_ff=64, activation=activation, **changes)
    dense = make_transformer(d_ff=64, activation=activation).parameter_counts()["total"]
    counts = model.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    gains = 2 * WIDTH if changes is STACK else 0  # of one expert: two sub-layers' norms
    routed = sum(p.numel() for router in model.routers.values() for p in router.parameters())
    experts = EXPERTS if make_router else 1
    assert counts["total"] == dense + matrices * FFN * more + gains * experts + routed
    assert counts["total"] - counts["active"] == matrices * FFN * idle + gains * (experts - 1)
    batch = some_batch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(batch.tokens)
        (output.logits.square().mean() + output.aux_loss).backward()
    assert counter.get_total_flops() == model.train_flops_per_token() * batch.target.numel()


# dense at equal compute and at equal parameters


def scaled_of(name, *words) -> ModelSettings:
    node = compose_config(f"router={name}", *words).model
    return ModelSettings(**{str(key): value for key, value in node.items()}).scaled()


def test_wider_and_deeper_are_the_papers_sizes():
    paper = ["model.num_layers=11", "model.d_model=1024", "model.d_ff=4096", "model.num_heads=16"]
    for name, sizes in (("dense_wider", (11, 2048, 6144, 32)), ("dense_deeper", (22, 1536, 4096, 24))):
        settings = scaled_of(name, *paper)
        assert (settings.num_layers, settings.d_model, settings.d_ff, settings.num_heads) == sizes
    smoke = scaled_of("dense_deeper")
    assert (smoke.num_layers, smoke.d_model, smoke.d_ff, smoke.num_heads) == (6, 192, 512, 6)
    for name in ("dense", "dense_wider", "dense_deeper"):
        for scale in ("smoke", "small"):
            scaled_of(name, f"scale={scale}").check()


def make_settings(**changes) -> ModelSettings:
    sizes = {"num_layers": 2, "d_model": 640, "d_ff": 32, "num_heads": 10, "norm": "layernorm", "dispatch": "auto"}
    sizes |= {"positions": "rotary", "activation": "relu", "sparse_layers": [1], "placement": "replace"}
    return ModelSettings(**sizes | changes)


def test_factors_are_applied_once_and_whole_sizes_survive_rounding():
    settings = make_settings(width_factor=1.1, depth_factor=2, ff_factor=0.25).scaled()  # 640 * 1.1 = 704.0000000000001
    assert (settings.num_layers, settings.d_model, settings.d_ff, settings.num_heads) == (4, 704, 8, 11)
    assert all(isinstance(size, int) for size in (settings.num_layers, settings.d_model, settings.d_ff))
    assert settings.scaled() == settings
    assert make_settings().scaled() == make_settings()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"width_factor": 1.25},
            "model.num_heads times model.width_factor must be a whole number above 0; got 10 * 1.25",
        ),
        ({"ff_factor": 0.33}, "model.d_ff times model.ff_factor must be a whole number above 0; got 32 * 0.33"),
        ({"depth_factor": 0}, "model.num_layers times model.depth_factor must be a whole number above 0; got 2 * 0"),
        ({"width_factor": -1.0}, "model.d_model times model.width_factor"),
        ({"ff_factor": float("nan")}, "model.d_ff times model.ff_factor"),
        ({"ff_factor": float("inf")}, "model.d_ff times model.ff_factor"),
    ],
)
def test_factors_that_leave_no_whole_size_are_refused(changes, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        make_settings(**changes).scaled()
    assert str(raised.value).startswith(message)


def test_the_yamls_compose_to_what_they_say():
    inserted, floor = (compose_config(f"router={name}") for name in ("base_inserted", "dense_inserted"))
    for config in (inserted, floor):
        assert config.experts["_target_"] == "models.experts.StackedExperts"
        assert config.model.placement == "insert"
    assert inserted.router == {"_target_": "routers.base_layers.BalancedAssignment", "solver": "auto"}
    assert floor.router == {"_target_": None}
    assert compose_config("router=hash_multi", "router.num_hashes=8").experts.segments == 8
