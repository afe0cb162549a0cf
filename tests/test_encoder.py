"""The encoder-decoder: what each side reads, what neither may see, and that all else holds for it as for a decoder."""

import functools
import itertools
import json
from contextlib import nullcontext

import pytest
import torch
from conftest import (
    EXPERTS,
    LENGTH,
    ROUTERS,
    VOCAB,
    compose_config,
    config_of,
    make_site,
    make_transformer,
    model_of,
    one_of_a_kind,
    router_of,
    shaken,
    some_batch,
    tiny_words,
)
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.batches import Batch, make_batch
from data.prepare import Prepared
from data.randomness import generator
from data.source import divided
from data.tokenizer import BEGIN, END
from models.experts import Experts
from training import job
from training.build import make_losses, make_model
from training.checkpoint import load_run
from training.evaluation import evaluate
from training.job import FINISHED, INTERRUPTED, open_run, run
from training.loop import Progress, Trainer, TrainingBatches
from training.optimizer import make_optimizer
from training.preflight import read
from training.sample import sample

CPU = torch.device("cpu")
READS = {"plain text": 5, "dialogue": None}  # source_length


BOTH_SIDES = list(itertools.product(READS, ("decoder", "encoder")))


def by_halves(*first: tuple) -> list:
    """Kinds and sides: these two, which have each kind and each side once, and the other two in the long form."""
    return [pair if pair in first else pytest.param(*pair, marks=pytest.mark.long) for pair in BOTH_SIDES]


ACROSS = ("plain text", "encoder"), ("dialogue", "decoder")
ALONG = ("plain text", "decoder"), ("dialogue", "encoder")


def row(*documents: str, length: int = LENGTH) -> tuple[list[int], list[int], list[bool], list[bool]]:
    """Documents of c (context) and r (response) tokens, each with END, which counts; then padding."""
    ids, numbers, counted, real = [], [], [], []
    fresh = itertools.count(2)
    for number, document in enumerate(documents):
        ids += [next(fresh) for _ in document] + [END]
        numbers += [number] * (len(document) + 1)
        counted += [False if place == 0 else kind == "r" for place, kind in enumerate(document)] + [True]
    real = [True] * len(ids)
    short = length + 1 - len(ids)
    return ids + [END] * short, numbers + [len(documents)] * short, counted + [False] * short, real + [False] * short


def batch_of(*rows) -> Batch:
    ids, numbers, counted, real = (torch.tensor(column) for column in zip(*rows))
    return make_batch(ids, numbers, real[:, 1:], torch.arange(len(rows)), counted[:, 1:])


def random_batch(seed: object, rows: int = 4, length: int = LENGTH) -> Batch:
    """Documents of random parts that count or not, some starting before the window; padding at some rows' ends."""
    draws = generator("source", seed)
    window = torch.randint(2, VOCAB, (rows, length + 1), generator=draws)
    ends = torch.rand(rows, length + 1, generator=draws) < 0.2
    window[ends] = END
    document = torch.cumsum(ends, 1) - ends.long()
    flips = torch.rand(rows, length + 1, generator=draws) < 0.3
    counted = (flips.cumsum(1) + torch.randint(2, (rows, 1), generator=draws)) % 2 == 0
    real = torch.arange(length) < torch.tensor([length, length, length - 3, 1])[:rows, None]
    return make_batch(window, document, real, torch.arange(rows), counted[:, 1:])


def both(kind: str, **changes):
    """A model of two encoder and two decoder layers whose parameters show every error."""
    return shaken(make_transformer(encoder_layers=2, source_length=READS[kind], **changes))


trained = functools.cache(both)  # a baseline, which nothing changes


def run_model(model, batch: Batch):
    batch, plans = model.prepare(batch)
    return batch, model(batch.tokens, plans, batch.document, batch.source)


def test_the_first_tokens_of_plain_text_are_the_encoders():
    batch = batch_of(row("c" * 12))
    read = divided(batch, 5)
    assert read.source.tokens.id.tolist() == [[2, 3, 4, 5, 6]]
    assert read.source.tokens.next.tolist() == [[3, 4, 5, 6, END]]
    assert read.tokens.id.tolist() == [[7, 8, 9, 10, 11, 12, 13]]
    assert read.target.tolist() == [[8, 9, 10, 11, 12, 13, END]]
    assert read.tokens.previous.tolist() == [[6, 7, 8, 9, 10, 11, 12]]
    assert read.tokens.position.tolist() == [list(range(7))]


def test_a_dialogues_context_is_the_encoders_and_its_response_begins_with_the_begin_id():
    #                    2 3 4 5 6 END     7 8 9 END  padding
    batch = batch_of(row("cccrr", "ccr"))
    read = divided(batch, None)
    e, b = END, BEGIN
    assert batch.tokens.id.tolist() == [[2, 3, 4, 5, 6, e, 7, 8, 9, e, e, e]]
    assert read.source.tokens.real.tolist() == [[True] * 3 + [False] * 3 + [True] * 2 + [False] * 4]
    assert read.source.tokens.id.tolist() == [[2, 3, 4, e, e, e, 7, 8, e, e, e, e]]
    assert read.source.tokens.next.tolist() == [[3, 4, e, e, e, e, 8, e, e, e, e, e]]
    assert read.source.tokens.previous.tolist() == [[b, 2, 3, b, b, b, b, 7, b, b, b, b]]
    assert read.tokens.id.tolist() == [[e, e, b, 5, 6, e, e, b, 9, e, e, e]]
    assert read.tokens.previous.tolist() == [[b, b, b, b, 5, 6, b, b, b, b, b, b]]
    assert read.target[read.counted].tolist() == [5, 6, e, 9, e]
    assert read.tokens.real[read.counted].all()


@pytest.mark.parametrize("kind", READS)
def test_no_target_is_ever_visible_to_the_encoder(kind):
    """Whatever the counted targets are, the source is the same, and so is what the decoder reads up to each."""
    for seed in range(200):
        batch = random_batch(seed)
        read = divided(batch, READS[kind])
        assert not bool((read.counted & ~read.tokens.real).any())
        offset = batch.target.shape[1] - read.target.shape[1]
        targets = torch.zeros(len(batch.target), LENGTH + 1, dtype=torch.bool)
        targets[:, 1 + offset :] = read.counted
        window = torch.cat([batch.tokens.id, batch.target[:, -1:]], 1)
        other = torch.where(targets & (window != END), (window + 7) % (VOCAB - 2) + 2, window)
        document = torch.cumsum(window == END, 1) - (window == END).long()
        changed = divided(make_batch(other, document, batch.tokens.real, batch.tokens.key, batch.counted), READS[kind])
        for one, same in zip(read.source.tokens[:6], changed.source.tokens[:6]):
            assert torch.equal(one, same)
        first = read.counted & (read.counted.long().cumsum(1) == 1)
        assert torch.equal(read.tokens.id[first], changed.tokens.id[first])


@pytest.mark.parametrize(
    ("masked", "kind", "side"),
    [pytest.param(m, *each, marks=[pytest.mark.long] * ((each in ACROSS) != m)) for m in (0, 1) for each in BOTH_SIDES],
)
def test_changing_a_target_and_what_follows_moves_no_earlier_logit(masked, kind, side):

    def hash_router(layer):
        return router_of("hash_balanced", make_site(layer=layer))

    model = both(kind, make_router=hash_router, mask_documents=bool(masked), sparse_layers=[0, 1], sparse_in=side)
    checked = 0
    for seed in range(3):
        batch = random_batch(seed)
        window = torch.cat([batch.tokens.id, batch.target[:, -1:]], 1)
        document = torch.cumsum(window == END, 1) - (window == END).long()
        read, before = run_model(model, batch)
        offset = LENGTH - read.target.shape[1]
        for place in range(read.target.shape[1]):
            rows = read.counted[:, place]
            other = window.clone()
            later = other[:, place + offset + 1 :]
            later[later != END] = (later[later != END] + 5) % (VOCAB - 2) + 2
            changed = make_batch(other, document, batch.tokens.real, batch.tokens.key, batch.counted)
            logits = run_model(model, changed)[1].logits
            seen = read.tokens.real[:, : place + 1] & rows[:, None]
            assert torch.allclose(before.logits[:, : place + 1][seen], logits[:, : place + 1][seen], atol=1e-4)
            checked += int(seen.sum())
    assert checked > 40


def test_the_decoder_reads_its_own_documents_context_and_no_other():
    model = both("dialogue")
    batch = batch_of(row("cccrr", "ccr"), row("cccrr", "ccr"))
    read = model.divide(batch)
    before = model(read.tokens, None, read.document, read.source).logits.detach()
    for place, moved, still in ((1, slice(2, 6), slice(7, 10)), (6, slice(7, 10), slice(2, 6))):
        ids = read.source.tokens.id.clone()
        ids[:, place] = 30
        source = read.source._replace(tokens=read.source.tokens._replace(id=ids))
        after = model(read.tokens, None, read.document, source).logits.detach()
        assert float((after - before)[:, moved].abs().amin((0, 1)).max()) > 1e-3
        torch.testing.assert_close(after[:, still], before[:, still])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("name", ["switch", None])
def test_without_an_encoder_it_is_the_decoder_alone_to_the_bit(name, positions):
    model, batch = shaken(model_of(name, positions=positions, encoder_layers=0)), random_batch(0)
    x = model.embedding[batch.tokens.id]
    if positions == "learned":
        x = x + model.positions[:LENGTH]
    for block in model.blocks:  # a plain decoder's layer
        x = x + block.attention(block.attention_norm(x), model.rotation, None)
        x = x + block.ffn(block.ffn_norm(x), batch.tokens, None)[0]
    assert torch.equal(run_model(model, batch)[1].logits, model.norm(x) @ model.embedding.T)
    assert not [key for key in model.state_dict() if "encoder" in key or "cross" in key]


@pytest.mark.parametrize("kind", READS)
def test_padding_of_the_source_moves_nothing(kind):
    model = both(kind)
    read = model.divide(random_batch(3))
    padded = read.source.tokens.real.clone()
    padded[:, -2:] = False
    tokens = read.source.tokens._replace(real=padded)
    other = tokens._replace(id=torch.where(padded, tokens.id, 9))
    seen = [model(read.tokens, None, read.document, read.source._replace(tokens=t)).logits for t in (tokens, other)]
    assert torch.equal(*seen)


def test_the_places_of_the_context_move_nothing_in_the_decoder():
    model, read = both("dialogue"), both("dialogue").divide(random_batch(3))
    real = read.tokens.real
    other = read.tokens._replace(id=torch.where(real, read.tokens.id, 9))
    seen = [model(t, None, read.document, read.source).logits[real] for t in (read.tokens, other)]
    assert torch.equal(*seen)


def test_shapes_depend_on_the_window_alone():
    for kind, shapes in (("plain text", (7, 5)), ("dialogue", (12, 12))):
        for seed in range(5):
            read = divided(random_batch(seed), READS[kind])
            assert (read.tokens.id.shape[1], read.source.tokens.id.shape[1]) == shapes


def test_without_an_encoder_the_first_values_and_the_batch_are_the_same():
    batch = random_batch(0)
    plain, encoded = make_transformer(), make_transformer(encoder_layers=2, source_length=5)
    assert plain.prepare(batch)[0] is batch
    names = dict(plain.named_parameters())
    shared = {name: value for name, value in encoded.named_parameters() if name in names}
    assert shared.keys() == names.keys()
    for name, value in shared.items():
        scale = (3 / 2) ** 0.5 if name.endswith(("attention.out", "w_out")) else 1  # three branches a layer, not two
        torch.testing.assert_close(value * scale, names[name], msg=name)


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_first_values_are_the_same_with_every_router(side):
    models = [
        model_of(name, encoder_layers=2, source_length=5, sparse_in=side) for name in (None, "switch", "hash_balanced")
    ]
    dense, *others = (dict(model.named_parameters()) for model in models)
    for state in others:
        for name, value in dense.items():
            assert torch.equal(state[name][:1] if ".ffn." in name else state[name], value), name


@pytest.mark.parametrize("changes", [{}, {"biases": True, "positions": "learned", "activation": "swiglu"}])
@pytest.mark.parametrize(("kind", "side"), by_halves(*ALONG))
@pytest.mark.parametrize("name", [None, "switch", "hash_multi", "base_inserted"])
def test_counts_agree_with_numel_and_the_flop_counter(name, kind, side, changes):
    changes = changes | {"encoder_layers": 2, "source_length": READS[kind], "sparse_in": side}
    if changes.get("biases"):
        options = {
            key: v for key, v in config_of(name or "dense").experts.items() if key not in ("_target_", "num_shared")
        }
        changes["options"] = options | {"biases": True}
    model = model_of(name, path="loop", **changes)
    counts = model.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    expert = 0 if name is None else sum(p.numel() for p in model.sparse[1].experts.parameters()) // EXPERTS
    assert counts["total"] - counts["active"] == (EXPERTS - 1) * expert
    batch = random_batch(0)
    read, plans = model.prepare(batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(read.tokens, plans, read.document, read.source)
        (output.logits.square().mean() + output.aux_loss).backward()
    whole, rest = divmod(counter.get_total_flops(), len(batch.target) * LENGTH)
    assert model.train_flops_per_token() == whole
    assert rest < len(batch.target) * LENGTH


@pytest.mark.parametrize("name", ["switch", "hash_multi", "base_inserted", None])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_biases_of_experts_are_added_by_both_paths_and_by_the_plain_ffn(name, activation):
    options = {key: v for key, v in config_of(name or "dense").experts.items() if key not in ("_target_", "num_shared")}
    changes = {"biases": True, "activation": activation, "options": options | {"biases": True}}
    models = [shaken(model_of(name, path=path, **changes)) for path in ("grouped_mm", "loop")]
    without = shaken(model_of(name, path="loop", activation=activation))
    batch = random_batch(0)
    one, other = (model(batch.tokens, model.prepare(batch)[1]).logits for model in models)
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert without.parameter_counts()["total"] < models[0].parameter_counts()["total"]
    for logits in (one, other):
        logits.square().sum().backward()
    for (key, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if ".router." not in key:
            assert p.grad is not None and float(p.grad.abs().max()) > 0, key
            torch.testing.assert_close(p.grad, q.grad, atol=1.0, rtol=1e-2, msg=key)


def test_one_biased_expert_equals_the_plain_biased_ffn():
    def hash_router(layer):
        return router_of("hash_balanced", make_site(layer=layer, num_experts=1))

    more = {"biases": True, "options": {"biases": True}, "kind": Experts}
    sparse = shaken(make_transformer(hash_router, num_experts=1, **more))
    plain = shaken(make_transformer(biases=True))
    batch = some_batch()
    torch.testing.assert_close(sparse(batch.tokens).logits, plain(batch.tokens).logits, atol=1e-4, rtol=1e-4)


ENCODED = ["model.encoder_layers=1"]
SIDES = {"decoder": [], "encoder": ["model.sparse_in=encoder", "model.sparse_layers=[0]", "data.source_length=12"]}
IN_ENCODER = ("hash_balanced", "switch", "base", "hash_next_token", "expert_choice", "hash_multi", "base_inserted")
EVERY_ARM = [(name, "decoder") for name in [*ROUTERS, "dense"]] + [(name, "encoder") for name in IN_ENCODER]


def enc_arm(name: str, side: str, tiny: list[str], baselines) -> list[str]:
    """The words of an encoder-decoder run of this arm."""
    words = [*tiny, f"router={name}", *ENCODED, *SIDES[side], "train.steps=3", "record.evaluate_every=3"]
    if len(config_of(name).model.sparse_layers) > 1:
        words.append("model.sparse_layers=[0,1]")
    if baseline := config_of(name).router.get("baseline"):
        words.append(f"router.baseline={baselines(baseline.rpartition('/')[2].partition('-')[0])}")
    return words


@pytest.fixture(scope="module")
def baselines(corpus, tmp_path_factory):
    """Trained encoder-decoders, of the routers that some need."""
    folder = tmp_path_factory.mktemp("encoded")
    words = tiny_words(corpus, tmp_path_factory.getbasetemp() / "cache", folder)

    def made(name: str) -> str:
        assert run(compose_config(*words, f"router={name}", *ENCODED, "train.steps=3")) == FINISHED
        return f"{folder}/{name}-s0-*"

    return made


@pytest.mark.parametrize(("kind", "side"), by_halves(*ACROSS))
@pytest.mark.parametrize("name", one_of_a_kind(ROUTERS))
def test_every_router_makes_a_step_on_either_side(name, kind, side):
    """Its load is the side's real tokens, in the loss are the counted targets, and every gradient is finite."""
    if side == "encoder" and name == "hash_predicted":  # refused: see below
        return
    model = model_of(name, encoder_layers=2, source_length=READS[kind], sparse_in=side, baseline=trained(kind))
    read, plans = model.prepare(random_batch(0))
    output = model(read.tokens, plans, read.document, read.source)
    real = read.routed(side == "encoder").real.flatten()
    for layer, routing in output.routings.items():
        assert len(routing.token) and bool((routing.weight[~real[routing.token]] == 0).all())
        assert int(routing.token.max()) < len(real), layer
    assert output.logits.shape[:2] == read.target.shape
    (output.logits[read.counted].square().mean() + output.aux_loss).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    assert model.encoder.blocks[0].attention.qkv.grad is not None


WHOLE_RUNS = (
    "hash_predicted",
    "hash_distilled",
    "hash_balanced",
)  # two that read a trained run, and one; the others are long


@pytest.mark.parametrize(
    "name",
    [n if n in WHOLE_RUNS else pytest.param(n, marks=pytest.mark.long) for n in sorted({n for n, _ in EVERY_ARM})],
)
def test_every_router_trains_and_is_evaluated_in_an_encoder_decoder(name, tiny, baselines):
    sides = [side for arm, side in EVERY_ARM if arm == name]
    for side in sides:
        words = enc_arm(name, side, tiny, baselines)
        assert run(compose_config(*words)) == FINISHED
        opened = open_run(read(compose_config(*words)))
        result = json.loads((opened.folder / "result.json").read_text())
        layer, places = (0, 12) if side == "encoder" else (1, 16)
        windows = -(-(opened.prepared.splits["test"]["tokens"] - 1) // 32)
        assert 0 < result["test/tokens"] <= (32 - places) * windows  # the encoder's part has no targets
        evaluation = load_file(opened.folder / "evaluation.safetensors")
        if name == "hash_balanced":
            load, served = int(evaluation[f"test/load/{layer}"].sum()), evaluation[f"test/token_expert/{layer}"]
            assert load == result["test/tokens"] if side == "decoder" else load > (windows - 1) * places
            assert int((served > 0).sum(1).max()) == 1  # a token goes to one expert: the ids are this side's


def test_a_loaded_encoder_decoder_gives_its_figures_and_samples(tiny):
    words = [*tiny, "router=hash_balanced", *ENCODED, "train.steps=3"]
    assert run(compose_config(*words)) == FINISHED
    opened = open_run(read(compose_config(*words)))
    loaded = load_run(opened.folder)
    losses = make_losses(loaded.settings, loaded.model, CPU)
    sums = evaluate(loaded.model, losses, opened.splits["test"], 4, loaded.prepared.token_counts)
    assert float(sums["ce_sum"] / sums["tokens"]) == pytest.approx(loaded.result["test/ce"], rel=1e-6)
    loaded.model.eval()
    for prompt in ("a", "abc def " * 20):
        text = sample(loaded, prompt, 5, 0.8, seed=0)
        assert text.startswith(prompt)
        assert text == sample(loaded, prompt, 5, 0.8, seed=0)


@pytest.fixture
def talk(talking, tiny) -> list[str]:
    """Words of a run on these dialogues."""
    kept = [word for word in tiny if not word.startswith("data")]
    cache = next(word for word in tiny if word.startswith("data.cache"))
    data = ["data=dialogue", f"data.corpus.files={talking}/*.jsonl", cache, "data.vocab_size=270"]
    return [*data, *kept, "data.sequence_length=32", "data.corpus.validation_share=0.15", "data.corpus.test_share=0.15"]


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """Made-up dialogues, some longer than a window."""
    folder, draws = tmp_path_factory.mktemp("talk"), generator("talk")
    pick = lambda count: " ".join(f"w{int(i)}" for i in torch.randint(30, (count,), generator=draws))  # noqa: E731
    lines = []
    for number in range(60):
        turns = [[speaker, pick(2 + number % 9)] for speaker in ("Ann", "Bo") * (1 + number % 4)]
        lines.append(json.dumps({"turns": turns}))
    (folder / "talk.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("side", SIDES)
def test_dialogues_are_trained_loaded_and_continued_also_after_a_stop(side, talk, tmp_path, monkeypatch):
    sides = [word for word in SIDES[side] if "source_length" not in word]
    words = [*talk, "router=switch", *ENCODED, *sides, "train.steps=4", "record.checkpoint_every=2"]
    assert run(compose_config(*words)) == FINISHED
    opened = open_run(read(compose_config(*words)))

    class AfterTwoSteps(list):
        asked = 0

        def __bool__(self):
            self.asked += 1
            return self.asked >= 3  # the loop asks twice a step

    again = [*words, f"runs={tmp_path}/again"]
    with monkeypatch.context() as patched:
        patched.setattr(job, "stop_requests", lambda: nullcontext(AfterTwoSteps()))
        assert run(compose_config(*again)) == INTERRUPTED
    assert run(compose_config(*again)) == FINISHED
    whole, resumed = (load_run(folder) for folder in (opened.folder, tmp_path / "again" / opened.folder.name))
    assert whole.result["test/ce"] == resumed.result["test/ce"]
    assert all(
        torch.equal(one, other) for one, other in zip(*(r.model.state_dict().values() for r in (whole, resumed)))
    )
    counted = opened.prepared.splits["test"]["counted"]
    assert whole.result["test/tokens"] == counted
    assert sample(whole, "[1] w1 w2\n[2]", 5, 0.8, seed=0).startswith("[1] w1 w2\n[2]")


def test_load_metrics_are_of_the_side_that_is_routed(talk):
    settings = read(
        compose_config(*talk, "router=switch", *ENCODED, "model.sparse_in=encoder", "model.sparse_layers=[0]")
    )
    opened = open_run(settings)
    model = make_model(settings, opened.prepared, CPU)
    batches = TrainingBatches(opened.splits["train"], 4, 0)
    nothing = lambda *_: None  # noqa: E731
    parts = make_losses(settings, model, CPU), make_optimizer(model, settings.train), batches, Progress()
    trainer = Trainer(settings, model, *parts, nothing, nothing, nothing, [])
    micros = trainer.micro_batches(0)
    _, routings, real = trainer.forward_backward(micros)
    assert torch.equal(real, torch.cat([batch.source.tokens.real for batch, _ in micros]))
    assert trainer.route_metrics(routings, real)["route/0/dropped"] == 0
    assert int((routings[0].weight > 0).sum()) == int(real.sum())


@pytest.mark.parametrize("side", SIDES)
def test_accumulation_over_micro_batches_changes_nothing(side, tiny):
    words = [*tiny, "router=switch", *ENCODED, *SIDES[side], "model.dispatch=loop", "router.capacity_factor=1.0"]

    def trained(*more):
        opened = open_run(read(compose_config(*words, *more)))
        settings = opened.settings
        settings.train.steps, lines = 3, []
        model = make_model(settings, opened.prepared, CPU).double()
        batches = TrainingBatches(opened.splits["train"], settings.train.batch_size, 0)
        nothing = lambda *_: None  # noqa: E731
        parts = make_losses(settings, model, CPU), make_optimizer(model, settings.train), batches, Progress()
        Trainer(settings, model, *parts, lines.append, nothing, nothing, []).train()
        return model, lines

    (whole, whole_lines), (split, split_lines) = trained(), trained("train.micro_batch=2")
    for (name, one), other in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, msg=name)
    for one, other in zip(whole_lines, split_lines, strict=True):
        one.pop("tokens_per_second"), other.pop("tokens_per_second")
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(("side", "kind"), [("decoder", "plain text"), ("encoder", "dialogue")])
def test_a_training_step_is_one_graph(side, kind):
    torch.compiler.reset()
    small = {"num_layers": 1, "encoder_layers": 1, "sparse_layers": [0]}
    model = shaken(model_of("switch", source_length=READS[kind], sparse_in=side, **small))
    batch, plans = model.prepare(random_batch(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        seen = [m(batch.tokens, plans, batch.document, batch.source).logits for m in (model, compiled)]
    torch.testing.assert_close(*seen, atol=0.1, rtol=0.1)
    seen[1].square().mean().backward()


BAD = [
    (["model.sparse_in=encoder"], "model.sparse_layers must be different layers in 0..0 (model.encoder_layers - 1)"),
    (["data.source_length=32"], "data.source_length must leave both sides some of data.sequence_length = 32; got 32"),
    (["data.source_length=0"], "data.source_length must be at least 1; got 0"),
    (["data.sequence_length=1"], "data.source_length must leave both sides some"),
    (
        ["model.positions=learned", "model.num_positions=31"],
        "model.num_positions must be at least data.sequence_length",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_wrong_combinations_are_one_line(words, message, tiny):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read(compose_config("router=switch", *tiny, *ENCODED, *words))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_prediction_is_of_the_decoders_tokens_alone(tiny, baselines):
    words = [*tiny, f"router.baseline={baselines('dense')}", *ENCODED, *SIDES["encoder"], "router=hash_predicted"]
    with pytest.raises(ValueError, match="model.sparse_in must be decoder for a router that reads predictions"):
        read(compose_config(*words))


def test_dialogues_take_no_source_length_and_a_decoder_needs_no_source(tiny):
    settings = read(compose_config(*tiny, *ENCODED, "data.source_length=8"))
    counted = {"train": torch.ones(4).bool().numpy()}
    talk = Prepared(None, "", 300, torch.ones(300).long(), {}, {}, counted)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data.source_length must be null for dialogues"):
        make_model(settings, talk, CPU)
    with pytest.raises(ValueError, match="an encoder-decoder needs a source"):
        both("dialogue")(random_batch(0).tokens)
