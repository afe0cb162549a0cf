import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, compose_config

from training.identity import digest_of
from training.job import open_run
from training.preflight import read


def run_py(*words: str, limit: int | None = None, cwd=None) -> subprocess.CompletedProcess:
    """python run.py words in a process of its own; limit: no file may grow over so many bytes, as on a full disk."""
    import resource

    def shrink():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, str(ROOT / "run.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, preexec_fn=shrink if limit else None
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> str:
    """A folder with two runs that look finished, of a dense and of a learned router."""
    folder = tmp_path_factory.mktemp("runs")
    for run in ("dense-s0-01234567", "switch-s0-01234567"):
        (folder / run / "checkpoints" / "1").mkdir(parents=True)
        (folder / run / "checkpoints" / "1" / "model.safetensors").touch()
        (folder / run / "result.json").touch()
        (folder / run / "config.yaml").write_text("{}")
    return f"runs={folder}"


ARMS = sorted(path.stem for path in (ROOT / "conf" / "router").glob("*.yaml"))


LARGE = ("medium", "paper")
NUM_EXPERTS = {"smoke": 16, "small": 64, **dict.fromkeys(LARGE, 64)}


@pytest.mark.parametrize("scale", ["smoke", "small", *(pytest.param(x, marks=pytest.mark.long) for x in LARGE)])
@pytest.mark.parametrize("router", ARMS)
def test_every_router_composes_at_every_scale(router, scale, runs):
    experts, layers = NUM_EXPERTS[scale], list(compose_config(f"scale={scale}").model.sparse_layers)
    learned = {"router": {"_target_": "a.Router"}, "num_experts": experts, "model": {"sparse_layers": layers}}
    (Path(runs.removeprefix("runs=")) / "switch-s0-01234567" / "config.yaml").write_text(json.dumps(learned))
    settings = read(compose_config(f"router={router}", f"scale={scale}", runs))
    assert (settings.arm, settings.scale) == (router, scale)
    assert settings.num_experts == NUM_EXPERTS[scale]


BAD = [
    ("train.lr=abc", "train.lr: Value 'abc' of type 'str' could not be converted to Float"),
    ("train.steps=1.5", "train.steps"),
    ("num_experts=0", "num_experts must be at least 1"),
    ("model.num_heads=3", "model.d_model must be divisible by model.num_heads"),
    ("model.sparse_layers=[7]", "model.sparse_layers must be different layers in 0..1"),
    ("train.batch_size=5", "multiple"),
    ("train.micro_batch=3", "multiple"),
    ("train.schedule=step", "train.schedule must be one of cosine, linear; got step"),
    ("train.beta2=1.5", "train.beta2"),
    ("train.lr=nan", "train.lr"),
    ("seed=-1", "seed must be at least 0; got -1"),
    ("device=tpu", "device must be one of auto, cpu, cuda; got tpu"),
    ("router._target_=os.system", "router._target_ must be a class of routers, models, data"),
    ("data.corpus._target_=torch.load", "data.corpus._target_"),
    ("experts._target_=models.dispatch.grouped", "must name a class"),
    ("router._target_=routers.none.None", "does not exist"),
    (
        "router.load_balance_coef=much",
        "router.load_balance_coef: Value 'much' of type 'str' could not be converted to Float",
    ),
    ("~router.jitter", "needs the option jitter"),
    ("router._target_=routers.routing.Site", "routers.routing.Site"),
    ("model.encoder_layers=-1", "model.encoder_layers must be at least 0; got -1"),
    ("model.sparse_in=encoder", "model.sparse_in=encoder needs model.encoder_layers of at least 1; got 0"),
    ("model.sparse_in=both", "model.sparse_in must be one of decoder, encoder; got both"),
    ("model.num_positions=64", "model.num_positions must be at least 1 with model.positions=learned, and null"),
    ("data.source_length=16", "data.source_length must be null for a decoder-only model"),
    ("router.capacity_factor=-1", "router.capacity_factor must be above 0"),
    ("+data.folder=/nowhere", "data.folder must be a folder that is there; got /nowhere"),
    (
        "model.dispatch=fused device=cpu",
        "model.dispatch=fused needs bf16 on a Hopper GPU, and Triton; got torch.float32",
    ),
    ("data.packing=tight", "data.packing must be one of stream, documents; got tight"),
    ("data.vocab_size=20", "data.vocab_size must be at least 258, for 256 bytes and 2 special ids; got 20"),
    ("tokenizer.file=/nowhere", "tokenizer.file=/nowhere: /nowhere is no dictionary that can be read"),
    ("+tokenizer.min_count=2", "data.tokenizer.BytePairs has no option min_count"),
    ("tokenizer._target_=data.markov.Markov", "needs the option"),
]


@pytest.mark.parametrize(("word", "message"), BAD)
def test_bad_settings_end_with_one_line_that_names_the_rule(word, message, tiny):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read(compose_config("router=switch", *tiny, *word.split()))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


MISSING = {"data=wiki": "data.folder", "data=text": "data.corpus.files", "data=mixture": "data.corpus.weights"}


@pytest.mark.parametrize(("word", "key"), MISSING.items())
def test_what_must_be_given_is_named(word, key):
    with pytest.raises(ValueError, match=f"^{key} has no default and must be given: {key}=...$"):
        read(compose_config(word))


FATAL = [
    (["train.lrr=1"], "there is no setting train.lrr; did you mean train.lr?"),
    (["train.rate=1"], "there is no setting train.rate; there are steps, "),
    (["trian.lr=1"], "there is no setting trian; did you mean trial or train?"),
    (["+trian.lr=1"], "there is no setting trian; did you mean trial or train?"),
    (["++train.lrr=1"], "there is no setting train.lrr; did you mean train.lr?"),
    (["arm=a/b"], "arm must be a name without /, which begins with no dot; got a/b"),
    (["sweep=../x"], "sweep must be a name without /, which begins with no dot; got ../x"),
    (["router=dense,"], "router=dense, cannot be read as key=value, nor with -m as key=a,b"),
    (["router="], "router= is not there; there are base, "),
    (["router=dense", "router.shift=1"], "there is no setting router.shift; router, as chosen here, has none"),
    (["+train.rate=1"], "there is no setting train.rate; there are steps, "),
    (["router=swich"], "router=swich is not there; did you mean router=switch?"),
    (["wandbb=offline"], "did you mean wandb?"),
    (["-m", "sweeps=nothing"], "sweeps=nothing is not there; there are base_comparison, "),
    (["scale=huge"], "scale=huge is not there; there are medium, paper, small, smoke"),
    (["scale=smal"], "scale=smal is not there; did you mean scale=small?"),
    (["sweeps=main"], "needs -m: python run.py -m sweeps=main"),
    (
        ["-m", "router=dense,switch", "train.lr=abc"],
        "error: train.lr: Value 'abc' of type 'str' could not be converted",
    ),
    (["-m", "router=dense,switch", "train.lr=abc"], "to Float\n"),
    (
        ["-m", "router=dense", "train.lr=1,abc,abd"],
        "Float (and 1 more of the grid's 3 combinations; dry_run=true names all)\n",
    ),
    (["-m", "router=dense,swich"], "error: router=swich is not there; did you mean router=switch?\n"),
    (["data.corpus.files=/nowhere/*.txt"], "/nowhere/*.txt"),
    (["data.sequence_length=100000"], "fewer than one window"),
    (["runs=/dev/null/runs"], "cannot write"),
    (["tuned=/none.csv"], "error: tuned=/none.csv is no ledger that can be read: No such file or directory\n"),
]


@pytest.mark.parametrize(("words", "names"), FATAL)
def test_run_py_ends_in_one_line_before_any_work(words, names, tiny, tmp_path, run_here):
    flags, words = [w for w in words if w == "-m"], [w for w in words if w != "-m"]
    status, printed, said = run_here(*flags, *tiny, *words)
    assert status == 2 and "started" not in printed
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert names in said
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))


SIZES = [  # which neither the router alone nor the model alone can refuse
    ("router=hash_multi router.num_hashes=5", "experts.segments (one to each table) must be at least 1 and"),
    ("router=top_k_softmax router.k=3", "model.d_ff must split into 3 experts of a width that is a multiple of 8"),
    ("router=switch experts.num_shared=4", "model.d_ff must split into 5 experts of a width that is a multiple of 8"),
    ("router=switch experts=segmented +router.num_hashes=2", "switch.Switch has no option num_hashes"),
    ("router=hash_multi experts=independent", "experts.segments must be as many as the router asks for"),
    ("router=dense_inserted experts.sublayers=0", "experts.sublayers must be at least 1; got 0"),
]


@pytest.mark.parametrize("way", [[], ["-m"], ["dry_run=true"], ["-m", "dry_run=true"]])
@pytest.mark.parametrize(("words", "rule"), SIZES)
def test_sizes_that_do_not_fit_the_router_are_refused_before_any_work(words, rule, way, tiny, tmp_path, run_here):
    status, printed, said = run_here(*way, *tiny, *words.split())
    lines = (printed + said).splitlines()
    assert status == 2 and len(lines) == 1 and rule in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_ends_in_one_line(tiny, tmp_path):
    open_run(read(compose_config(*tiny)))  # the cache is ready
    done = run_py(*tiny, cwd=tmp_path, limit=100_000)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "cannot write to the run folder" in done.stderr


def test_the_id_is_of_what_can_change_the_result(tiny):
    def digest(*words, fingerprint="text"):
        return digest_of(read(compose_config("router=switch", *tiny, *words)), fingerprint)

    same = ["wandb.mode=offline", "runs=elsewhere", "device=cpu", "record.log_every=7", "data.cache=other"]
    assert {digest(word) for word in same} == {digest()}
    other = [
        "seed=1",
        "num_experts=8",
        "router.jitter=0.1",
        "train.lr=1e-4",
        "model.d_ff=128",
        "data.mask_documents=true",
    ]
    assert len({digest(word) for word in [*other, "data.sequence_length=16"]} | {digest()}) == len(other) + 2
    assert digest(fingerprint="other text") != digest()


def test_every_scale_is_tested():
    assert {path.stem for path in (ROOT / "conf" / "scale").glob("*.yaml")} == NUM_EXPERTS.keys()


def test_of_several_baselines_the_one_of_this_text_is_meant(tmp_path):
    texts = {"0": ["data=markov"], "1": ["data=markov", "tokenizer=bytes"], "2": ["data=markov", "data.corpus.seed=7"]}
    for name, words in texts.items():
        weights = tmp_path / f"dense-s0-{name}" / "checkpoints" / "1" / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        (tmp_path / f"dense-s0-{name}" / "result.json").touch()
        settings = asdict(read(compose_config(*words, f"runs={tmp_path}")))
        (tmp_path / f"dense-s0-{name}" / "config.yaml").write_text(yaml.safe_dump(settings))
    for name, words in texts.items():
        settings = read(compose_config(*words, "router=hash_clustered", f"runs={tmp_path}"))
        assert settings.router["baseline"] == f"{tmp_path}/dense-s0-{name}"
    with pytest.raises(ValueError, match="it fits several: name one; found dense-s0-0, dense-s0-1, dense-s0-2"):
        read(compose_config("data=markov", "data.corpus.seed=8", "router=hash_clustered", f"runs={tmp_path}"))


def test_a_baseline_is_named_by_a_glob_that_fits_one_run(runs, tmp_path):
    folder = runs.removeprefix("runs=")
    settings = read(compose_config("router=hash_clustered", runs))
    assert settings.router["baseline"] == f"{folder}/dense-s0-01234567"
    for pattern, found in ((f"{tmp_path}/none", "found none"), (f"{folder}/*", "found dense-s0.*, switch-s0")):
        with pytest.raises(ValueError, match=f"router.baseline=.* must name one finished run .*{found}"):
            read(compose_config("router=hash_clustered", f"router.baseline={pattern}"))
    moved = compose_config("router=hash_clustered", runs)
    one, other = read(moved), read(moved)
    other.router["baseline"] = "/elsewhere/dense-s0-01234567"
    assert digest_of(one, "text") == digest_of(other, "text")
    other.router["baseline"] = "/elsewhere/dense-s0-76543210"
    assert digest_of(one, "text") != digest_of(other, "text")
