import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXPERTS, ROOT, VOCAB, compose_config, make_site, router_of, some_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.batches import Split, evaluation_batches
from data.prepare import Prepared
from routers.audit import card
from routers.hash import Hash
from routers.table_figures import (
    chance,
    frequent_collisions,
    mutual_information,
    parts_of,
    rare_and_heavy,
    rare_beside_heavy,
    route,
)
from routers.workbench import main
from training.build import open_data, router_maker
from training.preflight import read


def text(train, validation=None) -> Prepared:
    """A corpus of these tokens."""
    train = np.asarray(train)
    tokens = {"train": train, "validation": train if validation is None else np.asarray(validation)}
    return Prepared(Path(), "0123456789abcdef", VOCAB, torch.zeros(VOCAB), tokens, {})


def whole(stream, length: int):
    """What gives the batches of a stream's windows."""
    return partial(evaluation_batches, Split(text(stream), "train", length))


def card_of(name: str, corpus: Prepared, routers: dict, every_expert: bool = False) -> str:
    def batches_of(split, size):
        return evaluation_batches(Split(corpus, split, 12), size)

    return card(name, corpus.fingerprint, routers, every_expert, batches_of)


def column(*experts):
    return torch.tensor(experts)[:, None]


def table_router(table, **site) -> Hash:
    """A hash with this table (V, N) over tokens."""
    table = torch.as_tensor(table)
    site |= {"vocab_size": len(table), "token_counts": torch.ones(len(table)).long()}
    router = Hash(make_site(**site), "token", "random", table.shape[1], True, 1, None)
    router.table.copy_(table)
    return router


# figures by hand


def test_loads_are_of_the_tokens_that_are_routed_and_the_last_is_only_a_target():
    stream = torch.tensor([2, 3, 2, 4, 2, 0, 2, 5])  # 7 inputs, in windows of 3 whose last is padded
    table = column(1, 1, 3, 0, 0, 2)
    seen = route(parts_of({1: table_router(table)}), whole(stream, 3))
    assert seen.tokens.tolist() == [1, 0, 4, 1, 1, 0]
    assert torch.equal(seen.keys, seen.tokens)
    assert seen.loads["1"].tolist() == [2, 1, 0, 4]


def test_every_hash_of_several_is_a_table_of_its_own():
    stream = torch.tensor([2, 3, 2, 4, 0])
    router = table_router([[0, 3], [0, 3], [1, 3], [2, 2], [2, 0]])
    seen = route(parts_of({0: router}), whole(stream, 4))
    assert {name: load.tolist() for name, load in seen.loads.items()} == {
        "0, segment 0": [0, 2, 2, 0],
        "0, segment 1": [1, 0, 1, 2],
    }


def test_a_feature_that_looks_back_is_audited_by_its_own_keys():
    stream = torch.tensor([2, 3, 2, 0, 3, 3])
    router = router_of("hash_previous", make_site())
    seen = route(parts_of({1: router}), whole(stream, 5))
    assert seen.keys[[1, 2, 3]].tolist() == [2, 2, 1]  # begin twice, as a document starts within the window
    load = torch.zeros(EXPERTS).long()
    for key in (1, 2, 3, 2, 1):
        load[router.table[key, 0]] += 1
    assert torch.equal(seen.loads["1"], load)


def test_predictions_are_those_of_the_baseline():
    stream = some_batch(1, 72).tokens.id[0]
    router = router_of("hash_predicted", make_site())
    split = Split(text(stream), "train", 12)
    batch = split.windows(torch.arange(6), torch.zeros(6).long())
    with torch.no_grad():
        guess = router.site.baseline(batch.tokens).logits.argmax(-1)
    seen = route(parts_of({1: router}), whole(stream, 12))
    assert torch.equal(seen.keys, torch.bincount(guess[batch.tokens.real], minlength=VOCAB))


def test_collisions_of_frequent_keys_by_hand():
    counts = torch.tensor([5, 4, 3, 2, 0])
    assert frequent_collisions(column(0, 0, 1, 0, 1), counts, 4) == (3 / 6, 6)  # unseen keys are in no pair
    two = torch.tensor([[0, 1], [1, 2], [3, 2], [0, 3], [0, 1]])
    assert frequent_collisions(two, counts, 4) == (4 / 6, 6)  # 01-12, 01-03, 12-32, 32-03
    many = torch.arange(200).flip(0) + 1
    share, pairs = frequent_collisions(torch.arange(200)[:, None] // 100, many, 4)
    assert (share, pairs) == (1.0, 4950)
    assert math.isnan(frequent_collisions(column(0, 1), torch.tensor([3, 0]), 4)[0])


def test_rare_keys_beside_heavy_ones_by_hand():
    counts = torch.tensor([1400, 400, 191, 7, 0, 2])  # 2000; mean 333.3: rare below 3.33; heavy above 250
    rare, heavy = rare_and_heavy(counts, 4)
    assert rare.tolist() == [False, False, False, False, True, True]
    assert heavy.tolist() == [True, True, False, False, False, False]
    assert rare_beside_heavy(column(0, 1, 2, 2, 1, 3), counts, 4) == (0.5, 0.5)
    assert rare_beside_heavy(column(0, 0, 2, 2, 1, 3), counts, 4) == (0.0, 0.25)
    pairs = torch.tensor([[0, 1], [1, 0], [2, 3], [2, 3], [1, 2], [3, 2]])
    assert rare_beside_heavy(pairs, counts, 4) == (0.5, pytest.approx(5 / 6))  # 1 of 6 pairs has neither 0 nor 1
    assert math.isnan(rare_beside_heavy(column(0, 1), torch.tensor([1, 1]), 4)[0])


def test_the_thresholds_of_rare_and_heavy_are_strict():
    counts = torch.tensor([100, 1, *[101] * 2, 97])  # 400, mean 80: 0.8 is the threshold
    assert not rare_and_heavy(counts, 2)[0].any()
    assert rare_and_heavy(torch.tensor([100, 100, 200, 400]), 4)[1].tolist() == [False, False, True, True]


def test_chance_is_that_of_drawing_without_replacement():
    assert chance(16, 1, 1) == pytest.approx(1 / 16)
    assert chance(4, 2, 2) == pytest.approx(5 / 6)
    assert chance(4, 1, 0) == 0
    assert chance(2, 2, 1) == 1


def test_mutual_information_of_independent_tables_is_0_and_of_equal_ones_log_experts():
    even = torch.ones(16).long()
    one, other = torch.arange(16)[:, None] // 4, torch.arange(16)[:, None] % 4
    assert mutual_information(one, other, even, 4) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert mutual_information(one, one, even, 4) == pytest.approx((math.log(4), 1.0))
    assert mutual_information(one, 3 - one, even, 4) == pytest.approx((math.log(4), 1.0))  # under other names


def test_mutual_information_is_weighed_by_the_text():
    one, other, counts = column(0, 0, 1, 1), column(0, 1, 0, 1), torch.tensor([3, 1, 1, 3])
    # both even; joint 3/8, 1/8, 1/8, 3/8
    expected = 2 * 3 / 8 * math.log(3 / 8 / (1 / 4)) + 2 / 8 * math.log(1 / 8 / (1 / 4))
    assert mutual_information(one, other, counts, 2) == pytest.approx((expected, expected / math.log(2)))
    sure = mutual_information(column(0, 0, 0), column(0, 1, 1), torch.tensor([1, 1, 1]), 2)
    assert sure == (0.0, 0.0)  # a table of one expert tells nothing


def test_a_table_that_the_other_tells_shares_all_of_the_smaller_entropy():
    fine, coarse, even = column(0, 1, 2, 3), column(0, 0, 1, 1), torch.ones(4).long()
    assert mutual_information(fine, coarse, even, 4) == pytest.approx((math.log(2), 1.0))


def test_mutual_information_of_several_experts_is_that_of_one_drawn_from_each():
    one, other = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [2, 3]])
    # given the key, both draws are even over its two experts: they share which key it was, one bit
    assert mutual_information(one, other, torch.tensor([5, 5]), 4)[0] == pytest.approx(math.log(2))


# the printed audit


def figures(said: str, title: str) -> list[list[str]]:
    """The rows of the table under this title."""
    lines = said.split(f"{title}\n", 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("-----")) + 1
    rows = []
    for line in lines[first:]:
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) < 3:
            break
        rows.append(cells)
    return rows


def test_the_card_says_loads_and_bounds_of_each_text():
    train = torch.tensor([2] * 6 + [3, 3, 4, 5] + [0, 0, 2])
    validation = torch.tensor([4] * 9 + [2, 3, 5, 2])
    router = table_router(column(3, 3, 0, 1, 1, 2), sparse_layers=(1,))
    said = card_of("mine", text(train, validation), {1: router}, True)
    by_text = {row[1]: row for row in figures(said, "LOAD")}
    # training 6, 2, 1, 1, 2 of 12: p1 E = 2; the fullest has 6 of 12
    assert by_text["training"][2:] == ["50.00 % (#0)", "8.33 % (#2)", "0", "0.865", "2.00", "2.00"]
    # validation 9 of id 4 and one of 3 in expert 1: 10 of 12; p1 E = 3
    assert by_text["validation"][2:] == ["83.33 % (#1)", "0.00 % (#3)", "1", "0.408", "3.33", "3.00"]
    every = figures(said, "LOAD OF EVERY EXPERT")
    assert every[0] == ["#0", "50.00 %", "8.33 %"] and len(every) == 4
    assert "LOAD OF EVERY EXPERT" not in card_of("mine", text(train, validation), {1: router}, False)
    assert "needs two of them" in said


def test_the_card_shows_the_split_hash_below_what_no_token_table_can_beat():
    draws = torch.Generator().manual_seed(0)
    stream = torch.randint(2, VOCAB, (4001,), generator=draws)
    stream[torch.rand(4001, generator=draws) < 0.5] = 7
    counts = torch.bincount(stream, minlength=VOCAB)
    corpus = text(stream)
    split = Split(corpus, "train", 12)
    tokens = split.windows(torch.arange(len(split)), torch.zeros(len(split)).long())
    site = make_site(token_counts=counts, training_text=lambda: [tokens], sparse_layers=(1,))
    said = {name: card_of(name, corpus, {1: router_of(name, site)}) for name in ("hash_split", "hash_balanced")}
    fullest, own, bound = map(float, figures(said["hash_split"], "LOAD")[0][-3:])
    assert own <= fullest < bound and bound == pytest.approx(2.05, abs=0.1)
    assert f"the fullest expert has {fullest:.2f} times the mean load, below {bound:.2f}" in said["hash_split"]
    assert "which no table of token ids can beat" not in said["hash_balanced"]
    assert figures(said["hash_balanced"], "LOAD")[0][-2:] == [f"{bound:.2f}"] * 2  # greedy reaches it, and no less


def test_two_layers_are_compared_and_one_table_for_all_has_everything_in_common():
    stream = torch.arange(2, 40).repeat(5)
    routers = {layer: router_of("hash_random", make_site(layer=layer)) for layer in (0, 1)}
    said = card_of("two", text(stream), routers)
    assert [row[0] for row in figures(said, "COLLISIONS ON TRAINING TEXT")] == ["0", "1"]
    assert [row[0] for row in figures(said, "MUTUAL INFORMATION BETWEEN TABLES, TRAINING TEXT")] == [
        "0 and 1",
        "two random tables",
    ]
    routers[1].table.copy_(routers[0].table)
    assert (
        figures(card_of("one", text(stream), routers), "MUTUAL INFORMATION BETWEEN TABLES, TRAINING TEXT")[0][2]
        == "1.000"
    )


# the commands


def routers_of(*words) -> dict:
    settings = read(compose_config(*words))
    make = router_maker(settings, open_data(settings))
    return {layer: make(layer) for layer in settings.model.sparse_layers}


@pytest.mark.parametrize("router", ["hash_balanced", "hash_split", "hash_multi", "gated_hash", "hash_bigram"])
def test_a_built_table_is_read_back_and_routes_the_same(router, tiny, tmp_path, capsys):
    path = tmp_path / "table.safetensors"
    words = [*tiny, f"router={router}", *(["router.k=2"] if router == "gated_hash" else [])]
    main(["build", *words, "--out", str(path)])
    assert str(path) in capsys.readouterr().out
    built = routers_of(*words)[1]
    again = routers_of(*words, "router.table=file", f"router.file={path}")[1]
    assert load_file(path)["tid2eid"].dtype == torch.int64
    tokens = some_batch().tokens
    assert torch.equal(again.experts(tokens), built.experts(tokens))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["feature"] == built.feature_name and metadata["table"] == built.name
    assert (metadata["num_experts"], metadata["seed"], metadata["layer"]) == ("4", "0", "1")
    assert len(metadata["data_fingerprint"]) == 64
    assert [p.name for p in tmp_path.glob("table*")] == ["table.safetensors"]


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_of_an_encoder_decoder_is_audited_what_its_router_sees(side, tiny, capsys):
    words = [*tiny, "router=hash_balanced", "model.encoder_layers=2", "data.source_length=8", f"model.sparse_in={side}"]
    main(["audit", *words])
    found = re.search(r"text: ([\d,]+) training tokens and ([\d,]+) validation tokens", capsys.readouterr().out)
    prepared = open_data(read(compose_config(*words)))
    for split, said in zip(("train", "validation"), found.groups()):
        targets = prepared.splits[split]["tokens"] - 1
        whole, rest = divmod(targets, 32)  # of a window the encoder reads the first 8, of the last one what there is
        read_by_encoder = 8 * whole + min(rest, 8)
        assert int(said.replace(",", "")) == (read_by_encoder if side == "encoder" else targets - read_by_encoder)


def test_a_layer_is_built_by_name(tiny, tmp_path):
    words = [*tiny, "router=hash_random", "model.sparse_layers=[0,1]"]
    main(["build", *words, "--layer", "1", "--out", str(tmp_path / "one")])
    main(["build", *words, "--out", str(tmp_path / "first")])
    routers = routers_of(*words)
    assert torch.equal(load_file(tmp_path / "one")["tid2eid"], routers[1].table)
    assert torch.equal(load_file(tmp_path / "first")["tid2eid"], routers[0].table)


def test_export_writes_every_layers_table_by_token_id_and_reads_back_by_layer(tiny, tmp_path):
    path, words = tmp_path / "all.safetensors", [*tiny, "router=gated_hash", "router.k=2", "model.sparse_layers=[0,1]"]
    main(["export", *words, "--out", str(path)])
    tables, routers = load_file(path), routers_of(*words)
    assert sorted(tables) == ["layers.0.tid2eid", "layers.1.tid2eid"]
    for layer, router in routers.items():
        table = tables[f"layers.{layer}.tid2eid"]
        assert table.shape == (300, 2) and table.dtype == torch.int64
        assert torch.equal(table, router.table)
    again = routers_of(*words, "router.table=file", f"router.file={path}")
    assert all(torch.equal(again[layer].table, routers[layer].table) for layer in routers)
    assert not torch.equal(again[0].table, again[1].table)
    main(["export", *words, "--layer", "1", "--out", str(path)])
    assert list(load_file(path)) == ["tid2eid"]
    assert torch.equal(load_file(path)["tid2eid"], routers[1].table)


def test_a_hash_below_another_router_is_found(tiny, tmp_path, capsys):
    words = [*tiny, "router=first_k_hash", "model.sparse_layers=[0,1]"]
    main(["export", *words, "--out", str(tmp_path / "table")])
    assert list(load_file(tmp_path / "table")) == ["layers.0.tid2eid"]
    main(["audit", *words])
    assert "layers with a table: 0 (sparse layers: 0, 1)" in capsys.readouterr().out


def test_a_table_file_is_audited_like_any_other(tiny, tmp_path, capsys):
    path = tmp_path / "one.safetensors"
    save_file({"tid2eid": torch.full((300, 1), 2)}, path)
    main(["audit", *tiny, "router=hash_balanced", "router.table=file", f"router.file={path}", "--all"])
    said = capsys.readouterr().out
    assert figures(said, "LOAD")[0][2:7] == ["100.00 % (#2)", "0.00 % (#0)", "3", "0.000", "4.00"]
    assert [row[1] for row in figures(said, "LOAD OF EVERY EXPERT")] == ["0.00 %", "0.00 %", "100.00 %", "0.00 %"]
    assert f"table=file of {path}" in said


BAD = [
    ("audit router=dense", "router=dense has no table"),
    ("audit router=switch", "router=switch has no table in a sparse layer"),
    ("audit router=nonesuch", "router=nonesuch is not there; there are base, "),
    ("audit router=hash_random --layer 0", "--layer must be one of model.sparse_layers = [1]; got 0"),
    ("audit router=hash_random --out x", "audit prints and takes no --out"),
    ("audit router=hash_random num_experts=301", "num_experts must be at most the dictionary's 300; got 301"),
    ("audit router=hash_random router.table=file router.file=none.safetensors", "no safetensors file"),
    ("audit router=hash_random data.sequence_length=1000000", "fewer than one window"),
    ("audit router=hash_random --al", "unrecognized arguments: --al"),
    ("audit router=hash_clustered", "router.baseline"),
    ("audit router=first_k_hash model.sparse_layers=[0,1] --layer 1", "router=first_k_hash has no table in layer 1"),
    ("build router=hash_random", "build needs --out FILE"),
    ("build router=hash_random --out none/x", "--out must be a file in a folder that exists; got none/x"),
    ("build router=hash_random --out table --all", "--all is of audit"),
    ("export router=hash_bigram --out table", "export needs router.feature=token"),
    ("export router=hash_previous --out table", "got previous"),
    ("export router=hash_multi --out table", "router.num_hashes=2 cuts them into segments"),
    ("draw router=hash_random", "invalid choice: 'draw'"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_ends_with_one_line_and_status_2(words, message, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, *rest = words.split()
    with pytest.raises(SystemExit) as exit:
        main([command, *tiny, *rest])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "table").exists()


def test_the_commands_are_found_under_routers_tables(tiny, tmp_path):
    path = tmp_path / "table.safetensors"
    command = [sys.executable, "-m", "routers.tables", "build", "router=hash_random", "--out", str(path), *tiny]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file(path)["tid2eid"].shape == (300, 1)
    assert subprocess.run([*command[:3], "draw"], capture_output=True, cwd=ROOT).returncode == 2
