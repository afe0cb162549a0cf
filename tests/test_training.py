import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, compose_config, one_of_a_kind
from safetensors.torch import load_file

from training import checkpoint, job, loop, provenance, session
from training.build import make_losses, make_model
from training.checkpoint import load_run
from training.evaluation import evaluate, frequency_deciles, mean_ce
from training.folder import held
from training.job import DIVERGED, FAILED, FINISHED, INTERRUPTED, open_run, run
from training.loop import Progress, Trainer
from training.optimizer import learning_rate, make_optimizer, step
from training.preflight import read
from training.sample import main as sample_main
from training.sample import sample
from training.session import open_session

CPU = torch.device("cpu")
ARMS = sorted(path.stem for path in (ROOT / "conf" / "router").glob("*.yaml"))


def test_new_files_change_no_run_but_those_that_are_written_in_them(tmp_path, monkeypatch):
    """dirty is of the commit's files, save results; a digest of new ones goes with a model that has parts of them."""

    def git(*words):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "a.py").write_text("a = 1")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "b.yaml").write_text("b: 1")
    git("init")
    git("add", ".")
    git("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-m", "Begin")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    own = type("Own", (torch.nn.Identity,), {"__module__": "routers.own"})
    (tmp_path / "results" / "b.yaml").write_text("b: 2")
    (tmp_path / "routers").mkdir()
    (tmp_path / "routers" / "own.py").write_text("own = 1")
    state = provenance.git_state()
    assert state["dirty"] is None and state["new"] == {"routers/own.py": "own = 1"}
    first = provenance.own_files(torch.nn.Sequential(own()), state["new"])
    assert first and provenance.own_files(torch.nn.Identity(), state["new"]) is None
    (tmp_path / "routers" / "own.py").write_text("own = 2")
    (tmp_path / "a.py").write_text("a = 2")
    changed = provenance.git_state()
    assert changed["dirty"] and "+a = 2" in changed["diff"]
    assert provenance.own_files(own(), changed["new"]) not in (None, first)


def folder_of(*overrides):
    return open_run(read(compose_config(*overrides))).folder


def lines_of(folder):
    """metrics.jsonl without what a clock wrote."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def final_state(folder):
    (last,) = (folder / "checkpoints").iterdir()
    return {
        f"{path.stem}/{key}": value for path in last.glob("*.safetensors") for key, value in load_file(path).items()
    }


@pytest.mark.parametrize("name", one_of_a_kind(ARMS))
def test_a_run_writes_its_record_and_a_second_call_does_nothing(name, tiny, arm, capsys):
    config = compose_config(*tiny, *arm(name))
    assert run(config) == FINISHED
    folder = folder_of(*tiny, *arm(name))
    result = json.loads((folder / "result.json").read_text())
    assert result["val/perplexity"] == pytest.approx(math.exp(result["val/ce"]))
    assert 0 < result["test/ce"] < math.log(300)
    assert result["tokens"] == 12 * 4 * 32
    routers = load_run(folder).model.routers.values()
    assert ("val/ce_as_in_training" in result) == any(router.trains_differently for router in routers)
    assert result["leaks"] == sorted({leak for router in routers for leak in router.leaks})
    evaluation = load_file(folder / "evaluation.safetensors")
    for split in ("validation", "test"):
        for part in ("document", "decile"):
            total = evaluation[f"{split}/{part}_ce_sum"].sum() / evaluation[f"{split}/{part}_tokens"].sum()
            assert float(total) == pytest.approx(result["val/ce" if split == "validation" else "test/ce"])
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["dispatch"] == ("grouped_mm" if routers else "none")
    for router in routers:
        assert torch.equal(evaluation["test/token_expert/1"].sum(0), evaluation["test/load/1"])
        assert int(evaluation["test/load/1"].sum()) == result["test/tokens"] * router.experts_per_token
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert run(config) == FINISHED
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_validations_in_training_may_read_a_part_and_the_result_is_over_all(tiny, capsys):
    words = [*tiny, "record.validation_windows=3"]
    assert run(compose_config(*words)) == FINISHED
    folder, whole = folder_of(*words), len(open_run(read(compose_config(*words))).splits["validation"])
    result = json.loads((folder / "result.json").read_text())
    assert f"validations during training read 3 of {whole} windows" in capsys.readouterr().out
    assert {line["val/tokens"] for line in lines_of(folder) if "val/ce" in line} == {3 * 32}
    assert 32 * (whole - 1) < result["val/tokens"] <= 32 * whole


STOPPED_EVERYWHERE = ("dense", "hash_balanced", "switch", "base", "loss_free", "stable_moe")  # others in the middle


@pytest.mark.parametrize("name", one_of_a_kind(ARMS))
def test_an_interrupted_run_equals_an_uninterrupted_one(name, tiny, arm, tmp_path):
    words = [*tiny, *arm(name), "record.keep_optimizer=true"]
    words += ["router.jitter=0.1", "router.capacity_factor=1.0"] if name == "switch" else []
    equal_when_stopped(words, tmp_path, 1 if name in STOPPED_EVERYWHERE else 6)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ARMS if name not in STOPPED_EVERYWHERE])
def test_a_run_stopped_after_each_step_equals_one_that_was_not(name, tiny, arm, tmp_path):
    equal_when_stopped([*tiny, *arm(name), "record.keep_optimizer=true"], tmp_path, 1)


def test_a_run_that_is_stopped_in_its_third_epoch_goes_on_in_it(tiny, tmp_path):
    words = [*tiny, "data.sequence_length=128", "train.batch_size=32", "record.keep_optimizer=true"]
    full = open_run(read(compose_config(*words))).splits["train"].full
    assert 2 * full < 4 * 32 < 3 * full < 12 * 32  # the first stop, and the end
    equal_when_stopped(words, tmp_path, 4)


def equal_when_stopped(words, tmp_path, every, steps=12):
    """A run of these words, and one that is stopped after so many steps again and again, agree in all they keep."""
    assert run(compose_config(*words)) == FINISHED
    whole = folder_of(*words)
    words = [*words, f"runs={tmp_path}/stopped"]

    class StopAfterSomeSteps(list):
        asked, begun = 0, False

        def __bool__(self):
            self.asked += self.begun  # the first validation asks, too
            # the loop asks twice a step; the evaluation after it goes on asking, and is let be
            return 2 * every - 1 <= self.asked <= 2 * every

    forward_backward = loop.Trainer.forward_backward

    def begin(trainer, micros):
        trainer.stop.begun = True
        return forward_backward(trainer, micros)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "stop_requests", lambda: _entered(StopAfterSomeSteps()))
        patched.setattr(loop.Trainer, "forward_backward", begin)
        statuses = [run(compose_config(*words)) for _ in range(steps // every)]
    assert statuses == [INTERRUPTED] * (steps // every - 1) + [FINISHED]
    stopped = folder_of(*words)
    assert lines_of(stopped) == lines_of(whole)
    states = final_state(whole), final_state(stopped)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, stopped)]
    of_a_clock = ("seconds", "train_seconds", "evaluate_seconds", "tokens_per_second", "peak_memory_bytes")
    first, second = ({k: v for k, v in result.items() if k not in of_a_clock} for result in results)
    assert first == second
    return whole


class _entered:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        pass


def test_same_seed_same_bits(tiny, tmp_path):
    words = ["router=switch", *tiny, "record.keep_optimizer=true"]
    folders = []
    for again in ("a", "b"):
        assert run(compose_config(*words, f"runs={tmp_path}/{again}")) == FINISHED
        folders.append(folder_of(*words, f"runs={tmp_path}/{again}"))
    states = [final_state(folder) for folder in folders]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert lines_of(folders[0]) == lines_of(folders[1])


def trained(*words, steps=3, dtype=torch.float32):
    """A model after some steps, without a run folder."""
    opened = open_run(read(compose_config(*words)))
    settings = opened.settings
    model = make_model(settings, opened.prepared, CPU).to(dtype)
    batches = loop.TrainingBatches(opened.splits["train"], settings.train.batch_size, settings.seed)
    optimizer = make_optimizer(model, settings.train)
    losses = make_losses(settings, model, CPU)
    lines = []
    nothing = lambda *_: None  # noqa: E731
    settings.train.steps = steps
    trainer = Trainer(settings, model, losses, optimizer, batches, Progress(), lines.append, nothing, nothing, [])
    trainer.train()
    return model, lines, opened, losses


@pytest.mark.parametrize("name", ["hash_balanced", "switch", "base"])
def test_accumulation_over_micro_batches_changes_nothing(name, tiny):
    words = [f"router={name}", *tiny, "model.dispatch=loop"]
    words += ["router.jitter=0.1", "router.capacity_factor=1.0"] if name == "switch" else []
    words += ["train.routing_group=1"] if name == "base" else []  # two windows that begin alike would tie exactly
    whole, whole_lines, *_ = trained(*words, dtype=torch.float64)
    split, split_lines, *_ = trained(*words, "train.micro_batch=2", dtype=torch.float64)
    for (key, one), other in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, msg=key)
    for one, other in zip(whole_lines, split_lines, strict=True):
        one.pop("tokens_per_second"), other.pop("tokens_per_second")
        assert one == pytest.approx(other, rel=1e-6)


def test_evaluation_covers_the_split_whatever_the_batch_size_and_changes_nothing(tiny):
    model, _, opened, losses = trained("router=switch", *tiny, "router.capacity_factor=1.0")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    counts = opened.prepared.token_counts
    sums = [evaluate(model, losses, opened.splits["validation"], size, counts) for size in (2, 6, 2)]
    assert int(sums[0]["tokens"]) == len(opened.prepared.tokens["validation"]) - 1
    assert mean_ce(sums[0]) == pytest.approx(mean_ce(sums[1]), rel=1e-6)
    assert all(torch.equal(value, sums[2][key]) for key, value in sums[0].items())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert model.training


def test_evaluating_is_no_training_time_from_the_first_one_on(tiny, monkeypatch):
    clock, evaluated = [0.0], session.evaluate

    def tick():
        clock[0] += 0.001
        return clock[0]

    def slowly(*args, **options):
        clock[0] += 100
        return evaluated(*args, **options)

    monkeypatch.setattr(time, "perf_counter", tick)
    monkeypatch.setattr(session, "evaluate", slowly)
    assert run(compose_config(*tiny)) == FINISHED
    result = json.loads((folder_of(*tiny) / "result.json").read_text())
    evaluations = sum("val/ce" in line for line in lines_of(folder_of(*tiny))) + 2  # validation and test at the end
    assert 0 < result["train_seconds"] < 1
    assert result["evaluate_seconds"] == pytest.approx(100 * evaluations, abs=1)
    assert result["seconds"] == pytest.approx(100 * evaluations, abs=2)


@pytest.mark.parametrize("path", ["grouped_mm", "loop"])
def test_what_the_compiler_refuses_runs_uncompiled_and_says_so(path, tiny, capsys):
    words = ["router=switch", *tiny, "train.compile=true", f"model.dispatch={path}"]
    assert run(compose_config(*words)) == FINISHED
    assert f"dispatch {path}, not compiled; " in capsys.readouterr().out
    assert json.loads((folder_of(*words) / "provenance.json").read_text())["compiled"] is False


@pytest.mark.parametrize("name", ["dense", "hash_balanced", "switch", "loss_free_top_k", "base", "stable_moe"])
def test_evaluating_by_the_graph_of_training_changes_no_bit(name, tiny):
    model, _, opened, losses = trained(f"router={name}", *tiny)
    modes = []

    def noting(batch, plans):
        modes.append((model.training, torch.is_grad_enabled(), *(r.training for r in model.routers.values())))
        return losses(batch, plans)

    def sums(graph: bool, as_in_training: bool) -> dict[str, torch.Tensor]:
        counts = opened.prepared.token_counts
        return evaluate(model, noting, opened.splits["test"], 4, counts, as_in_training, training_graph=graph)

    for as_in_training in (False, True):
        plain, by_graph = sums(False, as_in_training), sums(True, as_in_training)
        assert all(torch.equal(value, by_graph[key]) for key, value in plain.items())
        differ = any(router.trains_differently for router in model.routers.values())
        assert set(modes[-1]) == {
            as_in_training or not differ
        }  # the mode in which training compiled its graph, or none
    assert model.training and torch.is_grad_enabled()


def test_parts_from_elsewhere_are_evaluated_in_evaluation_mode(tiny, monkeypatch):
    """They may have dropout, which no router's declaration covers."""
    monkeypatch.setattr(session, "make_losses", lambda *_: None)  # the compiler takes seconds to import
    for more, by_training_graph in (("extra_packages=[]", True), ("extra_packages=[mine]", False)):
        run = open_run(read(compose_config("router=dense", *tiny, "train.compile=true", more)))
        run.folder.mkdir(parents=True)
        assert open_session(run).by_training_graph is by_training_graph
        run.folder.rmdir()


def test_a_loss_that_is_no_number_or_too_large_to_add_up_is_told_and_padding_s_is_not(tiny):
    model, _, opened, losses = trained("router=dense", *tiny)
    split, counts = opened.splits["validation"], opened.prepared.token_counts

    def ce_sum(padding: float, loss: float) -> float:
        def told(batch, plans):
            _, routings, aux_loss = losses(batch, plans)
            return torch.where(batch.counted, loss, padding), routings, aux_loss

        return float(evaluate(model, told, split, 5, counts)["ce_sum"])

    tokens = len(opened.prepared.tokens["validation"]) - 1
    assert ce_sum(float("nan"), 0.1) == pytest.approx(0.1 * tokens, rel=1e-7)
    assert ce_sum(0.0, 1e-7) == pytest.approx(1e-7 * tokens, rel=0.02)  # to 2^-29 nats each
    assert all(math.isnan(ce_sum(0.0, loss)) for loss in (float("nan"), float("inf"), 1e30))


def test_deciles_hold_a_tenth_of_the_training_text_each():
    deciles = frequency_deciles(torch.tensor([30, 10, 10, 10, 10, 10, 10, 5, 5, 0]))
    assert deciles.tolist() == [0, 3, 4, 5, 6, 7, 8, 9, 9, 9]


def test_the_learning_rate_by_hand(tiny):
    train = read(compose_config(*tiny, "train.steps=10", "train.warmup_steps=4", "train.lr=1.0")).train
    rates = [learning_rate(at, train) for at in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way down the cosine
    assert rates[9] == pytest.approx(0.1)
    train.schedule = "linear"
    assert learning_rate(7, train) == pytest.approx(0.1 + 0.9 / 3)


def test_what_decays_and_what_does_not(tiny):
    opened = open_run(
        read(compose_config("router=switch", *tiny, "model.positions=learned", "model.sparse_layers=[1]"))
    )
    model = make_model(opened.settings, opened.prepared, CPU)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = (
        {names[id(p)] for p in g["params"]} for g in make_optimizer(model, opened.settings.train).param_groups
    )
    assert {"embedding", "positions", "norm.weight", "blocks.1.ffn.router.gate"} <= free
    assert {"blocks.0.attention.qkv", "blocks.1.ffn.experts.w_in"} <= decayed
    assert len(decayed) + len(free) == len(names)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_no_weight_and_no_state(where):
    weights = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([weights], lr=0.1, fused=True)
    weights.grad = torch.ones(8)
    step(optimizer, 0.1, torch.tensor(1.0), 1.0)
    before = [weights.detach().clone(), *(v.clone() for v in optimizer.state[weights].values())]
    weights.grad = torch.ones(8)
    weights.grad[3] = float("nan") if where == "gradient" else 1.0
    _, finite = step(optimizer, 0.1, torch.tensor(1.0 if where == "gradient" else math.inf), 1.0)
    assert not finite
    after = [weights.detach(), *optimizer.state[weights].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is Triton's, for GPUs")
def test_an_update_in_one_pass_is_adamws(monkeypatch):
    """16M weights: by our kernel and by torch's, five steps of different rates, clipped, one of them not finite."""
    draws = torch.Generator("cuda").manual_seed(0)
    first = torch.randn(4, 2048, 2048, device="cuda", generator=draws)
    ours, theirs = (torch.nn.Parameter(first.clone()) for _ in range(2))
    optimizers = [
        torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True) for p in (ours, theirs)
    ]
    for number in range(5):
        gradient = torch.randn(first.shape, device="cuda", generator=draws)
        if number == 3:
            gradient[0, 0, 0] = float("nan")
        for parameter, optimizer, kernel in zip((ours, theirs), optimizers, (True, False)):
            parameter.grad = gradient.clone()
            monkeypatch.setattr("training.optimizer._in_one_pass", lambda p, kernel=kernel: kernel)
            _, finite = step(optimizer, 1e-2 * (number + 1), torch.ones((), device="cuda"), 1.0)
            assert bool(finite) == (number != 3)
    states = [optimizer.state[p] for p, optimizer in zip((ours, theirs), optimizers)]
    assert float(states[0]["step"]) == float(states[1]["step"]) == 4
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-5, atol=1e-9)


def test_a_diverged_run_is_finished_as_diverged(tiny, monkeypatch):
    words = ["router=dense", *tiny, "record.keep_optimizer=true", "record.checkpoint_every=1", "record.log_every=100"]
    losses = loop.Trainer.forward_backward

    def poisoned(self, micros):
        ce, routings, real = losses(self, micros)
        return (ce * math.nan if self.progress.step == 4 else ce), routings, real

    monkeypatch.setattr(loop.Trainer, "forward_backward", poisoned)
    assert run(compose_config(*words)) == DIVERGED
    folder = folder_of(*words)
    result = json.loads((folder / "result.json").read_text())
    assert (result["outcome"], result["step"]) == ("diverged", 5)
    assert "val/ce" not in result
    (last,) = (folder / "checkpoints").iterdir()
    assert last.name == "00000004"


def test_a_failure_leaves_its_traceback_and_can_go_on(tiny, monkeypatch, capsys):
    words = ["router=dense", *tiny, "record.checkpoint_every=2"]

    def failing(*_):
        error = RuntimeError("\na heading:\n\n  what is wrong\nlong advice")
        error.add_note("a note")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("training.session.evaluate", failing)
        assert run(compose_config(*words)) == FAILED
    folder = folder_of(*words)
    assert "failed: RuntimeError: a heading: what is wrong (traceback: " in capsys.readouterr().out
    trace = (folder / "error.txt").read_text()
    assert "in failing" in trace and trace.endswith("a note\nRuntimeError: a heading: what is wrong\n")
    assert run(compose_config(*words)) == FINISHED
    assert not (folder / "error.txt").exists()


def test_a_stop_signal_leaves_a_checkpoint_and_status_75(tiny):
    words = [*tiny, "train.steps=100000", "router=dense"]
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *words], stdout=subprocess.PIPE, text=True)
    folder = folder_of(*words)
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert checkpoint.latest(folder / "checkpoints") is not None
    assert not (folder / "result.json").exists()
    assert "goes on" in printed


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", ["switch", "dense"])
def test_a_stop_during_the_final_evaluation_loses_nothing(name, kept, tiny, tmp_path, monkeypatch):
    words = [*tiny, f"router={name}", f"record.keep_weights={kept}", "record.checkpoint_every=0"]
    assert run(compose_config(*words, f"runs={tmp_path}/whole")) == FINISHED
    stop, measured = [], session.Session.measure

    def measure_and_stop(self, split, **options):
        stop.extend([signal.SIGTERM] * (split == "test"))
        return measured(self, split, **options)

    with monkeypatch.context() as patched:
        patched.setattr(job, "stop_requests", lambda: _entered(stop))
        patched.setattr(session.Session, "measure", measure_and_stop)
        assert run(compose_config(*words)) == INTERRUPTED
    folder = folder_of(*words)
    assert checkpoint.latest(folder / "checkpoints") is not None
    assert not (folder / "result.json").exists()
    monkeypatch.setattr(loop.Trainer, "forward_backward", lambda *_: 1 / 0)  # nothing is trained again
    assert run(compose_config(*words)) == FINISHED
    results = [
        json.loads((each / "result.json").read_text()) for each in (folder, next((tmp_path / "whole").iterdir()))
    ]
    assert results[0]["test/ce"] == results[1]["test/ce"]
    assert (checkpoint.latest(folder / "checkpoints") is not None) == kept


@pytest.mark.parametrize("during", [True, False])
def test_a_stop_in_the_first_validation_trains_no_step_and_loses_nothing(during, tiny, tmp_path, monkeypatch):
    words, stop, measured = [*tiny, "router=switch", "record.keep_optimizer=true"], [], session.Session.measure

    def measure_and_stop(self, split, **options):
        stop.extend([signal.SIGTERM] * during)
        sums = measured(self, split, **options)
        assert not during, "a stop does not wait for the end of the first validation"
        stop.append(signal.SIGTERM)
        return sums

    with monkeypatch.context() as patched:
        patched.setattr(job, "stop_requests", lambda: _entered(stop))
        patched.setattr(session.Session, "measure", measure_and_stop)
        patched.setattr(loop.Trainer, "forward_backward", lambda *_: 1 / 0)
        assert run(compose_config(*words)) == INTERRUPTED
    assert run(compose_config(*words)) == run(compose_config(*words, f"runs={tmp_path}/whole")) == FINISHED
    one, other = folder_of(*words), next((tmp_path / "whole").iterdir())
    assert lines_of(one) == lines_of(other)
    assert all(torch.equal(value, final_state(other)[key]) for key, value in final_state(one).items())


def test_a_run_that_keeps_no_weights_saves_none_at_its_end(tiny, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", lambda *_: 1 / 0)
    assert (
        run(compose_config(*tiny, "router=dense", "record.keep_weights=false", "record.checkpoint_every=0")) == FINISHED
    )


def test_a_long_evaluation_says_how_far_it_is(tiny, monkeypatch, capsys):
    monkeypatch.setattr("training.recorder.PATIENCE", 0.0)
    assert run(compose_config(*tiny, "router=base")) == FINISHED
    printed = capsys.readouterr().out
    assert "test: 0% evaluated" in printed and "validation as in training: 0% evaluated" in printed


def test_one_process_at_a_time_works_on_a_run(tiny):
    config = compose_config("router=dense", *tiny)
    with held(folder_of("router=dense", *tiny)), pytest.raises(ValueError, match="another process"):
        run(config)


def test_a_damaged_checkpoint_is_passed_over_and_never_a_silent_start(tmp_path):
    tensors = {"model": {"w": torch.arange(4.0)}}
    for number in (1, 2):
        checkpoint.save(tmp_path, number, tensors, {})
    assert [p.name for p in tmp_path.iterdir()] == ["00000002"]  # the old one goes when the new one is good
    assert checkpoint.latest(tmp_path).name == "00000002"
    damaged = tmp_path / "00000002" / "model.safetensors"
    whole = damaged.read_bytes()
    for broken in (whole[:-1], whole[:70] + bytes([whole[70] ^ 1]) + whole[71:]):
        damaged.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.latest(tmp_path, warn=lambda _: None)
    damaged.write_bytes(whole)
    (tmp_path / "00000003").mkdir()  # what a kill could leave if renames were not whole
    warnings = []
    assert checkpoint.latest(tmp_path, warn=warnings.append).name == "00000002"
    assert "00000003" in warnings[0]
    damaged.unlink()
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.latest(tmp_path, warn=lambda _: None)
    assert checkpoint.latest(tmp_path / "none") is None


def test_to_sample_from_no_run_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sample", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        sample_main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is no run folder: it has no config.yaml\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["any", "--temperature", "nan"], "--temperature: must be a number of at least 0; got nan\n"),
        (["any", "--tokens", "-3"], "--tokens: must be a whole number of at least 0; got -3\n"),
        (["{}/a-*"], "error: {}/a-* must fit one run folder; it fits {}/a-1, {}/a-2\n"),
        (["{}/b-*"], "error: {}/b-* must fit one run folder; it fits none\n"),
        (["{}/*-1"], "error: {}/a-1 is no run folder: it has no config.yaml\n"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_a_line(words, said, tmp_path, monkeypatch, capsys):
    for name in ("a-1", "a-2"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("sys.argv", ["sample", *(word.replace("{}", str(tmp_path)) for word in words)])
    with pytest.raises(SystemExit, match="2"):
        sample_main()
    assert capsys.readouterr().err.endswith(said.replace("{}", str(tmp_path)))


def test_load_run_gives_the_model_back_and_it_samples(tiny):
    words = ["router=hash_balanced", *tiny]
    assert run(compose_config(*words)) == FINISHED
    folder = folder_of(*words)
    loaded = load_run(folder)
    losses = make_losses(loaded.settings, loaded.model, CPU)
    opened = open_run(loaded.settings)
    sums = evaluate(loaded.model, losses, opened.splits["test"], 4, loaded.prepared.token_counts)
    assert mean_ce(sums) == pytest.approx(loaded.result["test/ce"], rel=1e-6)
    loaded.model.eval()
    text = sample(loaded, "abc", 40, 0.8, seed=0)
    assert text.startswith("abc")
    assert text == sample(loaded, "abc", 40, 0.8, seed=0)
    with pytest.raises(ValueError, match="no run folder"):
        load_run(folder.parent)
    provenance = folder / "provenance.json"
    provenance.write_text(provenance.read_text().replace(loaded.prepared.fingerprint, "another"))
    with pytest.raises(ValueError, match="was trained on data another"):
        load_run(folder)


def test_a_run_that_is_not_finished_is_loaded_with_the_step_of_its_weights_said(tiny, capsys):
    worse = ["train.patience=9", "train.lr=1", "train.min_lr_share=1"]  # the best weights are the first
    for words, at in ((["router=switch"], 12), (["router=switch", *worse], 0)):
        assert run(compose_config(*words, *tiny)) == FINISHED
        folder = folder_of(*words, *tiny)
        capsys.readouterr()
        assert load_run(folder).result and capsys.readouterr().err == ""
        (folder / "result.json").unlink()
        assert load_run(folder).result == {}
        assert capsys.readouterr().err == f"{folder} is not finished: its weights are of step {at} of 12\n"


def test_what_a_folder_lacks_to_be_loaded_is_said_before_its_settings_are_read(tiny):
    assert run(compose_config("router=dense", *tiny, "record.keep_weights=false")) == FINISHED
    folder = folder_of("router=dense", *tiny)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["folder"] = "/nowhere"  # as that of a run from another machine
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=f"no weights, .*; python -m training.again {folder} record.keep_weights=true"):
        load_run(folder)
    (folder / "result.json").unlink()
    with pytest.raises(ValueError, match="is not finished and has saved no weights yet; the command that began it"):
        load_run(folder)
    for name in ("metrics.jsonl", "provenance.json", "config.yaml"):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"^{folder} is no run folder: it has no {name}$"):
            load_run(folder)


def test_wandb_can_fail_and_mirrors_when_it_does_not(tiny, tmp_path, monkeypatch):
    import wandb

    words = ["router=dense", *tiny]
    assert run(compose_config(*words, f"runs={tmp_path}/off")) == FINISHED
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert run(compose_config(*words, f"runs={tmp_path}/on", "wandb.mode=offline")) == FINISHED
    assert list((tmp_path / "on").glob("*/wandb/offline-run-*/*.wandb"))

    def broken(*_, **__):
        raise RuntimeError("no wandb today")

    monkeypatch.setattr(wandb, "init", broken)
    assert run(compose_config(*words, f"runs={tmp_path}/broken", "wandb.mode=offline")) == FINISHED
    folders = [next((tmp_path / kind).glob("dense-*")) for kind in ("off", "on", "broken")]
    assert lines_of(folders[0]) == lines_of(folders[1]) == lines_of(folders[2])
    console = (folders[2] / "console.log").read_text()
    assert console.count("warning: wandb") == 1
    assert "no wandb today" in console


def test_deterministic_holds_for_plain_and_compiled_kernels():
    text = """
import torch
import yaml
from training.build import compute_deterministically
compute_deterministically()
assert torch.are_deterministic_algorithms_enabled() and torch._inductor.config.deterministic
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_is_found_under_any_arms_name_and_first_under_its_own(tiny):
    """Of packs of two studies both may be there."""
    words = [*tiny, "arm=mine"]
    own = open_run(read(compose_config(*words))).folder
    assert own.name.startswith("mine-s0-") and not own.exists()
    other = own.with_name(own.name.replace("mine", "another"))
    other.mkdir(parents=True)
    assert open_run(read(compose_config(*words))).folder == other
    own.mkdir()
    assert open_run(read(compose_config(*words))).folder == own
