"""Sweeps as plans: what they compose to, which runs they share, and what a dry run says."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ROOT, compose_config
from omegaconf import OmegaConf
from test_config import ARMS, NUM_EXPERTS, run_py

from analysis.report import explained, report
from analysis.runs import read_study
from data.prepare import NotPrepared
from sweeps import dry_run
from sweeps.cells import cells_of, groups_of, require_apart
from sweeps.composing import jobs_of
from sweeps.estimate import Pace, cost
from sweeps.overview import overview
from sweeps.plan import Plan, errors, jobs_to_run, states
from training.build import open_data
from training.folder import WEIGHTS
from training.identity import digest_of, provisional_id
from training.preflight import read
from training.provenance import device_name

# Arms of each sweep: runs of one seed; of position, two routers at each of smoke's 3 layers, and dense.
SWEEPS = {"quickstart": 5, "routers": 43, "finetune": 6, "main": 9, "hash_methods": 10, "modules": 13, "multi_hash": 5}
SWEEPS |= {"position": 7, "load_balance": 7, "dictionary": 12, "base_comparison": 6, "same_or_different": 5}
SWEEPS |= {"learned_and_controls": 11, "gate_by_routing": 5, "load_by_content": 7, "horizon": 12, "first_k_hash": 5}
SWEEPS |= {"table_draws": 8, "noise_floor": 6, "rates": 2, "tune": 248}
LAYERS = {"smoke": 3, "small": 8, "medium": 11, "paper": 11}
DEPENDS_ON_THE_SCALE = ("main", "position", "dictionary", "first_k_hash")


def unprepared(settings):
    raise NotPrepared("not now")


def plan_of(sweep: str, *words: str, data=unprepared) -> Plan:
    compose, jobs = jobs_of([f"sweeps={sweep}", *words])
    plan = Plan(compose, data)
    for each in jobs:
        plan.check(each)
    plan.open()
    return plan


def seeds_of(sweep: str) -> list[str]:
    params = OmegaConf.load(ROOT / "sweeps" / f"{sweep}.yaml").hydra.sweeper.params
    return str(params.seed).split(",")


SHORT = [(sweep, "smoke") for sweep in SWEEPS if sweep not in ("tune", "routers")]
SHORT += [(sweep, "small") for sweep in DEPENDS_ON_THE_SCALE]
LONG = [(sweep, scale) for sweep in SWEEPS for scale in NUM_EXPERTS if (sweep, scale) not in SHORT]


@pytest.mark.parametrize(("sweep", "scale"), [*SHORT, *(pytest.param(*each, marks=pytest.mark.long) for each in LONG)])
def test_each_sweep_composes_to_its_stated_jobs_at_every_scale_and_all_pass_preflight(sweep, scale, tmp_path):
    first, *_ = seeds = seeds_of(sweep)
    plan = plan_of(sweep, f"scale={scale}", f"runs={tmp_path}", f"seed={first}")
    assert plan.errors() == []
    require_apart(plan.jobs, plan.compose)
    runs = {provisional_id(job.settings) for job in plan.jobs if job.settings}
    arms = 1 + 2 * LAYERS[scale] if sweep == "position" else SWEEPS[sweep]
    assert len(runs) == arms
    assert {job.settings.scale for job in plan.jobs if job.settings} == {scale}
    assert stated_jobs(sweep, scale) == arms * len(seeds)
    labels = {(job.settings.arm, provisional_id(job.settings)) for job in plan.jobs if job.settings}
    assert len(labels) == len(runs) == len({arm for arm, _ in labels}) or sweep == "finetune"  # a label an arm
    assert len({*groups(plan).values()}) == {"dictionary": 4, "horizon": 3}.get(sweep, 0)


def groups(plan: Plan) -> dict[str, str]:
    """As they are once the text is prepared, of which corpus and tokenizer tell here."""
    for job in plan.jobs:
        if job.settings:
            text = zlib.crc32(repr((job.settings.data.corpus, job.settings.tokenizer)).encode())
            prepared = SimpleNamespace(fingerprint=f"{text:08x}")
            job.run = SimpleNamespace(settings=job.settings, prepared=prepared, folder=Path(job.name))  # type: ignore[assignment]
    return groups_of(cells_of(plan.jobs))


GRIDS = [  # words, and the arms of each text and budget
    (
        "router=dense,switch tokenizer=bpe,words seed=0,1",
        [["dense_bpe", "switch_bpe"], ["dense_words", "switch_words"]],
    ),
    ("router=dense tokenizer=bpe,words", [["dense_bpe"], ["dense_words"]]),
    ("router=dense,switch train.steps=3,6", [["dense_3", "switch_3"], ["dense_6", "switch_6"]]),
    ("router=dense,switch train.horizon=1,2", [["dense_1", "switch_1"], ["dense_2", "switch_2"]]),
    (
        "router=dense,switch tokenizer=bpe,words data.vocab_size=300,400",  # words are the same whatever that is
        [
            ["dense_bpe_300", "switch_bpe_300"],
            ["dense_bpe_400", "switch_bpe_400"],
            ["dense_words_300", "dense_words_400", "switch_words_300", "switch_words_400"],
        ],
    ),
    ("router=dense,switch seed=0,1", []),
    ('router=dense,switch,base train.steps="2${if_routed:0}"', []),  # dense alone has fewer
    ("router=dense,switch train.steps=${seed} seed=3,4", []),  # each arm has several
    ("sweeps=tune router=dense,switch tokenizer=bpe,words", []),
]


@pytest.mark.parametrize(("words", "expected"), GRIDS)
def test_arms_of_one_text_and_budget_are_a_group_where_a_grid_has_several(words, expected, tiny):
    swept = re.findall(r"(tokenizer|data.vocab_size|train.steps|train.horizon)=[^$\"]", words)
    ends = [f"${{{key}}}".replace("{tokenizer}", "{hydra:runtime.choices.tokenizer}") for key in swept]
    label = f"arm={'_'.join(['${hydra:runtime.choices.router}', *ends])}"
    found: dict[str, list[str]] = {}
    for arm, group in groups(planned(*tiny, *words.split(), label)).items():
        found.setdefault(group, []).append(arm)
    assert sorted(map(sorted, found.values())) == expected


def header(sweep: str) -> str:
    text = (ROOT / "sweeps" / f"{sweep}.yaml").read_text()
    assert all(word in text for word in ("Jobs: ", "Time: ", "Expect: ")) and max(map(len, text.splitlines())) < 170
    return text


def stated_jobs(sweep: str, scale: str) -> int:
    """By its header; position has a number for each scale."""
    named = {"medium": "scale=medium and paper", "paper": "scale=medium and paper"}.get(scale, f"scale={scale}")
    pattern = rf"(\d+) at {named}" if sweep == "position" else r"Jobs: (\d+)"
    found = re.search(pattern, header(sweep))
    assert found
    return int(found[1])


def test_every_sweep_is_tested():
    assert {path.stem for path in (ROOT / "sweeps").glob("*.yaml")} == SWEEPS.keys()
    assert all(header(sweep) for sweep in SWEEPS)
    routers = OmegaConf.load(ROOT / "sweeps" / "routers.yaml").hydra.sweeper.params.router
    assert sorted(name.strip() for name in routers.split(",")) == ARMS


def test_every_experiment_belongs_to_a_sweep():
    used = "".join((ROOT / "sweeps" / f"{sweep}.yaml").read_text() for sweep in SWEEPS)
    for path in (ROOT / "conf" / "experiment").glob("*/*.yaml"):
        assert f"{path.parent.name}/{path.stem}" in used


def test_a_cell_that_several_tables_share_is_one_run(tmp_path):
    def runs(sweep: str, *words: str) -> dict[str, str]:
        jobs = plan_of(sweep, "seed=0", f"runs={tmp_path}", *words).jobs
        return {job.settings.arm: provisional_id(job.settings) for job in jobs if job.settings}

    main, modules, multi = runs("main"), runs("modules"), runs("multi_hash")
    assert main["hash_balanced_1x64"] == modules["hash_balanced_64"]
    assert main["dense"] == modules["dense"] == multi["dense"]
    assert modules["hash_balanced_16"] == multi["hash_balanced_1_hash"]  # 16 is smoke's own number
    same = runs("same_or_different")
    assert same["hash_balanced_different"] == main["hash_balanced_5x16"] != same["hash_balanced_same"]
    draws = {
        (job.settings.arm, job.settings.seed): job
        for job in plan_of("table_draws", f"runs={tmp_path}").jobs
        if job.settings
    }
    for seed in range(2):
        plain = provisional_id(read(compose_config("router=hash_random", f"seed={seed}")))
        assert [provisional_id(draws[f"hash_random_draw_{draw}", seed].settings) == plain for draw in range(2)] == [
            draw == seed for draw in range(2)
        ]


def test_a_dense_run_does_not_depend_on_what_it_does_not_use(tiny):
    def digest(*words):
        return digest_of(read(compose_config(*tiny, *words)), "text")

    unused = [
        "num_experts=8",
        "model.sparse_layers=[0]",
        "train.routing_group=4",
        "table_seed=7",
        "model.dispatch=loop",
    ]
    assert {digest("router=dense", word) for word in unused} == {digest("router=dense")}
    assert len({digest("router=hash_balanced", word) for word in [*unused, "seed=0"]}) == 6
    where = ["router=dense", "train.update=sparse"]  # then the place of the sparse layers decides what is trained
    assert digest(*where) != digest(*where, "model.sparse_layers=[0]")
    inserted = ["router=dense_inserted"]
    assert digest(*inserted) != digest(*inserted, "model.sparse_layers=[0]")
    assert digest(*inserted) == digest(*inserted, "num_experts=8")


@pytest.mark.parametrize(("key", "usual", "other"), [("repeat", 0, 1), ("deterministic", False, True)])
def test_repeat_and_deterministic_enter_the_id_and_nothing_else(key, usual, other, tiny):
    one, two = (read(compose_config(*tiny, "router=hash_balanced", f"{key}={value}")) for value in (usual, other))
    assert digest_of(one, "text") != digest_of(two, "text")
    setattr(two, key, usual)
    assert one == two


def test_a_job_waits_for_the_run_that_its_table_is_of_which_then_keeps_its_weights(tiny):
    words = [word for word in tiny if not word.startswith("model.sparse_layers")]
    plan = plan_of("load_by_content", *words, "seed=0,1", "record.keep_weights=false", data=open_data)
    assert plan.errors() == []
    jobs = jobs_to_run(plan.jobs)
    for job in jobs:
        clusters = job.config.router.get("table", "").startswith(("clustered", "dispersed"))
        assert (job.after is not None) == clusters
        if job.after is not None:
            assert job.after.folder.name.startswith(f"dense-s{job.config.seed}-")
            assert job.config.router.baseline == str(job.after.folder)
        assert job.config.record.keep_weights == job.folder.name.startswith("dense-")


def test_a_label_is_the_sweeps_and_a_run_is_found_under_another_ones(tiny, tmp_path):
    words = [*tiny, "seed=0", "train.steps=2", "train.warmup_steps=0", "router=hash_balanced"]
    first = run_py("-m", "sweeps=modules", *words, "num_experts=4", "arm=small", cwd=tmp_path)
    assert first.returncode == 0, first.stderr + first.stdout
    second = run_py("-m", "sweeps=modules", *words, "num_experts=4,8", cwd=tmp_path)
    assert "1 of 2 jobs are finished already" in second.stdout
    record = json.loads((tmp_path / "runs" / "sweeps" / "modules.json").read_text())
    assert [(cell["arm"], cell["seed"]) for cell in record["cells"]] == [("hash_balanced_4", 0), ("hash_balanced_8", 0)]
    assert record["cells"][0]["run"].startswith("small-s0-")
    study = read_study("modules", tmp_path / "runs")
    assert list(study.runs["arm"]) == ["hash_balanced_4", "hash_balanced_8"]


def test_a_sweep_of_ones_own_over_two_dictionaries_has_all_its_runs_in_its_table(tiny, tmp_path):
    words = ["-m", *tiny, "train.steps=2", "train.warmup_steps=0", "router=dense,hash_balanced", "tokenizer=bpe,bytes"]
    refused = run_py(*words, "sweep=mine", cwd=tmp_path)
    (added,) = shlex.split(refused.stderr.partition("to name an arm for each add ")[2])
    done = run_py(*words, "sweep=mine", added, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    printed = report("mine", tmp_path / "runs", tmp_path / "results")
    assert "4 of 4 runs are counted" in printed
    table = pd.read_csv(tmp_path / "results" / "smoke" / "mine" / "table.csv").set_index("arm")["reference_arm"]
    assert dict(table.dropna()) == {"hash_balanced_bpe": "dense_bpe", "hash_balanced_bytes": "dense_bytes"}
    assert "to Dense, bpe or Dense, bytes" in explained("mine", tmp_path / "runs", tmp_path / "results")


ROUTED = '"${hydra:runtime.choices.router}${if_routed:'  # of a label that a dense run has without what follows

TWICE = [  # words; who would have seed 0 twice, and with what; what is to be added, or set in a sweep of its own
    ("router=switch router.jitter=0,0.1 seed=0,1", "switch", "router.jitter=0", "arm=switch_${router.jitter}"),
    ("router=switch repeat=0,1", "switch", "repeat=0", "arm=switch_${repeat}"),
    ("router=switch num_experts=2,4 repeat=0,1", "switch", "repeat=0", "arm=switch_${num_experts}_${repeat}"),
    ("router=dense,switch num_experts=2,4", "switch", "num_experts=2", f'arm={ROUTED}_${{num_experts}}}}"'),
    ("router=dense,switch train.lr=1,2", "dense", "train.lr=1", "arm=${hydra:runtime.choices.router}_${train.lr}"),
    ("router=dense,switch arm=a", "a", "router=dense", "arm=a_${hydra:runtime.choices.router}"),
    (
        "router=switch model.sparse_layers=[0],[1]",
        "switch",
        "'model.sparse_layers=[0]'",
        "arm=switch_${model.sparse_layers.0}",
    ),
    ("router=switch model.sparse_layers=[0],[0,1]", "switch", "'model.sparse_layers=[0]'", ""),
    ("router=dense +train.epochs=1,2", "dense", "+train.epochs=1", "arm=dense_${train.epochs}"),
    (
        "sweeps=modules router=switch,base num_experts=2 train.lr=1,2",
        "switch_2",
        "train.lr=1",
        f'arm={ROUTED}_${{num_experts}}}}_${{train.lr}}"',
    ),
    ("sweeps=load_balance experiment=load_balance/0,load_balance/1 train.lr=1,2", "switch_coef_0", "train.lr=1", ""),
    ("sweeps=tune router=switch router.jitter=0,0.1", "switch_trial_0_0", "router.jitter=0", ""),
]


def planned(*words: str) -> Plan:
    compose, jobs = jobs_of(words)
    plan = Plan(compose, unprepared)
    for each in jobs:
        plan.check(each)
    assert plan.errors() == []
    return plan


@pytest.mark.parametrize(("words", "arm", "one", "added"), TWICE)
def test_a_sweep_whose_runs_no_report_can_tell_apart_says_what_would(words, arm, one, added, tiny):
    sweep = [*tiny, *words.split()]
    plan = planned(*sweep)
    with pytest.raises(ValueError, match="would have seed") as refused:
        require_apart(plan.jobs, plan.compose)
    said, seed = str(refused.value), 100 if "tune" in words else 0
    assert said.startswith(f"{arm} would have seed {seed} twice, with {one} and with ")
    remedy = f"to name an arm for each add {shlex.quote(added)}" if added else f"make a sweep of each, {one} sweep=NAME"
    assert f", and a report takes a seed of an arm once; {remedy}" in said
    assert said.endswith(remedy if added else " sweep=OTHER")
    again = planned(*sweep, added or shlex.split(one)[0])
    require_apart(again.jobs, again.compose)


def test_jobs_of_one_run_and_runs_that_others_start_from_are_no_second_cell(tiny):
    words = ["router=dense,switch", "num_experts=4", "seed=0,1", "record.log_every=1,2"]
    for more in (
        [],
        ["table_seed=0,1", "router=dense"],
        ["repeat=0,1", "arm=a_${repeat}_${hydra:runtime.choices.router}"],
    ):
        plan = planned(*tiny, *words, *more)
        require_apart(plan.jobs, plan.compose)
        assert len(cells_of(plan.jobs)) == {0: 4, 2: 2 if "router=dense" in more else 8}[len(more)]
    runs = next(word for word in tiny if word.startswith("runs=")).removeprefix("runs=")
    plan = planned(*tiny, "router=switch", f"train.init_from=null,'{runs}/switch-s0-*'")
    plan.open_data = open_data
    require_apart(plan.jobs, plan.compose)
    plan.open()
    require_apart(plan.jobs, plan.compose)
    twice = planned(*tiny, "router=switch", f"train.init_from=null,'{runs}/switch-s0-*'", "train.lr=1,2")
    with pytest.raises(ValueError, match="with train.lr=1 and with train.lr=2"):  # of those that start from the first
        require_apart(twice.jobs, twice.compose)
    epochs = planned(*tiny, "router=switch", "train.epochs=1", "train.steps=12,13")  # which epochs replace
    require_apart(epochs.jobs, epochs.compose)
    assert errors([]) == []
    ((arm, seed, run),) = cells_of(plan.jobs)
    assert (arm, seed, run) == ("switch", 0, plan.jobs[1].run.folder.name) and run != plan.jobs[0].run.folder.name


def test_it_is_refused_before_any_work_and_by_a_dry_run_too(tiny, tmp_path, run_here):
    words = ["-m", *tiny, "router=switch", "router.load_balance_coef=0.01,0.1", "seed=0,1", "data.vocab_size=302"]
    status, printed, said = run_here(*words)
    assert status == 2 and printed == "" and list(tmp_path.iterdir()) == []
    assert said.startswith("error: switch would have seed 0 twice, with router.load_balance_coef=0.01 and with ")
    assert said.endswith(" add 'arm=switch_${router.load_balance_coef}'\n") and said.count("\n") == 1
    assert run_here(*words, "dry_run=true") == (2, "", said)
    status, printed, _ = run_here(*words, *shlex.split(said.rpartition(" add ")[2]), "dry_run=true")
    assert status == 0 and {"switch_0.01", "switch_0.1"} <= set(printed.split())


@pytest.mark.parametrize("more", [(), ("dry_run=true",)])
def test_a_sweep_without_a_job_is_refused_in_a_line(more, tiny, tmp_path, run_here):
    said = "error: the sweep has no job: one of the choices that it is made of is empty\n"
    assert run_here("-m", *tiny, "router=switch", "seed=range(0,0)", *more) == (2, "", said)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing_and_names_every_invalid_job(tiny, tmp_path, run_here):
    cache = next(Path(word.partition("=")[2]) for word in tiny if word.startswith("data.cache="))
    words = ["-m", "sweeps=gate_by_routing", *tiny, "seed=0", "dry_run=true"]
    before = sorted(cache.rglob("*")) if cache.exists() else []
    status, printed, said = run_here(*words, "data.vocab_size=301")
    assert status == 0 and said == ""
    assert "not prepared" in printed and "\n5 jobs: 0 done, 5 to make" in printed and "grid" not in printed
    status, printed, _ = run_here(*words, "train.batch_size=4,5", "data.vocab_size=301")
    assert status == 2
    assert sum(line.startswith("invalid: ") and "batch_size=5" in line for line in printed.splitlines()) == 5
    status, printed, said = run_here(*words, "train.batch_size=5")
    assert (status, said) == (2, "") and printed.startswith("invalid: train.batch_size must be a multiple of ")
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert before == (sorted(cache.rglob("*")) if cache.exists() else [])


def test_time_to_come_is_by_runs_of_such_a_device(tmp_path):
    settings = read(compose_config("router=dense", "device=cpu"))
    needed = cost(settings, None)
    for device, seconds in ((device_name(torch.device("cpu")), 20.0), ("NVIDIA H200", 1.0)):
        folder = tmp_path / f"dense-s0-{seconds}"
        folder.mkdir()
        result = {"outcome": "finished", "seconds": seconds, "tokens": needed.tokens}
        (folder / "result.json").write_text(json.dumps(result | {"train_flops_per_token": needed.flops}))
        config = {"scale": settings.scale, "router": {"_target_": settings.router["_target_"]}}
        (folder / "config.yaml").write_text(json.dumps(config))
        (folder / "provenance.json").write_text(json.dumps({"device": device}))
    assert Pace(tmp_path).seconds(settings, needed) == (pytest.approx(20.0), "finished runs of the router")
    (tmp_path / "dense-s0-20.0" / "result.json").unlink()
    assert Pace(tmp_path).seconds(settings, needed)[1] == "an assumed speed"


def test_a_finished_run_without_the_weights_that_another_needs_is_left(tmp_path):
    """first is done and bare; later starts from it, and beside has nothing to do with it."""

    def planned(name: str, start: str = ""):
        settings = SimpleNamespace(train=SimpleNamespace(init_from=start and str(tmp_path / start)), router={})
        return SimpleNamespace(run=SimpleNamespace(folder=tmp_path / name), settings=settings)

    def told() -> list[str]:
        jobs = [planned("first"), planned("later", "first"), planned("beside")]
        return list(states(jobs).values())  # type: ignore[arg-type]

    for name in ("first", "beside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text('{"outcome": "finished"}')
    assert told() == ["left", "left", "done"]
    (tmp_path / "first" / "checkpoints" / "9").mkdir(parents=True)
    (tmp_path / "first" / "checkpoints" / "9" / WEIGHTS[0]).touch()
    assert told() == ["done", "left", "done"]
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    shutil.copytree(tmp_path / "beside", tmp_path / "later")
    assert told() == ["done", "done", "done"]  # nothing needs them any more


WAYS = [[], ["-m"], ["dry_run=true"], ["-m", "seed=0,1", "dry_run=true"], ["data=pystdlib", "dry_run=true"]]


def test_how_long_a_scale_for_gpus_takes_without_one_is_said_first(tiny, tmp_path, run_here):
    few = [*tiny, "train.compile=false", "train.warmup_steps=0", "train.steps=1", "device=cpu"]
    assert "without a GPU" not in run_here(*few)[1]
    line = (
        "without a GPU scale=small takes about {} on these cores (scale=smoke is for CPUs)\n"  # no run of it is there
    )
    assert run_here("scale=small", *few)[1].startswith(line.format("10 s"))
    assert "without a GPU" not in run_here("scale=small", *few)[1], "it is done"
    sweep = run_py("-m", "scale=small", "seed=1,2", *few, f"runs={tmp_path}/others", cwd=tmp_path).stdout
    assert sweep.startswith(line.format("20 s")) and "2 of 2 jobs are finished" in sweep


@pytest.mark.parametrize("way", WAYS)
def test_files_too_few_to_divide_are_refused_by_a_dry_run_too(way, tiny, tmp_path, run_here):
    words = [*way, *(tiny[2:] if "data=pystdlib" in way else tiny)]
    words += [f"data.cache={tmp_path}/cache", "data.corpus.validation_share=0"]
    status, printed, said = run_here(*words)
    lines = (printed + said).splitlines()
    assert status == 2 and len(lines) == 1 and "the validation split of the corpus is empty" in lines[0]
    assert "; raise data.corpus.validation_share (now 0.0)" in lines[0]
    assert (tmp_path / "cache").exists() == ("dry_run=true" not in way) and not (tmp_path / "runs").exists()


def test_a_dry_run_reads_the_finished_runs_once_for_all_jobs(tiny, monkeypatch):
    opened = []
    monkeypatch.setattr(dry_run, "Pace", lambda runs: opened.append(runs) or Pace(runs))
    jobs = plan_of("main", *tiny, "router=dense", "seed=0,1", data=open_data).jobs
    assert dry_run.report(jobs) == 0 and len(jobs) > 1 == len(opened)


def test_a_dry_run_prints_a_run_once_and_knows_no_time_of_epochs_before_the_text(tiny, tmp_path, capsys):
    def printed(*words: str, data=open_data) -> str:
        assert dry_run.report(plan_of("main", *tiny_here, "router=dense,switch", "seed=0", *words, data=data).jobs) == 0
        return capsys.readouterr().out

    tiny_here = [word for word in tiny if not word.startswith(("model.sparse_layers", "num_experts"))]
    rows = printed()
    assert "\n4 jobs: 0 done, 4 to make in about" in rows
    assert (
        "\nThe grid's 6 combinations come to 4 runs, as some are" in rows
    )  # dense is asked for with each of three sizes
    assert sum(line.startswith("dense ") for line in rows.splitlines()) == 1 and " MB " in rows and "0.0 GB" not in rows
    tokens = 12 * 4 * 32
    assert f" {tokens / 1e6:.1f}M " in rows
    unknown = printed("train.epochs=2", data=unprepared)
    assert unknown.count("unknown  ") >= 4 and "4 to make\n" in unknown and "to make in" not in unknown
    plan = plan_of("main", *tiny_here, "router=dense", "seed=0", "train.epochs=2", data=open_data)
    (job,) = [job for job in plan.jobs if job.settings and job.settings.arm == "dense"][:1]
    windows = job.run.splits["train"].full
    assert cost(job.settings, job.run).tokens == -(-2 * windows // 4) * 4 * 32 > tokens


def test_a_dry_run_counts_what_the_run_then_records(tiny, tmp_path, run_here):
    words = [*tiny, "router=switch", "train.steps=2", "train.warmup_steps=0"]
    assert run_here(*words)[0] == 0
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("switch-*/result.json"))
    printed = run_here(*words, "dry_run=true")[1]
    counts = f"{result['parameters/active'] / 1e6:.1f}M / {result['parameters/total'] / 1e6:.1f}M"
    assert counts in printed and f"{result['train_flops_per_token'] / 1e9:.3f}" in printed
    assert "\n1 job: 1 done, 0 to make" in printed


def test_the_overview_counts_shared_runs_once_and_tells_what_is_done(tiny):
    words = [*tiny, "seed=0"]
    plan = plan_of("quickstart", *words, data=open_data)
    folder = next(job.run.folder for job in plan.jobs if job.run and job.settings and job.settings.arm == "switch")
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"outcome": "diverged", "step": 3}')
    lines = [line.split() for line in overview(words, ["gate_by_routing", "quickstart"]).splitlines()]
    assert " ".join(lines[0]).startswith("Of scale=smoke data=text runs=")
    assert ["gate_by_routing", "5", "0", "0", "1", "4"] in [line[:6] for line in lines]
    assert ["quickstart", "5", "0", "0", "1", "4"] in [line[:6] for line in lines]
    some = overview([*words, "train.batch_size=4,5"], ["quickstart"]).splitlines()[-1]
    assert some.startswith("quickstart: 5 of the grid's 10 combinations are invalid: router=dense train.batch_size=5: ")
    # dense, hash_balanced and switch are in both
    assert ["all,", "shared", "runs", "once", "7", "0", "0", "1", "6"] in [line[:9] for line in lines]


def test_the_overview_lists_sweeps_of_ones_own_as_they_were_recorded(tiny, tmp_path):
    def record(file: str, sweep: str, scale: str, *runs: str) -> None:
        (tmp_path / "runs" / "sweeps" / f"{file}.json").write_text(
            json.dumps({"sweep": sweep, "scale": scale, "runs": runs})
        )

    shared = next(job.run.folder for job in plan_of("rates", *tiny, "seed=0", data=open_data).jobs if job.run)
    for name in (shared.name, "mine-s0-00000001"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "result.json").write_text('{"outcome": "finished", "val/ce": 5.0}')
    (tmp_path / "runs" / "sweeps").mkdir()
    record("mine", "mine", "smoke", shared.name, "mine-s0-00000001", "mine-s1-00000002")
    record("mine.smoke", "mine", "smoke", "mine-s0-00000001")  # which mine has replaced
    record("large", "large", "small", "large-s0-00000003")
    record("rates", "rates", "smoke", shared.name)
    said = overview([*tiny, "seed=0"], ["rates"])
    lines = [line.split() for line in said.splitlines()]
    assert ["mine", "3", "2", "0", "0", "1", "1", "of", "unknown", "length"] in lines
    assert ["rates", "2", "1", "0", "0", "1"] in [line[:6] for line in lines]
    assert ["all,", "shared", "runs", "once", "4", "2", "0", "0", "2"] in [line[:9] for line in lines]
    assert said.endswith("/sweeps/ lists them, whatever their text: mine.") and "large" not in said


def test_the_overview_blames_no_sweep_for_a_word_that_none_takes():
    with pytest.raises(ValueError, match="^data.folder must be a folder that is there; got /nowhere$"):
        overview(["data=wiki", "data.folder=/nowhere"], ["quickstart"])
    with pytest.raises(ValueError, match="^scale=tiny is not there; there are medium, paper, small, smoke$"):
        overview(["scale=tiny"])
    with pytest.raises(ValueError, match="^sweeps=main names one sweep, where all are counted; dry_run=true counts "):
        overview(["sweeps=main"])


FEW = [
    "train.steps=4",
    "train.warmup_steps=1",
    "wandb.mode=disabled",
    "record.checkpoint_every=0",
]


@pytest.mark.long
@pytest.mark.parametrize("sweep", [sweep for sweep in SWEEPS if sweep != "finetune"])
def test_every_sweep_runs_at_smoke_scale_with_a_few_steps(sweep, corpus, tmp_path):
    data = ["data=text", f"data.corpus.files={corpus}/*.txt", "data.corpus.validation_share=0.1"]
    data += ["data.corpus.test_share=0.1", "data.vocab_size=300"]
    data = [] if sweep == "dictionary" else data  # whose dictionaries are larger than such a text can fill
    data += [f"data.cache={tmp_path}/cache", f"seed={seeds_of(sweep)[0]}", "record.evaluate_every=4"]
    done = run_py("-m", f"sweeps={sweep}", *data, *FEW, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs, results = tmp_path / "runs", tmp_path / "results"
    printed, folder = report(sweep, runs, results), results / "smoke" / sweep
    made = {"table.md", "table.tex", "table.csv", "figure.png", "figure.pdf"}
    if sweep != "tune":
        assert "in no mean" not in printed
        made |= {"runs.csv", "explain.md"} | {f"explain_{name}.png" for name in ("frequency", "load", "map")}
        explained(sweep, runs, results)
        command = [sys.executable, "-m", "analysis.verdicts", "smoke", f"--runs={runs}", f"--results={results}"]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert said.startswith("The claims at scale smoke")
    assert made <= {path.name for path in folder.iterdir()}
