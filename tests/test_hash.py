import math

import pytest
import torch
from conftest import EXPERTS, LENGTH, VOCAB, make_site, make_transformer, model_of, shaken, some_baseline, some_batch
from safetensors.torch import save_file

from data.batches import make_batch
from data.randomness import generator, mix
from data.tokenizer import BEGIN, END
from routers.cluster_tables import clusters
from routers.features import BIGRAM_PRIME, FEATURES
from routers.gated_hash import GatedHash
from routers.hash import TABLES, Hash
from routers.routing import load_of
from routers.tables import Keys, balance_bound, balanced_table, distilled_table, modulo_table, random_table

HIDDEN = torch.zeros(4, LENGTH, 16)


def make_hash(feature="token", table="balanced", num_hashes=1, per_layer=True, buckets=64, file=None, **site) -> Hash:
    return Hash(make_site(**site), feature, table, num_hashes, per_layer, buckets, file)


def keys_of(counts, experts=EXPERTS, k=1, name="table", **site) -> Keys:
    return Keys(torch.as_tensor(counts), make_site(num_experts=experts, **site), generator(name), k, None)


ZIPF = (1e6 / torch.arange(1, 1025)).long()


def test_a_hash_sends_equal_tokens_to_equal_experts_with_weight_one():
    router, batch = make_hash(), some_batch()
    routing = router(HIDDEN, batch.tokens)
    assert torch.equal(routing.expert, router.table[batch.tokens.id.reshape(-1), 0])
    assert torch.equal(routing.weight, torch.ones(48))
    assert float(routing.aux_loss) == 0
    assert not list(router.parameters())
    assert "table" in router.state_dict()


# features


def window(*ids):
    token = torch.tensor([ids])
    document = torch.cumsum(token == END, 1) - (token == END).long()
    return make_batch(token, document, torch.ones(1, len(ids) - 1, dtype=torch.bool), torch.zeros(1).long()).tokens


def keys_by(feature, tokens, buckets=64, **site):
    return FEATURES[feature](make_site(**site), buckets)(tokens)[0].tolist()


def test_features_by_hand_look_back_to_the_documents_begin_and_no_further():
    tokens = window(5, 7, END, 9, 5)  # the last is a target only; a document ends at index 2
    assert keys_by("token", tokens) == [5, 7, END, 9]
    assert keys_by("previous", tokens) == [BEGIN, 5, 7, BEGIN]
    assert keys_by("next_token", tokens) == [7, END, END, 5]
    assert keys_by("position", tokens) == [0, 1, 2, 3]
    pairs = [(BEGIN, 5), (5, 7), (7, END), (BEGIN, 9)]
    assert keys_by("bigram", tokens) == [int(mix(torch.tensor(a), b, 0)) % 64 for a, b in pairs]
    assert keys_by("bigram_mod", tokens, 4) == [(b % 4 + BIGRAM_PRIME * (a % 4)) % 4 for a, b in pairs]
    assert keys_by("predicted", tokens._replace(predicted=tokens.id + 1)) == [6, 8, 1, 10]


def test_bigram_mod_cannot_part_tokens_of_one_residue_but_bigram_can():
    one, other = window(3, 8, 0), window(3 + 4, 8 + 4, 0)
    assert keys_by("bigram_mod", one, 4) == keys_by("bigram_mod", other, 4)
    assert keys_by("bigram", one, 4096) != keys_by("bigram", other, 4096)
    assert keys_by("bigram", one, 4096) != keys_by("bigram", one, 4096, seed=1)


def test_split_parts_heavy_tokens_by_the_token_before_and_no_others():
    counts = torch.ones(VOCAB, dtype=torch.long)
    counts[7] = 100  # 100 / 139 > 1 / 8
    tokens = window(5, 7, 9, 7, 5)
    keys = keys_by("split", tokens, 64, token_counts=counts)
    assert [keys[0], keys[2]] == [5, 9]
    assert [keys[1], keys[3]] == [VOCAB + int(mix(torch.tensor(a), 0)) % 64 for a in (5, 9)]
    feature = FEATURES["split"](make_site(token_counts=counts), 64)
    assert feature.size == VOCAB + 64
    assert "heavy" in feature.state_dict()


def test_a_table_that_asks_for_no_frequency_does_not_read_the_training_text():
    def text():
        read.append(1)
        return [some_batch()]

    for name, times in (("random", 0), ("modulo", 0), ("balanced", 1)):
        read: list[int] = []
        make_hash("bigram", name, training_text=text)
        assert len(read) == times


def test_keys_are_counted_over_the_real_tokens_of_the_training_text():
    batch = some_batch(padding=5)
    for name in ("previous", "next_token", "bigram", "bigram_mod", "split"):
        feature = FEATURES[name](make_site(training_text=lambda: [batch, batch]), 32)
        expected = torch.bincount(feature(batch.tokens)[batch.tokens.real], minlength=feature.size)
        assert torch.equal(feature.counts(), 2 * expected)
    assert torch.equal(FEATURES["position"](make_site(), 1).counts(), torch.ones(LENGTH).long())


@pytest.mark.parametrize("feature", FEATURES)
def test_only_the_oracle_sees_the_future_and_declares_it(feature):
    router, batch = make_hash(feature, "random"), some_batch()
    changed = some_batch(seed=1)
    half = LENGTH // 2
    mixed = [torch.cat([a[:, :half], b[:, half:]], 1) for a, b in zip(batch.tokens[:5], changed.tokens[:5])]
    mixed[2][:, half - 1] = changed.tokens.next[:, half - 1]
    mixed = batch.tokens._replace(id=mixed[0], previous=mixed[1], next=mixed[2])
    past = [router(HIDDEN, t).expert.view(4, -1)[:, :half] for t in (batch.tokens, mixed)]
    assert torch.equal(*past) != bool(router.leaks)
    assert bool(router.leaks) == (feature == "next_token")


# tables


def test_balanced_loads_reach_the_bound():
    zipf = (1e6 / torch.arange(1, 2001)).long()
    share = int(zipf[0]) / int(zipf.sum())
    for experts in (4, 8, 64):
        load = torch.zeros(experts).long().scatter_add_(0, balanced_table(keys_of(zipf, experts))[:, 0], zipf)
        reached = float(load.max() * experts / load.sum())
        bound = balance_bound(zipf, experts)
        assert bound >= max(1, share * experts) - 1e-9
        assert bound - 1e-6 <= reached <= bound * 1.01
    # by hand: shares 5/8, 1/8, 1/8, 1/8 on two experts: the first alone has 1.25 times the mean
    assert balance_bound(torch.tensor([5, 1, 1, 1]), 2) == pytest.approx(1.25)
    assert balance_bound(torch.tensor([1, 1, 1]), 2) == pytest.approx(4 / 3)
    table = balanced_table(keys_of([5, 1, 1, 1], 2))[:, 0]
    assert len(set(table[1:].tolist())) == 1
    assert table[0] != table[1]


def test_k_experts_of_a_key_are_different_and_balanced_to_the_bound():
    for draw in (random_table, modulo_table, balanced_table):
        table = draw(keys_of(ZIPF, 8, k=3))
        assert table.shape == (1024, 3)
        assert all(len(set(row)) == 3 for row in table.tolist())
    load = torch.zeros(8).long().scatter_add_(0, table.flatten(), ZIPF.repeat_interleave(3))
    assert float(load.max() * 8 / load.sum()) <= balance_bound(ZIPF, 8, 3) * 1.01


def test_random_tables_are_uniform_and_modulo_is_modulo():
    table = random_table(keys_of(torch.ones(64000), 16))[:, 0]
    load = torch.bincount(table, minlength=16).double()
    assert ((load - 4000) ** 2 / 4000).sum() < 37.7  # chi-squared with 15 degrees of freedom, p = 0.001
    assert modulo_table(keys_of(torch.ones(6), 4))[:, 0].tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("experts", [8, 64])
def test_two_balanced_draws_agree_on_pairs_at_chance(experts):
    counts = ZIPF.clone()
    counts[-100:] = 0  # entries that training never shows
    first, second = (balanced_table(keys_of(counts, experts, name=f"draw {i}"))[:, 0] for i in range(2))
    light = slice(2 * experts, None)  # heavy ones aside
    pairs = [t[light, None] == t[None, light] for t in (first, second)]
    upper = torch.ones_like(pairs[0]).triu(1)
    both, one = (pairs[0] & pairs[1] & upper).sum(), (pairs[0] & upper).sum()
    expected = float((pairs[1] & upper).sum() / upper.sum())
    deviation = (expected * (1 - expected) / float(one)) ** 0.5
    assert abs(float(both / one) - expected) < 5 * deviation + 0.01 * expected


class Planted(torch.nn.Module):
    """A baseline whose embeddings lie at four corners, tokens 0..9, 10..19, 20..29 and 30..39 together."""

    def __init__(self):
        super().__init__()
        corners = 10 * torch.eye(4, 16).repeat_interleave(10, 0)
        self.embedding = torch.nn.Parameter(corners + 0.1 * torch.randn(40, 16, generator=generator("noise")))


def test_clusters_are_those_of_the_embeddings_and_dispersing_parts_them():
    counts = torch.arange(40, 0, -1)
    planted = {"baseline": Planted(), "token_counts": counts}
    cluster = make_hash(table="clustered", **planted).table[:, 0].view(4, 10)
    assert torch.equal(cluster, cluster[:, :1].expand(4, 10))
    assert len(set(cluster[:, 0].tolist())) == 4
    for name in ("dispersed", "dispersed_unbalanced"):
        table = make_hash(table=name, **planted).table[:, 0].view(4, 10)
        for of_a_cluster in table:  # 10 tokens on 4 experts: 3, 3, 2, 2
            assert sorted(torch.bincount(of_a_cluster, minlength=4).tolist()) == [2, 2, 3, 3]
    loads = {}
    for name in ("clustered", "clustered_balanced", "dispersed", "dispersed_unbalanced"):
        table = make_hash(table=name, **planted).table[:, 0]
        load = torch.zeros(4).long().scatter_add_(0, table, counts)
        loads[name] = float(load.max() * 4 / load.sum())
    assert loads["clustered"] == pytest.approx(355 * 4 / 820)  # 40 + 39 + ... + 31, of 820
    assert loads["clustered_balanced"] < 1.1
    assert loads["dispersed"] < 1.1 < loads["clustered"]


def test_dispersed_and_balanced_clusters_by_hand():
    # one cluster of four and one of two, counts falling: tokens 0..3 part over both experts by fewest, then least load
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Parameter(torch.tensor([[0.0], [0.1], [0.2], [0.1], [9.0], [9.1]]))

    site = make_site(num_experts=2, vocab_size=6, token_counts=torch.tensor([9, 8, 7, 6, 5, 4]), baseline=Two())
    # balanced: 0 and 1 fill a cluster to 17 of 19.5; 2, 3 and 4 find room in the other; 5 nowhere, so the emptier
    first, second, *rest = TABLES["clustered_balanced"](Keys(site.token_counts, site, generator("x"), 1, None))[:, 0]
    assert [bool(expert == first) for expert in (second, *rest)] == [True, False, False, False, True]
    table = TABLES["dispersed"](Keys(site.token_counts, site, generator("x"), 1, None))[:, 0].tolist()
    # 0 -> expert 0 (load 9), 1 -> expert 1 (8); equal members, least load: 2 -> 1 (15), 3 -> 0 (15); 4 -> 0, 5 -> 1
    assert table == [0, 1, 1, 0, 0, 1]


def test_clusters_are_the_same_twice():
    keys = [keys_of(torch.ones(VOCAB).long(), baseline=Planted()) for _ in range(2)]
    assert torch.equal(clusters(keys[0])[0], clusters(keys[1])[0])


def test_a_distilled_table_is_the_teachers_most_frequent_expert():
    batch = some_batch(16, seed=9)
    site = make_site(training_text=lambda: [batch, batch])
    table = distilled_table(Keys(site.token_counts, site, generator("x"), 1, None))[:, 0]
    routing = some_baseline(EXPERTS)(batch.tokens).routings[site.layer]
    for token in batch.tokens.id.unique().tolist():
        votes = torch.bincount(routing.expert[batch.tokens.id.flatten() == token], minlength=EXPERTS)
        assert votes[table[token]] == votes.max()
    with pytest.raises(ValueError, match="routed layer 7 with 4 experts"):
        make_hash(table="distilled", layer=7, sparse_layers=(7,))


def test_a_table_of_each_layer_or_one_for_all():
    own = [make_hash(table="random", layer=layer).table for layer in (0, 1)]
    shared = [make_hash(table="random", layer=layer, per_layer=False).table for layer in (0, 1)]
    assert not torch.equal(*own)
    assert torch.equal(*shared)
    assert not torch.equal(shared[0], make_hash(table="random", per_layer=False, seed=1).table)


def test_tables_are_the_same_on_every_machine():
    golden = [make_hash(table=name).table[:8, 0].tolist() for name in ("random", "balanced", "modulo")]
    assert golden == GOLDEN_TABLES


GOLDEN_TABLES = [[2, 3, 2, 3, 1, 2, 1, 1], [2, 3, 0, 1, 0, 3, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]


def test_a_table_comes_from_a_file_and_is_checked(tmp_path):
    path = tmp_path / "table.safetensors"
    table = torch.arange(VOCAB)[:, None] % EXPERTS
    save_file({"tid2eid": table}, path)
    assert torch.equal(make_hash(table="file", file=str(path)).table, table)
    for bad, message in (
        ({"tid2eid": table[:-1]}, r"tid2eid must be \(keys, experts of a key\) = \(40, 1\); got \(39, 1\)"),
        ({"tid2eid": table + 1}, r"a table must hold experts 0..3; got 1..4"),
        ({"table": table}, "no safetensors file with a tensor tid2eid"),
    ):
        save_file(bad, path)
        with pytest.raises(ValueError, match=message):
            make_hash(table="file", file=str(path))
    with pytest.raises(ValueError, match="router.file=nowhere"):
        make_hash(table="file", file="nowhere")


def test_a_loaded_table_is_checked():
    router = make_hash()
    with pytest.raises(ValueError, match="a table must hold experts 0..3"):
        router.load_state_dict({"table": router.table + 1})


def test_what_is_unknown_or_missing_is_refused():
    for options, message in (
        ({"feature": "colour"}, "router.feature must be one of token, previous, .*; got colour"),
        ({"table": "round"}, "router.table must be one of"),
        ({"buckets": 0}, "router.buckets must be at least 1; got 0"),
        ({"num_hashes": 0}, "router.num_hashes must be at least 1; got 0"),
        ({"num_experts": 64}, "num_experts must be at most the vocabulary's 40; got 64"),
        ({"table": "clustered", "baseline": None}, "router.table=clustered needs router.baseline=.*router=dense"),
        ({"table": "distilled", "baseline": None}, "router.table=distilled needs router.baseline=.*a learned router"),
        ({"feature": "predicted", "baseline": None}, "router.feature=predicted needs router.baseline="),
        ({"feature": "position", "table": "clustered"}, "needs a feature whose keys are tokens; got position"),
    ):
        with pytest.raises(ValueError, match=message):
            make_hash(**options)


# multi-hash and gates


def test_multi_hash_draws_are_independent_and_each_segments_load_is_reported():
    router, batch = make_hash(table="random", num_hashes=4), some_batch(padding=3)
    columns = router.table.T
    assert not any(torch.equal(columns[i], columns[j]) for i in range(4) for j in range(i))
    assert torch.equal(columns[0], make_hash(table="random").table[:, 0])
    report = router(HIDDEN, batch.tokens).report
    real = batch.tokens.id[batch.tokens.real]
    for n in range(4):
        load = torch.bincount(columns[n][real], minlength=EXPERTS)
        assert float(report[f"segment_{n}/max_over_mean"]) == pytest.approx(float(load.max() * 4 / load.sum()))


GATED = {"feature": "token", "table": "balanced", "k": 2, "gate": "sqrt_softplus", "per_layer": True}
GATED |= {"buckets": 64, "file": None}


def test_a_gated_hash_weighs_the_tables_experts_by_hand():
    batch = some_batch(padding=2)
    router = shaken(GatedHash(make_site(), **GATED))
    hidden = torch.randn(4, LENGTH, 16, generator=generator("hidden"))
    routing = router.requires_grad_(False)(hidden, batch.tokens)
    experts = router.table[batch.tokens.id[1, 3]].tolist()
    scores = [math.sqrt(math.log1p(math.exp(float(hidden[1, 3] @ router.gate[e])))) for e in experts]
    at = 2 * (LENGTH + 3)
    assert routing.expert[at : at + 2].tolist() == experts
    assert routing.weight[at : at + 2].tolist() == pytest.approx([s / sum(scores) for s in scores], rel=1e-5)
    assert routing.weight.view(4, LENGTH, 2)[-1, -2:].tolist() == [[0.0, 0.0]] * 2
    alone = shaken(GatedHash(make_site(), **GATED | {"k": 1}))(hidden, batch.tokens)
    assert float(alone.weight[0].detach()) != 1.0  # with k = 1 not divided by itself
    switch = shaken(GatedHash(make_site(), **GATED | {"k": 1, "gate": "softmax"}))
    p = (hidden @ switch.requires_grad_(False).gate.T).softmax(-1)[0, 0]
    assert float(switch(hidden, batch.tokens).weight[0]) == pytest.approx(
        float(p[switch.table[batch.tokens.id[0, 0], 0]]), rel=1e-5
    )


def test_a_gated_hash_refuses_what_does_not_fit():
    for options, message in (
        ({"k": 5}, "router.k must be in 1..num_experts = 4; got 5"),
        ({"gate": "max"}, "router.gate must be one of sqrt_softplus, sigmoid, softmax; got max"),
        ({"table": "clustered"}, "router.table=clustered gives each key one expert; router.k must be 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            GatedHash(make_site(), **GATED | options)


def test_the_predicted_token_is_the_baselines_argmax_and_its_compute_counts():
    def make_router(layer):
        return make_hash("predicted", "random", layer=layer, baseline=dense)

    dense = shaken(make_transformer()).eval()
    model, batch = make_transformer(make_router, baseline=dense), some_batch()
    prepared, plans = model.prepare(batch)
    assert torch.equal(prepared.tokens.predicted, dense(batch.tokens).logits.argmax(-1))
    assert plans.keys() == {1}
    forward = dense.train_flops_per_token() // 3
    plain = make_transformer(lambda layer: make_hash(layer=layer))
    assert model.train_flops_per_token() == plain.train_flops_per_token() + forward
    assert model.state_dict().keys() == plain.state_dict().keys()  # the baseline is no part of the model


def test_first_k_is_one_router_below_and_the_other_above():
    batch, hidden = some_batch(), torch.randn(4, LENGTH, 16, generator=generator("hidden"))
    model = model_of("first_k_hash", sparse_layers=[0, 1])
    below, above = (model.routers[layer] for layer in (0, 1))
    gated = GatedHash(make_site(layer=0), **GATED | {"k": 1})
    assert torch.equal(below(hidden, batch.tokens).weight, gated(hidden, batch.tokens).weight)
    assert below.plan(batch.tokens) is not None
    assert above.plan(batch.tokens) is None
    before = above(hidden, batch.tokens)
    above.after_step(load_of(before, EXPERTS), 0.5)
    assert any(not torch.equal(value, torch.zeros_like(value)) for value in above.buffers())
    with pytest.raises(ValueError, match="router.k must be at least 1 and below the 1 of model.sparse_layers; got 1"):
        model_of("first_k_hash", sparse_layers=[1])
