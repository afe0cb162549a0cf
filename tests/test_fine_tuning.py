import dataclasses
import json
import shutil
import subprocess

import pytest
import torch
import yaml
from conftest import ROOT, compose_config
from omegaconf import DictConfig
from safetensors.torch import load_file
from test_config import run_py
from test_training import equal_when_stopped, folder_of, lines_of

from analysis.report import explained, report
from data.dictionary_files import find_dictionary
from sweeps.job import Job
from sweeps.job_queue import Queue
from training import job, loop
from training.build import make_losses
from training.checkpoint import CPU, load_run
from training.evaluation import evaluate, mean_ce
from training.job import FINISHED, open_run, run
from training.preflight import read


@pytest.fixture(scope="session")
def first(arm, tmp_path_factory, corpus):
    """router -> the words of a finished run of a second, and its folder; each is made once."""
    from conftest import tiny_words

    runs, made = tmp_path_factory.mktemp("first"), {}
    words = [*tiny_words(corpus, tmp_path_factory.getbasetemp() / "cache", runs), "train.steps=4"]

    def make(name):
        if name not in made:
            chosen = arm(name)
            assert run(compose_config(*words, *chosen, "seed=5")) == FINISHED
            made[name] = chosen, folder_of(*words, *chosen, "seed=5")
        return made[name]

    return make


def weights_of(folder):
    (last,) = (folder / "checkpoints").iterdir()
    (kept,) = (path for path in last.iterdir() if path.name in ("model.safetensors", "best.safetensors"))
    return load_file(kept)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


SHORT = [("switch", "sparse"), ("loss_free", "all_but_sparse"), ("hash_balanced", "all"), ("dense", "sparse")]
LONG = [("dense", "all_but_sparse")]
LONG += [(name, update) for name in ("stable_moe", "base") for update in ("all_but_sparse", "sparse")]


@pytest.mark.parametrize(("name", "update"), [*SHORT, *(pytest.param(*each, marks=pytest.mark.long) for each in LONG)])
def test_what_is_frozen_does_not_move_by_a_bit_and_the_rest_does(name, update, tiny, first):
    chosen, start = first(name)
    words = [*tiny, *chosen, f"train.init_from={start}", f"train.update={update}", "record.keep_optimizer=true"]
    words.append("train.steps=3")
    assert run(compose_config(*words)) == FINISHED
    folder = folder_of(*words)
    before, after = weights_of(start), weights_of(folder)
    sparse = {key for key in before if key.startswith("blocks.1.ffn.")}
    trained = {"all": set(before), "sparse": sparse, "all_but_sparse": set(before) - sparse}[update]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys() and moved <= trained
    tables = {key for key in before if key.endswith((".table", ".salt", ".stage"))}
    kept = {key for key in before if ".router." in key and name == "stable_moe"}  # all but the gate is frozen by now
    assert trained - tables - kept <= moved
    assert ("blocks.1.ffn.router.bias" in moved) == (name == "loss_free" and update != "all_but_sparse")
    (last,) = (folder / "checkpoints").iterdir()
    state = {key.rpartition("/")[0] for key in load_file(last / "optimizer.safetensors")}
    assert state <= trained
    parameters = dict(load_run(folder).model.named_parameters())
    assert result_of(folder)["parameters/trained"] == sum(parameters[key].numel() for key in trained & set(parameters))


def test_early_stopping_keeps_evaluates_and_reports_the_best_weights(tiny, monkeypatch):
    words = [*tiny, "router=switch", "train.patience=2", "record.evaluate_every=2", "train.steps=30"]
    words += ["train.lr=2", "train.warmup_steps=100"]  # a rate that rises until it is too large
    seen = {}
    best = job.Session.validate

    def noted(self, watch):
        figures = best(self, watch)
        seen[self.progress.step] = {key: value.clone() for key, value in self.model.state_dict().items()}
        return figures

    monkeypatch.setattr(job.Session, "validate", noted)
    assert run(compose_config(*words)) == FINISHED
    folder = folder_of(*words)
    validations = {line["step"]: line["val/ce"] for line in lines_of(folder) if "val/ce" in line}
    result = result_of(folder)
    least = min(validations, key=validations.__getitem__)
    assert result["best_step"] == least and result["step"] == least + 4 < 30  # two more validations, then the end
    assert result["val/ce"] == pytest.approx(validations[least], rel=1e-6)
    assert [line["best_step"] for line in lines_of(folder) if "val/ce" in line][-1] == least
    assert all(torch.equal(value, seen[least][key]) for key, value in weights_of(folder).items())
    loaded = load_run(folder)
    losses = make_losses(loaded.settings, loaded.model, CPU)
    sums = evaluate(loaded.model, losses, open_run(loaded.settings).splits["test"], 4, loaded.prepared.token_counts)
    assert mean_ce(sums) == pytest.approx(result["test/ce"], rel=1e-6)


@pytest.mark.parametrize(
    "name", ["switch", *(pytest.param(n, marks=pytest.mark.long) for n in ("dense", "stable_moe"))]
)
def test_fine_tuning_with_early_stopping_goes_on_after_each_stop_as_if_there_was_none(name, tiny, first, tmp_path):
    chosen, start = first(name)
    words = [*tiny, *chosen, f"train.init_from={start}", "record.keep_optimizer=true", "train.lr=3"]
    words += ["train.patience=2", "record.evaluate_every=1", "train.warmup_steps=10"]
    assert run(compose_config(*words)) == FINISHED
    steps = result_of(folder_of(*words))["step"]
    assert 2 <= steps < 12
    equal_when_stopped(words, tmp_path, 1, steps)


def test_epochs_give_the_steps(tiny):
    opened = open_run(read(compose_config(*tiny, "train.epochs=2.5")))
    windows = (len(opened.prepared.tokens["train"]) - 1) // 32
    assert opened.settings.train.steps == -(-5 * windows // 8)  # ceil(2.5 * windows / 4)
    same = open_run(read(compose_config(*tiny, f"train.steps={opened.settings.train.steps}")))
    assert opened.folder == same.folder
    assert open_run(read(compose_config(*tiny, "train.epochs=3"))).folder != same.folder


def test_the_id_covers_the_start_and_with_patience_how_often_is_validated(tiny, first):
    _, start = first("dense")
    plain = folder_of(*tiny)
    tuned = folder_of(*tiny, f"train.init_from={start}")
    assert folder_of(*tiny, f"train.init_from={start.parent}/dense-s5-*") == tuned != plain
    assert folder_of(*tiny, "train.patience=2") != plain
    often = folder_of(*tiny, "train.patience=2", "record.evaluate_every=1")
    assert folder_of(*tiny, "train.patience=2") != often
    assert folder_of(*tiny, "record.evaluate_every=1") == folder_of(*tiny, "record.validation_windows=3") == plain
    assert folder_of(*tiny, "train.patience=2", "record.validation_windows=3") != folder_of(*tiny, "train.patience=2")
    assert folder_of(*tiny, "train.update=sparse") != plain


def test_a_glob_of_starts_means_no_run_that_such_a_start_has_made(tiny, tmp_path):
    assert run(compose_config(*tiny, "train.steps=2")) == FINISHED
    words = [*tiny, "train.steps=3", f"train.init_from={tmp_path}/runs/dense-s0-*"]
    assert run(compose_config(*words)) == FINISHED
    folder = folder_of(*words)
    assert (folder / "result.json").exists() and len(list((tmp_path / "runs").glob("dense-s0-*"))) == 2
    assert run(compose_config(*tiny, "train.steps=4")) == FINISHED
    with pytest.raises(ValueError, match="it fits several: name one; found dense-s0-[0-9a-f]*, dense-s0-[0-9a-f]*$"):
        read(compose_config(*words))


ANOTHER = [
    (["router=switch"], "router._target_"),
    (["router=hash_random"], "router.table must be that of train.init_from="),
    (["router=hash_balanced", "router.per_layer=false"], "router.per_layer"),
    (["router=hash_balanced", "num_experts=8"], "num_experts must be that of train.init_from="),
    (["router=hash_balanced", "model.d_ff=128"], "model.d_ff must be that of train.init_from="),
    (["router=hash_balanced", "data.sequence_length=16"], "data.sequence_length must be that of"),
    (["router=hash_balanced", "experts.num_shared=1"], "experts.num_shared must be that of"),
    (["router=hash_balanced", "train.update=none"], "train.update must be one of all, sparse, all_but_sparse"),
    (["router=hash_balanced", "train.patience=0"], "train.patience must be at least 1; got 0"),
    (["router=hash_balanced", "train.epochs=0"], "train.epochs must be at least"),
]


@pytest.mark.parametrize(("words", "message"), ANOTHER)
def test_another_model_than_the_one_it_starts_from_is_one_line_before_any_work(words, message, tiny, first):
    _, start = first("hash_balanced")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read(compose_config(*tiny, f"train.init_from={start}", *words))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_start_that_is_not_there_is_one_line(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"train\.init_from=.*must name one finished run .*; found none"):
        read(compose_config(*tiny, f"train.init_from={tmp_path}/dense-s0-*"))


def test_coefficients_may_be_others_than_in_the_run_it_starts_from(tiny, first):
    chosen, start = first("switch")
    words = [*tiny, *chosen, f"train.init_from={start}", "router.load_balance_coef=0.1", "router.capacity_factor=1.5"]
    assert run(compose_config(*words)) == FINISHED


COLOURS = {"apple": "red", "lemon": "yellow", "leaf": "green", "sky": "blue", "snow": "white", "coal": "black"}


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory):
    """A folder of small talk in which who has read enough of it knows every answer."""
    folder = tmp_path_factory.mktemp("dialogues")
    lines = []
    for number in range(240):
        thing, other = list(COLOURS)[number % 6], list(COLOURS)[number // 6 % 6]
        turns = [["Ann", f"What colour is the {thing} number {number}?"], ["Bo", f"It is {COLOURS[thing]}."]]
        turns += [["Ann", f"And the {other}?"], ["Bo", f"That one is {COLOURS[other]}."]]
        lines.append(json.dumps({"turns": turns}))
    (folder / "talk.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", ["hash_balanced", pytest.param("switch", marks=pytest.mark.long)])
def test_fine_tuning_on_dialogues_lowers_the_perplexity_of_responses(name, dialogues, tiny, tmp_path):
    assert run(compose_config(*tiny, f"router={name}")) == FINISHED
    first = folder_of(*tiny, f"router={name}")
    own = [word for word in tiny if not word.startswith(("data=", "data.corpus", "train.steps"))]
    words = [*own, "experiment=finetune/own", f"router={name}", f"data.folder={dialogues}", "train.lr=1e-2"]
    words += ["data.sequence_length=32", "record.evaluate_every=20"]
    assert run(compose_config(*words)) == FINISHED
    folder = folder_of(*words)
    assert folder.name.startswith(f"{name}_tuned-s0-")
    validations, result = [line for line in lines_of(folder) if "val/ce" in line], result_of(folder)
    assert validations[0]["step"] == 0 and result["best_step"] > 0
    assert result["val/ce"] < validations[0]["val/ce"] - 1  # of the responses alone, in nats
    loaded = load_run(folder)
    assert (
        0
        < result["val/tokens"]
        == loaded.prepared.splits["validation"]["counted"]
        < loaded.prepared.splits["validation"]["tokens"]
    )
    assert (loaded.prepared.folder / "tokenizer.json").read_bytes() == find_dictionary(str(first)).read_bytes()
    for key, value in weights_of(first).items():
        assert not key.endswith(".table") or torch.equal(value, weights_of(folder)[key])
    shutil.rmtree(first)
    assert load_run(folder).settings.train.init_from is None  # a loaded run needs its start no more


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_finetune_asks_for_the_dialogues_and_no_other_target_does():
    for words, status, said in (
        ("finetune", 2, "needs DIALOGUES=PATH"),
        ("test", 0, ""),
        ("finetune DIALOGUES=here", 0, ""),
    ):
        done = subprocess.run(["make", "-n", *words.split()], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and said in done.stderr and len(done.stderr.splitlines()) == bool(said)


def test_a_sweep_makes_the_run_that_a_later_job_starts_from(tiny, tmp_path):
    words = [
        "-m",
        "sweeps=finetune",
        *tiny,
        "router=hash_balanced,dense",
        "train.steps=2",
        "seed=1",
    ]
    done = run_py(*words, "train.epochs=null", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = json.loads((tmp_path / "runs" / "sweeps" / "finetune.json").read_text())
    assert [name.split("-")[0] for name in sweep["runs"]] == ["hash_balanced_tuned", "dense_tuned"]
    assert [name.split("-")[0] for name in sweep["started_from"]] == ["dense", "hash_balanced"]
    for name, first in zip(sweep["runs"], reversed(sweep["started_from"])):
        config = yaml.safe_load((tmp_path / "runs" / name / "config.yaml").read_text())
        assert config["train"]["init_from"] == str(tmp_path / "runs" / first)
    assert "2 of 2 runs are counted" in report("finetune", tmp_path / "runs", tmp_path / "results")
    assert "explain_load.png" in explained("finetune", tmp_path / "runs", tmp_path / "results")


def test_a_job_whose_start_was_not_made_is_not_started(tmp_path):
    jobs = [Job(tmp_path / "first", DictConfig({}), status=3)]
    jobs.append(Job(tmp_path / "second", DictConfig({}), after=jobs[0]))
    queue = Queue(jobs, [{}], print, (), 1.0)
    queue.turn()
    assert jobs[1].status == 1 and not queue.running and not queue.waiting
    assert jobs[1].outcome() == "not started: it starts from first, which is not finished"


def test_another_dictionary_than_that_of_the_start_is_refused(tiny, first, tmp_path):
    chosen, start = first("dense")
    other = open_run(read(compose_config(*tiny, "data.vocab_size=290"))).prepared.folder
    with pytest.raises(ValueError, match=r"tokenizer\.file=.* must have the dictionary of .*; it has another one"):
        open_run(read(compose_config(*tiny, *chosen, f"train.init_from={start}", f"tokenizer.file={other}")))
    with pytest.raises(ValueError, match=r"tokenizer\._target_ must be that of train\.init_from="):
        read(compose_config(*tiny, *chosen, f"train.init_from={start}", "tokenizer=bytes"))
    same = open_run(read(compose_config(*tiny, *chosen, f"train.init_from={start}", "data.vocab_size=290")))
    # its dictionary, whatever vocab_size says, which says so from then on
    assert same.prepared.vocab_size == same.settings.data.vocab_size == same.settings.tokenizer["vocab_size"] == 300


def look_finished(opened):
    """What a run leaves that another one starts from, but for its weights' values."""
    (opened.folder / "checkpoints" / "1").mkdir(parents=True)
    (opened.folder / "checkpoints" / "1" / "model.safetensors").touch()
    (opened.folder / "result.json").touch()
    (opened.folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(opened.settings)))
    data = {"cache_key": opened.prepared.folder.name, "splits": opened.prepared.splits, "vocab_size": 300}
    (opened.folder / "provenance.json").write_text(json.dumps({"data": data}))


SIZED = {"positions": ["model.positions=learned"], "blocks.1.ffn.router.table": ["router=hash_position"], "": []}
IN_ENCODER = ["router=hash_position", "model.sparse_in=encoder", "model.sparse_layers=[0]"]
SIZED["encoder.blocks.0.ffn.router.table"] = IN_ENCODER


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", SIZED)
def test_what_is_sized_by_an_encoders_part_goes_from_text_to_no_dialogue(name, planned, dialogues, tiny, tmp_path):
    """In one line, before there is a run folder; what is not sized by it goes."""
    model = ["model.encoder_layers=1", "router=hash_balanced", *SIZED[name]]
    first = open_run(read(compose_config(*tiny, *model)))
    if not planned:
        look_finished(first)
    own = [word for word in tiny if not word.startswith(("data=", "data.corpus", "runs="))]
    words = [*own, *model, "data=dialogue", f"data.corpus.files={dialogues}/*.jsonl", "data.sequence_length=32"]
    words += [f"train.init_from={first.folder}", f"runs={tmp_path}/tuned"]
    if planned:
        words[-2] = f"train.init_from={first.folder.parent}/{first.settings.arm}-s0-*"
    settings = read(compose_config(*words), [first.settings] if planned else [])
    if not name:
        assert open_run(settings, [first] if planned else []).prepared.counted
        return
    rule = f"must have read dialogues, as this run does, for {name} has a place .*; it has read plain text"
    with pytest.raises(ValueError, match=f"train.init_from={first.folder} {rule}$"):
        open_run(settings, [first] if planned else [])
    assert not (tmp_path / "tuned").exists()


def test_a_step_of_context_alone_is_no_divergence(tiny, monkeypatch):
    whole = loop.Trainer.micro_batches

    def uncounted(self, step):
        micros = whole(self, step)
        return [(b._replace(counted=b.counted & (step != 1)), plans) for b, plans in micros]

    monkeypatch.setattr(loop.Trainer, "micro_batches", uncounted)
    assert run(compose_config(*tiny, "train.steps=3")) == FINISHED
    lines = [line for line in lines_of(folder_of(*tiny, "train.steps=3")) if "train/ce" in line]
    assert [line["train/ce"] > 0 for line in lines] == [True, False, True] and lines[1]["grad_norm"] == 0
