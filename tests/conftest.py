"""Shared by the tests: sites, tokens and models small enough for hand arithmetic, and settings like run.py's."""

import dataclasses
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from data.batches import Batch, make_batch
from data.randomness import generator, mix
from data.tokenizer import BEGIN, END
from models import experts
from models.experts import Experts
from models.settings import ModelSettings
from models.transformer import Transformer
from routers.routing import Router, Routing, Site
from routers.switch import Switch
from run import main  # lets Hydra find sweeps/hydra_plugins, too, before it first looks for plugins
from sweeps.composing import Composer
from training.compose import apart

ROOT = Path(__file__).resolve().parent.parent
VOCAB, LENGTH, WIDTH, EXPERTS = 40, 12, 16, 4


@pytest.fixture(autouse=True)
def two_cores():
    """Two workers of one thread each, or one of two."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def the_global_generator_is_never_touched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global generator was touched"


def make_site(**changes) -> Site:
    counts = torch.arange(VOCAB, 0, -1) ** 2
    site = {"layer": 1, "num_experts": EXPERTS, "d_model": WIDTH, "vocab_size": VOCAB, "token_counts": counts}
    site |= {"begin": BEGIN, "end": END, "routing_group": 2, "seed": 0, "sequence_length": LENGTH}
    site |= {"sparse_layers": (0, 1), "training_text": lambda: [some_batch(16, seed=9)]}
    site = Site(**site | changes)
    return site if "baseline" in changes else dataclasses.replace(site, baseline=some_baseline(site.num_experts))


@functools.cache
def some_baseline(num_experts: int) -> Transformer:
    """A trained model, as it were: with an embedding, predictions, and a learned router in each layer."""

    def make_router(layer):
        options = {"capacity_factor": None, "eval_capacity_factor": None, "load_balance_coef": 0.0}
        options |= {"z_loss_coef": 0.0, "jitter": 0.0, "gate": "hidden", "weight": "probability"}
        return Switch(make_site(layer=layer, num_experts=num_experts, baseline=None), **options)

    return shaken(make_transformer(make_router, num_experts, path="loop", sparse_layers=[0, 1])).eval()


def some_batch(rows: int = 4, length: int = LENGTH, seed: int = 0, padding: int = 0) -> Batch:
    """Random windows with document ends among them; the last row ends with some padding."""
    window = torch.randint(VOCAB, (rows, length + 1), generator=generator(seed, "window"))
    document = torch.cumsum(window == END, 1) - (window == END).long()
    real = torch.ones(rows, length, dtype=torch.bool)
    if padding:
        real[-1, -padding:] = False
    batch = make_batch(window, document, real, mix(torch.tensor(seed), torch.arange(rows)))
    return batch._replace(tokens=batch.tokens._replace(predicted=(batch.tokens.id * 3 + 1) % VOCAB))


def make_transformer(make_router=None, num_experts: int = EXPERTS, seed: int = 0, path: str = "grouped_mm", **changes):
    settings = {"num_layers": 2, "d_model": WIDTH, "d_ff": 32, "num_heads": 2, "norm": "layernorm", "dispatch": "auto"}
    settings |= {"positions": "rotary", "activation": "relu", "sparse_layers": [1], "placement": "replace"}
    kind, options = changes.pop("kind", Experts), changes.pop("options", {})
    more = {
        key: changes.pop(key) for key in ("num_shared", "mask_documents", "baseline", "source_length") if key in changes
    }
    settings = ModelSettings(**settings | changes)
    settings.check()

    def make_experts(count, d_ff):
        return kind(count, WIDTH, d_ff, settings.activation, **options)

    return Transformer(settings, VOCAB, LENGTH, num_experts, make_router, make_experts, seed, path, **more)


@functools.cache
def config_of(name: str) -> DictConfig:
    """What router=<name> composes to; not to be changed."""
    return compose_config(f"router={name}")


def model_of(name: str | None, site: dict | None = None, **changes) -> Transformer:
    """The small model around the router that conf/router/<name>.yaml describes, its experts and its placement."""
    if name is None:
        return make_transformer(**changes)
    config = config_of(name)
    options = {str(k): v for k, v in config.experts.items() if k not in ("_target_", "num_shared")}
    kind = getattr(experts, config.experts["_target_"].rpartition(".")[2])
    parts = {"kind": kind, "options": options, "num_shared": config.experts.num_shared}
    parts |= {"placement": config.model.placement, "baseline": some_baseline(changes.get("num_experts", EXPERTS))}
    routed = config.router["_target_"] is not None
    changes.setdefault("sparse_layers", [1] if len(config.model.sparse_layers) == 1 else [0, 1])
    layers = tuple(changes["sparse_layers"])
    site = {"sparse_layers": layers, "num_experts": changes.get("num_experts", EXPERTS)} | (site or {})
    make_router = (lambda layer: router_of(name, make_site(layer=layer, **site))) if routed else None
    return make_transformer(make_router, **parts | changes)


def shaken(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """With parameters of size O(1), so that routers decide and errors show."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.5, generator=generator(seed, "shaken", name))
    return module


def compose_config(*overrides: str) -> DictConfig:
    """What run.py would get from these words on the command line."""
    with warnings.catch_warnings():
        return apart(composer().config(overrides))


@functools.cache
def composer() -> Composer:
    """That of sweeps: it composes each choice of groups once."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return Composer(GlobalHydra.instance().config_loader())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of small text files, and of nothing that changes with the machine."""
    folder = tmp_path_factory.mktemp("corpus")
    draws = generator("corpus")
    words = ["".join(chr(97 + int(c)) for c in torch.randint(8, (3,), generator=draws)) for _ in range(60)]
    for number in range(40):
        picked = torch.randint(60, (160,), generator=draws) * torch.randint(2, (160,), generator=draws)
        (folder / f"{number}.txt").write_text(" ".join(words[int(i)] for i in picked))
    return folder


@pytest.fixture
def run_here(tmp_path, monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """`python run.py words` from tmp_path in this process, which need not import all anew: its status and what it
    printed on standard output and on standard error."""
    monkeypatch.chdir(tmp_path)

    def ended(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *words])
        with pytest.raises(SystemExit) as ending:
            main()
        return ending.value.code, *capfd.readouterr()

    return ended


@pytest.fixture
def tiny(corpus, tmp_path, tmp_path_factory) -> list[str]:
    """Overrides that make a run of a second on the small corpus; runs go to tmp_path/runs."""
    return tiny_words(corpus, tmp_path_factory.getbasetemp() / "cache", tmp_path / "runs")


@pytest.fixture(scope="session")
def arm(corpus, tmp_path_factory) -> Callable[[str], list[str]]:
    """The words that choose a router, to stand after tiny's; what it needs of trained runs is made once."""
    from training.job import run

    runs = tmp_path_factory.mktemp("baselines")
    words = tiny_words(corpus, tmp_path_factory.getbasetemp() / "cache", runs)

    def choose(name: str) -> list[str]:
        config = config_of(name)
        chosen = [f"router={name}"]
        if len(config.model.sparse_layers) > 1:
            chosen.append("model.sparse_layers=[0,1]")
        baseline = config.router.get("baseline")
        if baseline:
            trained = Path(baseline).name.split("-")[0]
            run(compose_config(*words, f"router={trained}"))
            chosen.append(f"router.baseline={runs}/{trained}-s0-*")
        return chosen

    return choose


def tiny_words(corpus: Path, cache: Path, runs: Path) -> list[str]:
    return [
        "data=text",
        f"data.corpus.files={corpus}/*.txt",
        "data.corpus.validation_share=0.1",
        "data.corpus.test_share=0.1",
        f"data.cache={cache}",
        "data.vocab_size=300",
        "data.sequence_length=32",
        "model.num_layers=2",
        "model.d_model=32",
        "model.d_ff=64",
        "model.num_heads=2",
        "model.sparse_layers=[1]",
        "num_experts=4",
        "train.steps=12",
        "train.batch_size=4",
        "train.routing_group=2",
        "train.warmup_steps=2",
        "record.log_every=1",
        "record.evaluate_every=6",
        "record.checkpoint_every=0",
        "wandb.mode=disabled",
        f"runs={runs}",
    ]


@pytest.fixture(scope="session")
def small_study(corpus, tmp_path_factory) -> Path:
    """The run folders of a sweep quickstart of three arms and two seeds, as run.py's code makes them."""
    from training.job import run

    runs = tmp_path_factory.mktemp("small_study")
    words = tiny_words(corpus, tmp_path_factory.getbasetemp() / "cache", runs)
    words += ["train.steps=6", "record.evaluate_every=2", "record.keep_weights=false"]
    for arm in ("dense", "hash_balanced", "switch"):
        for seed in (0, 1):
            assert run(compose_config(*words, f"router={arm}", f"seed={seed}")) == 0
    names = sorted(path.parent.name for path in runs.glob("*/result.json"))
    record = {"sweep": "quickstart", "scale": "smoke", "command": ["python", "run.py"], "runs": names}
    (runs / "sweeps").mkdir()
    (runs / "sweeps" / "quickstart.json").write_text(json.dumps(record))
    return runs


def router_of(name: str, site: Site) -> Router:
    """The router that conf/router/<name>.yaml describes."""
    from training.targets import target

    node = {str(k): v for k, v in config_of(name).router.items() if k != "baseline"}
    found, options = target(node, skip=1)
    return found(site, **options)


def check(routing: Routing, num_tokens: int, num_experts: int) -> None:
    """Assert the invariants of a routing over T tokens."""
    token, expert, weight = routing.token, routing.expert, routing.weight
    assert token.shape == expert.shape == weight.shape and token.dim() == 1
    assert token.dtype == expert.dtype == torch.int64
    assert weight.dtype in (torch.float32, torch.float64) and routing.aux_loss.dtype in (torch.float32, torch.float64)
    assert bool(((token >= 0) & (token < num_tokens)).all()) and bool(((expert >= 0) & (expert < num_experts)).all())
    assert bool((weight >= 0).all()) and bool(torch.isfinite(weight).all()) and routing.aux_loss.dim() == 0
    if routing.fan_out is not None:
        expected = torch.arange(num_tokens, device=token.device).repeat_interleave(routing.fan_out)
        assert torch.equal(token, expected), "fan_out promises each token fan_out times in a row"


ROUTERS = sorted(p.stem for p in (ROOT / "conf" / "router").glob("*.yaml") if "_target_: null" not in p.read_text())

# Yamls that run the code of another one with other values: the slow tests of them are in the long form.
LIKE_ANOTHER = ["hash_random", "hash_modulo", "hash_clustered_balanced", "hash_dispersed", "hash_dispersed_unbalanced"]
LIKE_ANOTHER += ["hash_position", "hash_previous", "hash_previous_balanced", "hash_bigram_balanced", "hash_bigram_mod"]
LIKE_ANOTHER += ["hash_switch_gate", "top_k_sigmoid", "loss_free_top_k", "switch_straight_through", "dense_wider"]


def one_of_a_kind(names: list) -> list:
    """Parameters for a slow test: those like another are marked long."""
    return [pytest.param(name, marks=pytest.mark.long) if name in LIKE_ANOTHER else name for name in names]
