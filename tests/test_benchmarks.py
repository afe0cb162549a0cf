import json
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import agree, assignment, layer, prepare, step, sweep
from benchmarks.ffns import Problem, Way, error_of, gradients, reference, stacked, unstacked
from benchmarks.scores import of_a_run, routed_run
from benchmarks.timing import colours_of, interleaved, plot, saved_bytes, title_of
from tests.conftest import ROOT, compose_config
from training.job import FINISHED, run

CPU = torch.device("cpu")


def written(folder, name: str) -> list[dict]:
    found = json.loads((folder / f"{name}.json").read_text())
    assert {"command", "commit", "versions", "device", "options"} <= found["provenance"].keys()
    return found["rows"]


def test_a_layer_is_timed_beside_the_dense_floor_and_checked(tmp_path, capsys):
    layer.main(["--device=cpu", "--size=tiny", "--rounds=2", "--curve=E", f"--out={tmp_path}"])
    rows = written(tmp_path, "layer-tiny-relu-over-E")
    assert {row["E"] for row in rows} == {1, 4}
    dense, ours = (next(row for row in rows if row["way"] == way) for way in (layer.DENSE, layer.OURS))
    assert dense["x dense"] == 1 and ours["ms"] > 0 and ours["error"] <= 1e-4
    # what dense keeps: the inner values (256, 64), float32, once where relu keeps its result; ours the permuted x too
    assert dense["kept MB"] == pytest.approx(256 * 64 * 4 / 1e6)
    assert (tmp_path / "layer-tiny-relu-over-E.png").stat().st_size > 5000
    assert "x dense" in capsys.readouterr().out


def test_a_way_that_is_wrong_is_not_timed():
    problem = Problem(64, 16, 32, 4, "swiglu", CPU)
    parameters = list(problem.experts.parameters())
    wanted = reference(problem, dense=False)
    for forward in (problem.loop, problem.grouped, lambda x: problem.ours(x, problem.plan)):
        way = Way(forward, parameters)
        assert error_of(problem, way, gradients(problem, way), wanted) <= 1e-5
    way = Way(lambda x: 1.01 * problem.loop(x), parameters)
    with pytest.raises(ValueError, match="off by"):
        error_of(problem, way, gradients(problem, way), wanted)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_peers_gradients_are_compared_in_our_layout(activation):
    problem = Problem(64, 16, 32, 4, activation, CPU)
    first, last, gated = stacked(problem)
    assert first.shape == (4, 64 if gated else 32, 16) and last.shape == (4, 16, 32)
    back = unstacked(problem, [first, last])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(problem.experts.parameters(), back, strict=True))
    wanted = reference(problem, dense=False)
    y, dx, *others = wanted
    assert error_of(problem, Way(problem.loop, [], lambda found: found[::-1]), [y, dx, *others[::-1]], wanted) == 0


def test_candidates_are_measured_in_turn():
    called = []
    seconds = interleaved(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, CPU, 3, warm_up=1, inner=2
    )
    assert called[:2] == ["a", "b"]
    rounds = [called[n : n + 4] for n in range(2, len(called), 4)]
    assert len(rounds) == 3 and all(r[0] == r[1] != r[2] == r[3] for r in rounds)
    assert rounds[0] != rounds[1] or rounds[1] != rounds[2]  # not always in one order
    assert [len(each) for each in seconds.values()] == [3, 3]


def test_what_a_forward_pass_keeps_is_counted_once():
    x = torch.ones(10, requires_grad=True)
    assert saved_bytes(lambda: (x.exp() * 2).sum(), [x]) == 40  # exp keeps its result
    assert saved_bytes(lambda: (x * x).sum(), [x]) == 0


def test_steps_of_several_arms_are_timed_side_by_side(tiny, tmp_path):
    words = ["--device=cpu", "--scale=smoke", "--rounds=1", "--block=1", "--arms=dense,base", f"--out={tmp_path}"]
    step.main([*words, "--curve=length", "--values=16,32", *tiny[:-1]])
    rows = written(tmp_path, "step-smoke-over-length")
    assert [(row["length"], row["arm"]) for row in rows] == [(n, arm) for n in (16, 32) for arm in ("dense", "base")]
    assert all(row["tokens/s"] > 0 and row["syncs"] is None for row in rows)


def test_a_plot_names_its_first_arm_and_marks_where_the_path_changes(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    paths = {2: "grouped_mm", 4: "grouped_mm", 16: "fused"}
    rows = [{"layers": n, "arm": "dense", "over the first": 1.0, "path": None} for n in paths]
    rows += [{"layers": n, "arm": "a", "over the first": 0.9, "path": path} for n, path in paths.items()]
    rows += [{"layers": n, "arm": "b", "over the first": 0.8, "path": path} for n, path in paths.items()]
    rows += [{"layers": n, "arm": "c:loop", "over the first": 0.7, "path": "loop"} for n in paths]
    plot(rows, "layers", "over the first", "arm", tmp_path / "any.png", level=1)
    (axes,) = drawn[0].axes
    assert axes.get_ylabel() == "tokens/s over those of dense"
    marked = [line for line in axes.lines if str(line.get_label()).startswith("auto")]
    assert [line.get_label() for line in marked] == ["auto (ours): grouped_mm left, fused right"]
    assert list(marked[0].get_xdata()) == [8, 8]  # half way from 4 to 16 on the logarithm


def test_a_figure_names_what_its_points_have_in_common_and_a_way_has_one_colour():
    rows = [{"T": tokens, "D": 1024, "E": 64, "F": 4096, "arm": "any"} for tokens in (8, 16)]
    assert title_of(rows, "T", "a GPU") == "a GPU, D 1,024, F 4,096, E 64"
    assert title_of([{"layers": 1}, {"layers": 2}], "layers", "") == ""
    for others in ([], ["ours, plan ahead"], ["fused, plan ahead", "another"]):
        drawn = colours_of([*others, "grouped_mm, plan ahead", "grouped_mm, plan ahead, CUDA graph"])
        assert drawn["grouped_mm, plan ahead"] == "C3" and len(set(drawn.values())) == len(others) + 1
    assert colours_of(["dense", "switch"]) == {"dense": "C0", "switch": "C1"}


def test_an_arm_whose_step_is_not_the_loop_s_is_not_timed(tiny, tmp_path, monkeypatch):
    made = step.make_losses
    words = ["--device=cpu", "--scale=smoke", "--arms=hash_balanced:grouped_mm", f"--out={tmp_path}", *tiny[:-1]]

    def off(by):
        def make(*args):
            losses = made(*args)
            return lambda *given: (by(losses(*given)[0]), *losses(*given)[1:])

        return make

    monkeypatch.setattr(step, "make_losses", off(lambda each: 1.03 * each))
    with pytest.raises(RuntimeError, match="router=hash_balanced:grouped_mm: the loss is"):
        step.main(words)
    # the same loss, of which a thirtieth sends no gradient back
    monkeypatch.setattr(step, "make_losses", off(lambda each: (29 * each + each.detach()) / 30))
    with pytest.raises(RuntimeError, match="gradients are 0.034 off those of the loop, by norm, and may be 0.02"):
        step.main(words)


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (assignment.main, ["--tokens", "0"], "--tokens: must be a whole number of at least 1; got 0"),
        (assignment.main, ["--experts", "0"], "--experts: must be a whole number of at least 1; got 0"),
        (prepare.main, ["--megabytes", "-1"], "--megabytes: must be a number of at least 0.1; got -1"),
        (step.main, ["--curve", "layers", "--values", "0"], "--values: must be a whole number of at least 1; got 0"),
    ],
)
def test_a_wrong_size_is_refused_in_a_line(main, words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_solvers_of_the_assignment_are_timed_with_their_gaps(tmp_path):
    words = ["--device=cpu", "--tokens", "200", "400", "--experts", "8", "--kinds", "gaussian", "--rounds=1"]
    assignment.main([*words, f"--out={tmp_path}"])
    rows = written(tmp_path, "assignment")
    assert [(row["T"], row["solver"]) for row in rows] == [(n, s) for n in (200, 400) for s in ("fast", "exact")]
    assert all(0 <= row["gap"] < 0.05 for row in rows)


def test_a_run_is_read_in_whole_routing_groups(tiny, tmp_path):
    """32 tokens a row, two rows a group: 70 tokens are in three rows, so four are read."""
    words = [*tiny, "router=switch", "router.capacity_factor=1", "record.keep_weights=true"]
    assert run(compose_config(*words)) == FINISHED
    scores = of_a_run(routed_run(next((tmp_path / "runs").glob("switch-*"))), 70, 8)
    assert scores.shape == (1, 70, 8)


@pytest.mark.parametrize(
    ("words", "one_by_one"),
    [([], True), (["cpu_slots=1"], True), (["cpu_slots=2"], False), (["cpu_slots=null"], False)],
)
def test_a_job_has_a_time_of_its_own_where_one_runs_after_the_other(words, one_by_one):
    assert sweep.alone([f"hydra.launcher.{word}" for word in words], CPU) == one_by_one


@pytest.mark.long
def test_paths_that_train_the_same_model_say_so(tiny, tmp_path, monkeypatch, capsys):
    words = ["--device=cpu", "--scale=smoke", "--arms=switch", "--steps=10", "--repeats=2", f"--out={tmp_path}"]
    agree.main([*words, *tiny[:-1]])
    rows = {row["runs"]: row for row in written(tmp_path, "agree")}
    assert len(rows) == 6 and rows["auto, one and another"]["largest"] == 0
    assert rows["loop and auto, means"]["largest"] < 1e-3 and rows["loop and auto, means"]["path"] == "loop"
    again = rows["switch, deterministic, twice"]
    assert again["of plain"] > 0 and again["path"] == "grouped_mm" and again["agrees"]
    monkeypatch.setattr(agree, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit):
        agree.main([*words, *tiny[:-1]])
    assert "not the same: grouped_mm and auto, means, loop and auto, means" in capsys.readouterr().err


@pytest.mark.long
def test_a_sweep_says_what_is_not_training(tiny, tmp_path):
    sweep.main(["--device=cpu", "--scale=smoke", "--arms=dense", "--seeds=2", f"--out={tmp_path}", *tiny[:-1]])
    rows = written(tmp_path, "sweep")
    assert [row["of its kind"] for row in rows] == [1, 2]
    assert all(row["training, s"] > 0 and row["whole, s"] > row["not training, s"] for row in rows)


def test_preparing_is_timed_for_every_dictionary(tmp_path):
    words = ["--megabytes=0.2", "--dictionaries=bpe,bytes", "data.vocab_size=400", "data.sequence_length=32"]
    prepare.main([*words, f"--out={tmp_path}"])
    assert [row["dictionary"] for row in written(tmp_path, "prepare")] == ["bpe", "bytes"]


def test_bad_input_is_one_line(tmp_path):
    words = [sys.executable, "-m", "benchmarks.step", "--scale=none", f"--out={tmp_path}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
