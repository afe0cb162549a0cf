import math

import numpy as np
import pytest
import torch
from conftest import compose_config

from data.batches import Split, TrainingBatches, evaluation_batches, make_batch
from data.prepare import Prepared
from data.randomness import mix, seed_of, uniform
from data.tokenizer import BEGIN, END
from training.job import open_run
from training.preflight import read


def prepared_of(tokens: list[int], tmp_path) -> Prepared:
    stream = np.array(tokens, dtype=np.uint16)
    return Prepared(tmp_path, "", 100, torch.ones(100, dtype=torch.int64), {"train": stream}, {})


def test_nothing_looks_across_a_document_border():
    # documents: "5 6 <end>" and "7 8 9": by hand
    window = torch.tensor([[5, 6, END, 7, 8, 9]])
    document = torch.tensor([[0, 0, 0, 1, 1, 1]])
    batch = make_batch(window, document, torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    assert batch.tokens.id.tolist() == [[5, 6, END, 7, 8]]
    assert batch.tokens.previous.tolist() == [[BEGIN, 5, 6, BEGIN, 7]]
    assert batch.target.tolist() == [[6, END, 7, 8, 9]]
    assert batch.tokens.next.tolist() == [[6, END, END, 8, 9]]
    assert batch.tokens.position.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.document.tolist() == [[0, 0, 0, 1, 1]]


def test_every_token_but_the_first_is_a_target_once(tmp_path):
    stream = [2 + i % 90 if i % 7 else END for i in range(1, 48)]  # 47 tokens, 46 targets: 4 windows of 10 and 6 more
    split = Split(prepared_of(stream, tmp_path), "train", 10)
    assert (split.full, len(split)) == (4, 5)
    batches = list(evaluation_batches(split, 4))
    seen = [t for b in batches for t in b.target[b.tokens.real].tolist()]
    assert seen == stream[1:]
    assert batches[-1].tokens.real.sum() == 6
    documents = [d for b in batches for d in b.document[b.tokens.real].tolist()]
    assert documents == [sum(t == END for t in stream[:i]) for i in range(46)]


def test_an_epoch_is_one_permutation_and_a_batch_depends_on_seed_and_step_alone(tmp_path):
    split = Split(prepared_of(list(range(2, 95)), tmp_path), "train", 4)  # 23 windows, told by their first token
    batches = TrainingBatches(split, 5, seed=3)
    firsts = torch.cat([batches.batch(step).tokens.id[:, 0] for step in range(14)]).tolist()
    every = [2 + 4 * i for i in range(23)]
    epochs = [firsts[23 * i : 23 * (i + 1)] for i in range(3)]
    assert all(sorted(epoch) == every for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for step in (13, 0, 7):  # in any order, from any object
        assert torch.equal(TrainingBatches(split, 5, seed=3).batch(step).tokens.id, batches.batch(step).tokens.id)
    assert not torch.equal(TrainingBatches(split, 5, seed=4).batch(0).tokens.id, batches.batch(0).tokens.id)
    keys = torch.cat([batches.batch(step).tokens.key for step in range(14)])
    assert len(keys.unique()) == 70


def test_a_split_shorter_than_a_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="5 tokens, fewer than one window of data.sequence_length [+] 1 = 6"):
        Split(prepared_of([2, 3, 4, 5, 6], tmp_path), "train", 5)


def test_batches_are_the_same_for_every_router(tiny):
    runs = [open_run(read(compose_config(f"router={name}", *tiny))) for name in ("dense", "switch", "hash_balanced")]
    batches = [TrainingBatches(r.splits["train"], 4, r.settings.seed).batch(2) for r in runs]
    assert len({r.folder for r in runs}) == 3
    for batch in batches[1:]:
        assert torch.equal(batch.tokens.id, batches[0].tokens.id)
        assert torch.equal(batch.tokens.key, batches[0].tokens.key)


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood's generator in plain integers: the oracle of mix for one key."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def test_mix_is_splitmix64_and_uniform_is_uniform():
    keys = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    assert [v % 2**64 for v in mix(keys).tolist()] == [splitmix64(k % 2**64) for k in keys.tolist()]
    assert mix(keys, 5).tolist() != mix(5, keys).tolist()
    draws = uniform(torch.arange(200)[:, None], 3, torch.arange(200)).double()
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert abs(float(draws.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 40000)
    rows = draws.mean(0)
    assert float(rows.std()) == pytest.approx(math.sqrt(1 / 12 / 200), rel=0.2)


def test_seeds_are_the_same_on_every_machine():
    assert seed_of(0, "name") == GOLDEN
    assert seed_of(0, "name") != seed_of("0", "name") != seed_of(0, "nam", "e")


GOLDEN = 2513154624479341258
