"""Why a router wins: figures by hand, and the whole of it on runs that run.py's code made."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from analysis.explain import by_layer
from analysis.explain_figures import _visible
from analysis.inside import explained, token_kinds
from analysis.report import explained as explain_report


def test_a_choice_that_follows_the_token_is_explained_and_one_that_does_not_is_not():
    assert explained(np.diag([5, 3, 2])) == pytest.approx(1)
    assert explained(np.outer([6, 3], [2, 4])) == pytest.approx(0)
    # tokens a: 2 of expert 0, b: 1 and 1; H(expert) = H(3/4), H(expert | token) = log 2 / 2
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert explained(np.array([[2, 0], [1, 1]])) == pytest.approx(1 - math.log(2) / 2 / entropy)


def test_tokens_are_parted_by_the_company_of_heavy_ones():
    frequency = np.array([8, 60, 5, 15, 12, 0])
    table = np.array([[0, 8], [50, 10], [4, 1], [3, 12], [12, 0], [0, 0]])
    kinds = token_kinds(table, frequency)  # token 1 alone is the first tenth; in expert 0 with 2 and 4
    assert kinds["heavy"].tolist() == [False, True, False, False, False, False]
    assert kinds["shared"][[2, 4]].all() and not kinds["shared"][[0, 1, 3]].any()
    assert kinds["apart"][[0, 3]].all()
    assert (sum(kinds.values()) == 1).all()


def test_heavy_tokens_are_the_first_tenth_of_the_text_and_no_more():
    frequency = np.array([9, 12, 8, 11, 10, *[5] * 10])  # of 100: 12 alone passes a tenth; a fifth would take 11 too
    assert np.flatnonzero(token_kinds(np.ones((15, 2)), frequency)["heavy"]).tolist() == [1]


def test_a_token_in_a_map_has_so_many_letters_that_no_other_reads_the_same():
    assert _visible(["a", " the\n", "$"]) == ["a", "␣the\\n", r"\$"]
    assert _visible(["abcdefghijkl", "abcdefghijxy", "z" * 30]) == ["abcdefghijkl", "abcdefghijxy", "z" * 11 + "…"]


def test_the_report_explains_and_made_again_it_is_the_same_bytes(small_study, tmp_path):
    printed = explain_report("quickstart", small_study, tmp_path / "one")
    explain_report("quickstart", small_study, tmp_path / "two")
    folders = [tmp_path / again / "smoke" / "quickstart" for again in ("one", "two")]
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    names = {f"explain_{name}.{kind}" for name in ("frequency", "load", "settling", "map") for kind in ("png", "pdf")}
    assert one == two and set(one) == names | {"explain.md", "explain.csv"}
    assert "by chance" in printed and str(tmp_path).encode() not in b"".join(one.values())
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 120
    frame = pd.read_csv(folders[0] / "explain.csv").set_index(["quantity", "arm"]).sort_index()
    assert (frame.loc[("explained", "hash_balanced"), "value"] == 1).all()
    assert (frame.loc[("by_chance", "hash_balanced"), "value"] < 0.9).all()
    assert (frame.loc[("explained", "switch"), "value"] < 1).all()
    assert (frame.loc[("settled", "hash_balanced"), "value"] == 1).all()
    assert frame.loc[("settled", "switch"), "place"].nunique() == 3
    load = frame.loc[("load", "hash_balanced")]
    assert load.groupby("seed")["value"].mean().tolist() == pytest.approx([1, 1])
    assert (load.loc[load["place"] == 0, "value"].min() >= frame.loc[("bound", "hash_balanced"), "value"]).all()


def test_the_parts_of_the_loss_add_up_to_it(small_study):
    for folder in small_study.glob("*-s0-*"):
        result, sums = json.loads((folder / "result.json").read_text()), load_file(folder / "evaluation.safetensors")
        for name, split in (("val", "validation"), ("test", "test")):
            assert int(sums[f"{split}/input_tokens"].sum()) == result[f"{name}/tokens"]
            mean = float(sums[f"{split}/input_ce_sum"].sum()) / result[f"{name}/tokens"]
            assert mean == pytest.approx(result[f"{name}/ce"])
            if "hash" in folder.name:  # all positions are routed, also those that do not count
                routed = sums[f"{split}/token_expert/1"].sum(1)
                assert bool((routed >= sums[f"{split}/input_tokens"]).all())


def test_the_figures_split_a_difference_into_the_tokens_kinds(small_study, tmp_path):
    explain_report("quickstart", small_study, tmp_path)
    frame = pd.read_csv(tmp_path / "smoke" / "quickstart" / "explain.csv")
    own = frame.loc[(frame["arm"] == "switch") & (frame["seed"] == 1)].set_index("quantity")["value"]
    parts = [own[f"difference_{kind}"] * own[f"share_{kind}"] for kind in ("heavy", "shared", "apart")]
    results = [next(small_study.glob(f"{arm}-s1-*/result.json")) for arm in ("switch", "dense")]
    ce = [json.loads(path.read_text())["test/ce"] for path in results]
    assert np.nansum(parts) == pytest.approx(ce[0] - ce[1])


def test_frequent_tokens_stand_with_their_text_in_falling_order(small_study):
    with safe_open(next(small_study.glob("dense-*")) / "evaluation.safetensors", "pt") as file:
        named = json.loads(file.metadata()["frequent_tokens"])
    assert 0 < len(named) <= 64 and all(isinstance(text, str) for _, text in named)
    assert len({token for token, _ in named}) == len(named)


def test_runs_without_experts_or_without_their_evaluation_are_one_clear_line(small_study, tmp_path):
    record = small_study / "sweeps" / "none.json"
    content = json.loads((small_study / "sweeps" / "quickstart.json").read_text())
    record.write_text(json.dumps(content | {"runs": [name for name in content["runs"] if "dense" in name]}))
    with pytest.raises(ValueError, match="no run of 'none' has experts"):
        explain_report("none", small_study, tmp_path)
    lost = next(small_study.glob("switch-s1-*")) / "evaluation.safetensors"
    kept = lost.rename(lost.with_suffix(".away"))
    try:
        with pytest.raises(ValueError, match="wandb does not mirror"):
            explain_report("quickstart", small_study, tmp_path)
    finally:
        kept.rename(lost)


def test_settled_is_the_share_of_assignments_that_stay():
    from training.session import Session

    session = Session.__new__(Session)
    session.model, session.assigned = type("Model", (), {"routers": {1: None}})(), {}
    first, second = torch.tensor([[4, 0], [1, 5]]), torch.tensor([[3, 1], [6, 0]])
    assert session.settled({"token_expert/1": first}) == {}
    assert session.settled({"token_expert/1": second}) == {"route/1/settled": (3 + 1) / 10}
    assert session.settled({"token_expert/1": second}) == {"route/1/settled": 1.0}


def test_halfway_is_half_of_training_and_not_of_the_validations_that_have_one_before_them():
    rows = [("load", 0, 1.5), *(("settled", step * 1000, step / 1500) for step in range(250, 1501, 250))]
    figures = pd.DataFrame(
        [
            {"quantity": quantity, "arm": "switch", "seed": 0, "layer": 1, "place": place, "value": value}
            for quantity, place, value in rows
        ]
    )
    (row,) = by_layer(figures).to_dict("records")
    assert (row["settled: first"], row["halfway"], row["last"]) == ("0.167", "0.500", "1.000")
    (row,) = by_layer(figures.loc[figures["place"] <= 250_000]).to_dict("records")
    assert row["settled"] == "0.167" and "halfway" not in row
