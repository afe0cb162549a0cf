"""Why a router wins: figures by hand, and the whole of it on runs that run.py's code made."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose_config, tiny_words
from safetensors import safe_open
from safetensors.torch import load_file

from analysis.inside import explained, token_kinds
from analysis.report import explained as explain_report
from training.job import FINISHED, run


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("explained")
    words = tiny_words(corpus, tmp_path_factory.getbasetemp() / "cache", runs)
    words += ["train.steps=8", "record.evaluate_every=4", "record.keep_weights=false"]
    for arm in ("dense", "hash_random", "switch"):
        for seed in (0, 1):
            assert run(compose_config(*words, f"router={arm}", f"seed={seed}")) == FINISHED
    names = sorted(path.parent.name for path in runs.glob("*/result.json"))
    (runs / "sweeps").mkdir()
    record = {"sweep": "three", "scale": "smoke", "command": ["python", "run.py"], "runs": names}
    (runs / "sweeps" / "three.json").write_text(json.dumps(record))
    return runs


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


def test_the_report_explains_and_made_again_it_is_the_same_bytes(trained, tmp_path):
    printed = explain_report("three", trained, tmp_path / "one")
    explain_report("three", trained, tmp_path / "two")
    folders = [tmp_path / again / "smoke" / "three" for again in ("one", "two")]
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    names = {f"explain_{name}.{kind}" for name in ("frequency", "load", "settling", "map") for kind in ("png", "pdf")}
    assert one == two and set(one) == names | {"explain.md", "explain.csv"}
    assert "by chance" in printed and str(tmp_path).encode() not in b"".join(one.values())
    assert max(map(len, printed.splitlines())) <= 120 or "explained  /" in printed
    frame = pd.read_csv(folders[0] / "explain.csv").set_index(["quantity", "arm"]).sort_index()
    assert (frame.loc[("explained", "hash_random"), "value"] == 1).all()
    assert (frame.loc[("by_chance", "hash_random"), "value"] < 0.9).all()
    assert (frame.loc[("explained", "switch"), "value"] < 1).all()
    assert (frame.loc[("settled", "hash_random"), "value"] == 1).all()
    assert frame.loc[("settled", "switch"), "place"].nunique() == 2
    load = frame.loc[("load", "hash_random")]
    assert load.groupby("seed")["value"].mean().tolist() == pytest.approx([1, 1])
    assert (load.loc[load["place"] == 0, "value"].min() >= frame.loc[("bound", "hash_random"), "value"]).all()


def test_the_parts_of_the_loss_add_up_to_it(trained):
    for folder in trained.glob("*-s0-*"):
        result, sums = json.loads((folder / "result.json").read_text()), load_file(folder / "evaluation.safetensors")
        for name, split in (("val", "validation"), ("test", "test")):
            assert int(sums[f"{split}/input_tokens"].sum()) == result[f"{name}/tokens"]
            mean = float(sums[f"{split}/input_ce_sum"].sum()) / result[f"{name}/tokens"]
            assert mean == pytest.approx(result[f"{name}/ce"])
            if "hash" in folder.name:  # all positions are routed, also those that do not count
                routed = sums[f"{split}/token_expert/1"].sum(1)
                assert bool((routed >= sums[f"{split}/input_tokens"]).all())


def test_the_figures_split_a_difference_into_the_tokens_kinds(trained, tmp_path):
    explain_report("three", trained, tmp_path)
    frame = pd.read_csv(tmp_path / "smoke" / "three" / "explain.csv")
    own = frame.loc[(frame["arm"] == "switch") & (frame["seed"] == 1)].set_index("quantity")["value"]
    parts = [own[f"difference_{kind}"] * own[f"share_{kind}"] for kind in ("heavy", "shared", "apart")]
    ce = [
        json.loads(next(trained.glob(f"{arm}-s1-*/result.json")).read_text())["test/ce"] for arm in ("switch", "dense")
    ]
    assert np.nansum(parts) == pytest.approx(ce[0] - ce[1])


def test_frequent_tokens_stand_with_their_text_in_falling_order(trained):
    with safe_open(next(trained.glob("dense-*")) / "evaluation.safetensors", "pt") as file:
        named = json.loads(file.metadata()["frequent_tokens"])
    assert 0 < len(named) <= 64 and all(isinstance(text, str) for _, text in named)
    assert len({token for token, _ in named}) == len(named)


def test_runs_without_experts_or_without_their_evaluation_are_one_clear_line(trained, tmp_path):
    record = trained / "sweeps" / "none.json"
    content = json.loads((trained / "sweeps" / "three.json").read_text())
    record.write_text(json.dumps(content | {"runs": [name for name in content["runs"] if "dense" in name]}))
    with pytest.raises(ValueError, match="no run of 'none' has experts"):
        explain_report("none", trained, tmp_path)
    lost = next(trained.glob("switch-s1-*")) / "evaluation.safetensors"
    kept = lost.rename(lost.with_suffix(".away"))
    try:
        with pytest.raises(ValueError, match="wandb does not mirror"):
            explain_report("three", trained, tmp_path)
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
