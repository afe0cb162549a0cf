import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import VOCAB, compose_config, make_transformer, shaken

from data.batches import Split, TrainingBatches, evaluation_batches, make_batch
from data.prepare import Prepared
from data.randomness import generator, mix, seed_of, uniform
from data.tokenizer import BEGIN, END
from training.evaluation import evaluate, token_losses
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


def test_a_part_of_a_split_is_evenly_spread_and_the_same_each_time(tmp_path):
    split = Split(prepared_of([2 + i % 90 for i in range(1, 48)], tmp_path), "train", 5)  # 10 windows, the last short
    whole = {int(b.tokens.key[row]): b.target[row] for b in evaluation_batches(split, 4) for row in range(4)}
    assert split.spread(4).tolist() == [0, 2, 5, 7] and split.spread(99).tolist() == list(range(10))
    part = list(evaluation_batches(split, 3, 4))
    assert [bool(b.tokens.real[row].any()) for b in part for row in range(3)] == [True] * 4 + [False] * 2
    for number, row in zip((0, 2, 5, 7), (row for b in part for row in b.target)):
        assert any(torch.equal(row, target) for target in whole.values()) and row[0] == 2 + (5 * number + 2) % 90
    again = list(evaluation_batches(split, 3, 4))
    assert all(torch.equal(one.target, other.target) for one, other in zip(part, again))


def test_a_loss_belongs_to_the_document_of_its_target(tmp_path):
    model = make_transformer()
    stream = [5, 6, END, 7, 8, 9, END, 10, END]
    split = Split(prepared_of(stream, tmp_path), "train", 4)
    batch = next(evaluation_batches(split, 2))
    assert batch.document.tolist() == [[0, 0, 0, 1], [1, 1, 1, 2]]
    assert batch.target_document.tolist() == [[0, 0, 1, 1], [1, 1, 2, 2]]
    sums = evaluate(model, partial(token_losses, model), split, 2, torch.ones(VOCAB, dtype=torch.int64))
    assert sums["document_tokens"].tolist() == [2, 4, 2, 0]
    ce = token_losses(model, batch, {})[0].detach().double()
    by_document = [ce[batch.target_document == number].sum() for number in range(3)]
    assert sums["document_ce_sum"][:3].tolist() == pytest.approx([float(value) for value in by_document], rel=1e-5)


def test_packed_windows_hold_whole_documents_by_hand(tmp_path):
    # documents of 3, 3, 2, 10 and 3 tokens in windows of 6: the third does not fit, the fourth goes on once
    stream = [2, 3, END, 4, 5, END, 6, END, *range(10, 19), END, 7, 8, END]
    split = Split(prepared_of(stream, tmp_path), "train", 5, "documents")
    assert (split.starts.tolist(), split.stops.tolist()) == ([0, 6, 8, 13, 18], [6, 8, 14, 18, 21])
    assert split.full == len(split) == 5
    batch = next(evaluation_batches(split, 6))
    assert batch.tokens.id.tolist()[1:] == [
        [6, END, END, END, END],
        [10, 11, 12, 13, 14],
        [15, 16, 17, 18, END],  # the first is the last of the window before
        [7, 8, END, END, END],
        [END] * 5,
    ]
    assert batch.target[0].tolist() == [3, END, 4, 5, END]
    assert batch.counted[0].tolist() == [True, True, False, True, True]
    assert batch.tokens.real[:2].tolist() == [[True] * 5, [True] + [False] * 4]
    assert not batch.tokens.real[5].any() and not batch.counted[5].any()


def random_documents(seed: int, length: int, count: int = 60) -> list[int]:
    """Documents of 2 to 3 * length tokens, each token but END told by its place."""
    sizes = torch.randint(1, 3 * length, (count,), generator=generator(seed)).tolist()
    stream: list[int] = []
    for size in sizes:
        stream += [*range(len(stream) + 2, len(stream) + 2 + size), END]
    return stream


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_a_target_once_and_packing_keeps_documents_apart(tmp_path, packing, seed):
    stream, length = random_documents(seed, 7), 7
    split = Split(prepared_of(stream, tmp_path), "train", length, packing)
    assert ((split.stops - split.starts) <= length + 1).all() and split.stops[-1] == len(stream)
    batches = list(evaluation_batches(split, 4))
    targets = [t for batch in batches for t in batch.target[batch.counted].tolist()]
    firsts = {0, *(place + 1 for place, token in enumerate(stream) if token == END)}
    left_out = firsts if packing == "documents" else {0}
    assert targets == [token for place, token in enumerate(stream) if place not in left_out]
    assert split.tokens_per_epoch == sum(
        int(batch.tokens.real[row].sum()) for batch in batches for row in range(4) if batch.tokens.real[row].any()
    ) - (0 if split.full == len(split) else (len(stream) - 1) % length)
    if packing == "documents":
        for batch in batches:
            assert (batch.target_document == batch.document)[batch.counted].all()
        whole = {stop - start for start, stop in zip(split.starts, split.stops)}
        assert max(whole) == length + 1
        ends = set((np.flatnonzero(np.array(stream) == END) + 1).tolist())
        fits = [(a, b) for a, b in zip([0, *sorted(ends)], sorted(ends)) if b - a <= length + 1]
        inside = [any(s <= a and b <= e for s, e in zip(split.starts, split.stops)) for a, b in fits]
        assert all(inside)


def test_packed_windows_are_each_seen_once_an_epoch_in_an_order_of_seed_and_step(tmp_path):
    split = Split(prepared_of(random_documents(0, 6), tmp_path), "train", 6, "documents")
    batches, size = TrainingBatches(split, 4, seed=1), split.full
    firsts = torch.cat([batches.batch(step).tokens.id[:, 0] for step in range(size)]).tolist()  # four epochs
    epochs = [sorted(firsts[size * i : size * (i + 1)]) for i in range(4)]
    assert all(epoch == sorted(split.stream[split.starts].tolist()) for epoch in epochs)
    later = TrainingBatches(split, 4, seed=1).batch(2 * size // 4 + 3)  # in the middle of the third epoch
    assert torch.equal(later.target, batches.batch(2 * size // 4 + 3).target)


def test_other_documents_of_a_window_do_not_move_what_counts(tmp_path):
    model = shaken(make_transformer(mask_documents=True))
    streams = [[5, 6, 7, END, 8, 9, END, 11, 12, END], [5, 6, 7, END, 10, 4, END, 11, 12, END]]
    seen = []
    for stream in streams:
        batch = next(evaluation_batches(Split(prepared_of(stream, tmp_path), "train", 11, "documents"), 1))
        with torch.no_grad():
            seen.append((token_losses(model, batch, model.prepare(batch)[1])[0], batch.target_document))
    (one, document), (other, _) = seen
    changed = (one - other).abs().sum(0) > 0
    assert changed.any() and (document[0][changed] == 1).all()


def test_a_mask_takes_targets_out_and_leaves_the_tokens(tmp_path):
    stream = [2, 3, 4, END, 5, 6, END]
    counted = np.array([0, 0, 1, 1, 0, 1, 1], dtype=bool)
    masked = prepared_of(stream, tmp_path)._replace(counted={"train": counted})
    plain, batch = (next(evaluation_batches(Split(p, "train", 4), 2)) for p in (prepared_of(stream, tmp_path), masked))
    assert batch.target[batch.counted].tolist() == [4, END, 6, END]
    assert torch.equal(plain.tokens.id, batch.tokens.id) and torch.equal(plain.tokens.real, batch.tokens.real)


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
