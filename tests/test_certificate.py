import functools
import math

import pytest
import torch
from conftest import ROUTERS, compose_config, make_site, one_of_a_kind, shaken, some_batch
from torch import nn

import models.feedforward
from data.markov import Markov
from data.prepare import prepare
from data.randomness import generator, uniform
from data.tokenizer import END, BytePairs
from routers.certificate import balance, state
from routers.certificate.alarm import leak_alarm
from routers.certificate.findings import CONFIRMED, FAILED
from routers.certificate.trial import Case
from routers.certify import CHECKS, case_of, main
from routers.gates import balance_loss, choices, gate_parameter, gate_scores, within_capacity
from routers.routing import LEAKS, Balancing, Router, make_plan, one_each, some_each
from routers.switch import Switch


@functools.cache
def case_named(name: str) -> Case:
    return case_of(compose_config(f"router={name}"))


# every router of conf/router


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", one_of_a_kind(ROUTERS))
def test_every_router_passes_every_check(name, check):
    finding = CHECKS[check](case_named(name))
    assert finding.status != FAILED, finding.text


ALARMED = ("switch", "hash_balanced", "hash_next_token")


@pytest.mark.parametrize("name", [n if n in ALARMED else pytest.param(n, marks=pytest.mark.long) for n in ROUTERS])
def test_no_causal_router_gets_below_the_entropy_and_the_oracle_does(name):
    finding = leak_alarm(case_named(name))
    assert finding.status == (CONFIRMED if name == "hash_next_token" else "ok"), finding.text


# sound and faulty routers: each public mistake is caught by the check that is named beside it


class Sound(Router):
    """One learned gate, top-1 by its softmax."""

    def __init__(self, site):
        super().__init__(site)
        self.gate = gate_parameter(site)

    def scores(self, hidden, tokens):
        return gate_scores(hidden, self.gate)

    def loss(self, p, tokens):
        return None

    def forward(self, hidden, tokens):
        p = self.scores(hidden, tokens).softmax(-1)
        weight, expert = p.max(-1)
        return one_each(expert, weight * tokens.real, self.loss(p, tokens))


class NextTokenHash(Router):
    """Sees the future and does not say so."""

    def forward(self, hidden, tokens):
        return one_each(tokens.next % self.site.num_experts, tokens.real)


class Modest(Sound):
    """Declares a leak that it has not."""

    leaks = frozenset({"mates in evaluation"})


class ModestAbove(Sound):
    """Sees the future in its first layer, and says so of all."""

    leaks = frozenset({"future in training", "future in evaluation"})

    def scores(self, hidden, tokens):
        ahead = hidden.mean(1, keepdim=True) if self.site.layer == 0 else 0
        return super().scores(hidden - ahead, tokens)


class LooksAtMates(Sound):
    def scores(self, hidden, tokens):
        return super().scores(hidden - hidden.mean((0, 1), keepdim=True), tokens)


class CausalMean(Sound):
    """Sees the future only in training: a norm over the whole window."""

    def scores(self, hidden, tokens):
        return super().scores(hidden - (hidden.mean(1, keepdim=True) if self.training else 0), tokens)


class Samples(Sound):
    def forward(self, hidden, tokens):
        p = self.scores(hidden, tokens).softmax(-1)
        expert = torch.multinomial(p.flatten(0, 1), 1).view(tokens.id.shape)
        return one_each(expert, p.gather(-1, expert[..., None])[..., 0] * tokens.real)


class SamplesByKey(Sound):
    """Draws from the batch's key, in evaluation too."""

    def scores(self, hidden, tokens):
        return super().scores(hidden, tokens) + uniform(tokens.key[:, None, None], torch.arange(self.site.num_experts))


class ResetsTheGenerator(Sound):
    def __init__(self, site):
        torch.manual_seed(site.seed)
        super().__init__(site)


class Biased(Sound):
    """Loss-free balancing; faults are switched on below."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("bias", torch.zeros(site.num_experts))

    def forward(self, hidden, tokens):
        scores = self.scores(hidden, tokens).sigmoid()
        expert = self.selection(scores).argmax(-1)
        return one_each(expert, scores.gather(-1, expert[..., None])[..., 0] * tokens.real)

    def selection(self, scores):
        return scores + self.bias.to(scores.dtype)

    def after_step(self, load, progress):
        self.bias += 0.01 * torch.sign(load.double().mean() - load).to(self.bias.dtype)


class IdleBias(Biased):
    def selection(self, scores):
        return scores


class BiasMovesInEvaluation(Biased):
    def selection(self, scores):
        with torch.no_grad():
            self.bias += 0.01
        return super().selection(scores)


class CountsInForward(Biased):
    """A counter that recomputation doubles."""

    def selection(self, scores):
        if self.training:
            self.bias += 1
        return scores


class CountsInPython(Sound):
    calls = 0

    def loss(self, p, tokens):
        if self.training:
            self.calls = self.calls + 1


class NaNAtBalance(Sound):
    """The coefficient of variation of the mean probabilities: its root has no gradient at 0."""

    def loss(self, p, tokens):
        mean = (p * tokens.real[..., None]).sum((0, 1))
        return mean.var(correction=0).sqrt()


class TableOutside(Router):
    def __init__(self, site):
        super().__init__(site)
        self.table = torch.randint(site.num_experts, (site.vocab_size,), generator=site.generator("table"))

    def forward(self, hidden, tokens):
        return one_each(self.table[tokens.id], tokens.real)


class CountsPadding(Sound):
    def loss(self, p, tokens):
        return p.mean((0, 1)).square().sum()


class WeighsPadding(Sound):
    def forward(self, hidden, tokens):
        return super().forward(hidden, tokens._replace(real=torch.ones_like(tokens.real)))


class PaddingTakesRoom(Sound):
    leaks = frozenset({"future in training", "future in evaluation", "mates in training", "mates in evaluation"})

    def forward(self, hidden, tokens):
        routing = super().forward(hidden, tokens)
        everyone = tokens._replace(real=torch.ones_like(tokens.real))
        kept = within_capacity(choices(routing.expert.view(*tokens.id.shape, 1), everyone, self.site), 1.0).any(-1)
        return routing._replace(weight=routing.weight * kept.view(-1))


class Balanced(Sound):
    """Switch's loss; ways to get it wrong below."""

    def loss(self, p, tokens):
        return 0.1 * balance_loss(choices(p.argmax(-1, keepdim=True), tokens, self.site), p)

    def balancing(self, hidden, tokens):
        scores = self.scores(hidden, tokens)
        return Balancing(scores, scores.softmax(-1), 0.1)


class LossOverExperts(Balanced):
    def loss(self, p, tokens):
        return super().loss(p, tokens) / self.site.num_experts


class LossAfterDropping(Balanced):
    leaks = LEAKS

    def loss(self, p, tokens):
        choice = choices(p.argmax(-1, keepdim=True), tokens, self.site)
        return 0.1 * balance_loss(choice * within_capacity(choice, 0.5), p)


class LossOverPadding(Balanced):
    def loss(self, p, tokens):
        return super().loss(p, tokens._replace(real=torch.ones_like(tokens.real)))


class ForgetsThePenaltyOfSize(Balanced):
    def balancing(self, hidden, tokens):
        return super().balancing(hidden, tokens)._replace(z_coef=0.01)


class LossWithoutAGradient(Balanced):
    def loss(self, p, tokens):
        return super().loss(p.detach(), tokens)


class HalfWeight(Sound):
    def forward(self, hidden, tokens):
        routing = super().forward(hidden, tokens)
        return routing._replace(weight=routing.weight / 2)


class TableBeside(Router):
    """The same for every seed, and in no checkpoint."""

    def __init__(self, site):
        super().__init__(site)
        draws = torch.Generator().manual_seed(1)
        self.table = torch.randint(site.num_experts, (site.vocab_size,), generator=draws)

    def forward(self, hidden, tokens):
        return one_each(self.table[tokens.id], tokens.real)


class NaNAtEvenLoads(Sound):
    """The root of how uneven the loads are has no gradient at 0."""

    def loss(self, p, tokens):
        choice = choices(p.argmax(-1, keepdim=True), tokens, self.site).to(p.dtype)
        share = choice.sum(1) / choice.sum((1, 2)).clamp(min=1)[:, None]
        uneven = (share - 1 / self.site.num_experts).square()
        return (uneven * p.view(choice.shape).mean(1)).sum(-1).sqrt().mean()


class PromisesABound(Router):
    """Half the experts stay empty."""

    load_bound = 1.0

    def forward(self, hidden, tokens):
        return one_each(tokens.id % 2, tokens.real)


class BiasTheWrongWay(Biased):
    follows_load = True

    def after_step(self, load, progress):
        super().after_step(-load, progress)


class Negative(Sound):
    def forward(self, hidden, tokens):
        routing = super().forward(hidden, tokens)
        return routing._replace(weight=-routing.weight)


class NoisyInTraining(Sound):
    def scores(self, hidden, tokens):
        noise = uniform(tokens.key[:, None, None], tokens.position[..., None], torch.arange(self.site.num_experts))
        return super().scores(hidden, tokens) + 2 * noise * self.training


class SaysItTrainsDifferently(Sound):
    trains_differently = True


class PromisesEvenLoads(Sound):
    even_loads = True


class NeverLearns(Sound):
    def __init__(self, site):
        super().__init__(site)
        self.spare = nn.Parameter(torch.ones(3))


class LearnsByItsLossAlone(Sound):
    def forward(self, hidden, tokens):
        routing = super().forward(hidden, tokens)
        return routing._replace(
            weight=routing.weight.detach(), aux_loss=0.01 * self.scores(hidden, tokens).square().mean()
        )


class HasAnotherPlan(Sound):
    def plan(self, tokens):
        return make_plan(tokens.id.flatten() % self.site.num_experts, self.site.num_experts)


class LossOfTheMicroBatch(Sound):
    """Squares the mean over all groups at once instead of each group's."""

    def loss(self, p, tokens):
        real = tokens.real[..., None]
        return ((p * real).sum((0, 1)) / real.sum().clamp(min=1)).square().sum()


class HighestOnTies(Sound):
    def forward(self, hidden, tokens):
        p = self.scores(hidden, tokens).softmax(-1)
        expert = p.shape[-1] - 1 - p.flip(-1).argmax(-1)
        return one_each(expert, p.amax(-1) * tokens.real)


class HalfScores(Sound):
    """A plain linear product: autocast lowers it."""

    def scores(self, hidden, tokens):
        return nn.functional.linear(hidden.to(self.gate.dtype), self.gate).float()


class NarrowScores(Sound):
    def scores(self, hidden, tokens):
        return super().scores(hidden, tokens).bfloat16().to(hidden.dtype)


class ForgetsItsWeight(Sound):
    """The top two, their weights divided by k = 2 more than they should: one expert is not the plain FFN."""

    def forward(self, hidden, tokens):
        weight, expert = self.scores(hidden, tokens).softmax(-1).topk(1)
        return some_each(expert, weight.log() * tokens.real[..., None])


FAULTS = {
    "blind to the future in training": [NextTokenHash, CausalMean, LooksAtMates],
    "blind to the future in evaluation": [NextTokenHash, LooksAtMates, ModestAbove],
    "blind to batch mates in training": [LooksAtMates],
    "blind to batch mates in evaluation": [Modest, LooksAtMates],
    "evaluation is pure": [Samples, SamplesByKey, ResetsTheGenerator, BiasMovesInEvaluation],
    "forward keeps state": [CountsInForward, CountsInPython, BiasMovesInEvaluation, Samples],
    "state of training counts": [IdleBias],
    "survives a checkpoint": [TableOutside, TableBeside],
    "one expert is a plain FFN": [HalfWeight],
    "every token accounted for": [CountsPadding, WeighsPadding, PaddingTakesRoom, Negative, ForgetsItsWeight],
    "training and evaluation alike": [NoisyInTraining, SaysItTrainsDifferently],
    "loads": [PromisesEvenLoads],
    "balanced table at its bound": [PromisesABound],
    "evens a drifting stream": [BiasTheWrongWay],
    "balancing loss as published": [
        LossOverExperts,
        LossAfterDropping,
        LossOverPadding,
        ForgetsThePenaltyOfSize,
        LossWithoutAGradient,
    ],
    "equal to a loop, float64": [HasAnotherPlan],
    "working path, float32": [HasAnotherPlan],
    "the same at any accumulation": [LossOfTheMicroBatch],
    "learns where it should": [NeverLearns, LearnsByItsLossAlone],
    "gradients stay finite": [NaNAtBalance, NaNAtEvenLoads],
    "ties to the lowest expert": [HighestOnTies],
    "scores in float32": [HalfScores],
}


@pytest.mark.parametrize(("check", "faulty"), [(check, f) for check, faulty in FAULTS.items() for f in faulty])
def test_a_faulty_router_is_caught(check, faulty):
    assert CHECKS[check](Case(faulty)).status == FAILED


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("sound", [Sound, Biased, Balanced])
def test_a_sound_router_passes(check, sound):
    finding = CHECKS[check](Case(sound))
    assert finding.status != FAILED, finding.text


def test_the_alarm_goes_off_at_an_oracle_that_declares_nothing():
    finding = leak_alarm(Case(NextTokenHash))
    assert finding.status == FAILED
    assert "sees the future" in finding.text


@pytest.mark.parametrize("path", ["loop", "grouped_mm"])
def test_a_dispatch_that_forgets_a_weight_is_caught(monkeypatch, path):
    right = models.feedforward.dispatch

    def wrong(x, routing, plan, experts, path):
        return right(x, routing._replace(weight=routing.weight.detach()), plan, experts, path)

    monkeypatch.setattr(models.feedforward, "dispatch", wrong)
    name = "equal to a loop, float64" if path == "loop" else "working path, float32"
    assert CHECKS[name](Case(Sound)).status == FAILED


# the load-balancing loss: the published formula, written out in Python's own numbers


def loss_by_formula(p: list, real: list, coef: float) -> float:
    """coef * E * sum_i f_i P_i over one group (Switch, eq. 4): f and P over real tokens, before any is dropped."""
    rows = [row for row, kept in zip(p, real) if kept]
    experts = len(rows[0])
    chosen = [row.index(max(row)) for row in rows]
    f = [chosen.count(i) / len(rows) for i in range(experts)]
    mean = [sum(row[i] for row in rows) / len(rows) for i in range(experts)]
    return coef * experts * sum(a * b for a, b in zip(f, mean))


def loss_error(router) -> float:
    """The relative error of a Switch's loss over two groups, one with padding, many tokens over capacity."""
    batch = some_batch(padding=5)
    hidden = torch.randn(*batch.target.shape, router.site.d_model, generator=generator("formula"))
    p, real = (hidden @ router.gate.T).softmax(-1).flatten(0, 1).tolist(), batch.tokens.real.flatten().tolist()
    half = len(p) // 2
    expected = sum(loss_by_formula(p[g], real[g], 0.1) for g in (slice(half), slice(half, None))) / 2
    return abs(float(router(hidden, batch.tokens).aux_loss.detach()) / expected - 1)


def switch(kind=Switch, **changes) -> Switch:
    options = {"gate": "hidden", "weight": "probability", "capacity_factor": 0.5, "eval_capacity_factor": None}
    options |= {"load_balance_coef": 0.1, "z_loss_coef": 0.0, "jitter": 0.0}
    return shaken(kind(make_site(), **options | changes))


def test_the_balancing_loss_is_the_published_one():
    # two tokens of p = (0.75, 0.25) and (0.25, 0.75), a third is padding: 2 (1/2 1/2 + 1/2 1/2) = 1
    assert loss_by_formula([[0.75, 0.25], [0.25, 0.75], [1.0, 0.0]], [True, True, False], 1.0) == 1.0
    # all on the first of two, with certainty: 2
    assert loss_by_formula([[1.0, 0.0]], [True], 1.0) == 2.0
    assert loss_error(switch()) < 1e-5


def over_kept(choice, probability):
    """The mistake of counting after dropping."""
    return balance_loss(choice * within_capacity(choice, 0.5), probability)


def over_padding(choice, probability):
    chosen = nn.functional.one_hot(probability.argmax(-1), probability.shape[-1]).view(choice.shape)
    return balance_loss(chosen, probability)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c, p: balance_loss(c, p) / c.shape[-1],
        lambda c, p: balance_loss(c, p) / c.shape[-1] ** 2,
        lambda c, p: balance_loss(c, p) * c.shape[-1],
        lambda c, p: balance_loss(c, p) * 2,
        over_kept,
        over_padding,
    ],
    ids=["over E", "over E^2", "times E", "times k", "after dropping", "with padding"],
)
def test_a_wrong_balancing_loss_is_caught(monkeypatch, wrong):
    monkeypatch.setattr("routers.switch.balance_loss", wrong)
    assert loss_error(switch()) > 1e-3


# jitter


def jitter_at_zero(router) -> float:
    """How far jitter moves the weights of an input of zeros: multiplied, not at all."""
    batch = some_batch()
    weight = router(torch.zeros(*batch.target.shape, router.site.d_model), batch.tokens).weight.detach()
    return float((weight - 1 / router.site.num_experts).abs().max())


class AddsJitter(Switch):
    def scores(self, hidden, tokens):
        noise = uniform(tokens.key[:, None, None], tokens.position[..., None], torch.arange(hidden.shape[-1]))
        return gate_scores(hidden + self.jitter * (2 * noise - 1), self.gate)


def test_jitter_multiplies_and_one_that_adds_is_caught():
    assert jitter_at_zero(switch(jitter=0.5, capacity_factor=None)) < 1e-6
    assert jitter_at_zero(switch(AddsJitter, jitter=0.5, capacity_factor=None)) > 1e-3


# the synthetic language


def small(**changes) -> Markov:
    options = {"symbols": 8, "end": 0.05, "sharpness": 1.5, "tokens": 20_000, "held_out": 2_000, "seed": 0}
    return Markov(**options | changes)


def test_its_entropy_by_hand():
    # uniform successors: a letter says end with 1/10, else one of 4; after an end, one of 4. Ends are 1/11 of tokens
    after_letter = 0.1 * math.log(10) + 0.9 * math.log(4 / 0.9)
    assert small(symbols=4, end=0.1, sharpness=0.0).entropy() == pytest.approx(
        10 / 11 * after_letter + math.log(4) / 11
    )
    language = small()
    assert torch.equal(language.transition[:, 0], torch.tensor([0.0] + [0.05] * 8, dtype=torch.float64))
    torch.testing.assert_close(language.transition.sum(-1), torch.ones(9).double())


def test_its_text_has_that_entropy_and_those_frequencies():
    language, number = small(), 50_000
    states = language.states("train")
    stream = torch.tensor([0] + [next(states) for _ in range(number)])
    surprise = language.surprise(stream[:-1], stream[1:])
    error = float(surprise.std()) / number**0.5
    assert abs(float(surprise.mean()) - language.entropy()) < 5 * error
    pairs = torch.bincount(stream[:-1] * 9 + stream[1:], minlength=81).view(9, 9).double()
    seen = pairs / pairs.sum(-1, keepdim=True)
    allowed = 5 * (language.transition * (1 - language.transition) / pairs.sum(-1, keepdim=True)).sqrt()
    assert ((seen - language.transition).abs() <= allowed + 1e-12).all()


def test_its_letters_are_tokens_and_splits_differ(tmp_path):
    language = small()
    prepared = prepare(language, BytePairs(258, None), tmp_path, say=lambda _: None)
    for split, least in (("train", 20_000), ("validation", 2_000), ("test", 2_000)):
        documents = list(language.documents(split))
        stream = prepared.tokens[split]
        assert len(stream) == sum(map(len, documents)) + len(documents)
        assert least <= len(stream) < least + 500
        assert (stream == END).sum() == len(documents)
        assert min(map(len, documents)) >= 1
    assert list(language.documents("validation")) != list(language.documents("test"))
    assert list(language.documents("test")) == list(small().documents("test"))
    assert small(seed=1).digest() != language.digest() == small().digest()


@pytest.mark.parametrize(
    "wrong", [{"symbols": 1}, {"symbols": 27}, {"end": 0.0}, {"end": 1.0}, {"sharpness": -1.0}, {"tokens": 0}]
)
def test_a_language_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        small(**wrong)


def test_the_yaml_of_the_language_composes():
    config = compose_config("data=markov", "scale=small")
    assert Markov(**{k: v for k, v in config.data.corpus.items() if k != "_target_"}).entropy() > 1


# the command


def test_the_command_prints_a_card_and_says_by_its_status_how_it_went(capsys, monkeypatch):
    monkeypatch.setattr("routers.certify.CHECKS", {"survives a checkpoint": state.survives_checkpoint})
    assert main(["router=hash_random", "--quick"]) == 0
    assert "passed 1 checks;" in capsys.readouterr().out
    checks = {"evens a drifting stream": balance.evens_a_drifting_stream}
    monkeypatch.setattr("routers.certify.CHECKS", checks | {"survives a checkpoint": state.survives_checkpoint})
    assert main(["router=hash_random", "--quick"]) == 0
    assert "passed 1 checks, 1 not applicable;" in capsys.readouterr().out
    monkeypatch.setattr("routers.certify.CHECKS", {"broken": lambda case: 1 / 0})
    assert main(["router=hash_random", "--quick"]) == 1
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out
    for words in (["--help"], ["router=hash_random", "-h"]):
        assert main(words) == 0
        printed = capsys.readouterr()
        assert "certify router=NAME [overrides] [--quick] checks a router" in printed.out and printed.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage"),
        (["router=nothing"], "nothing"),
        (["router=dense"], "must be one that routes"),
        (["router=gated_hash", "router.k=20"], "router.k must be in 1..num_experts = 16; got 20"),
        (["router=switch", "router.jitter=2"], "router.jitter"),
        (["router=switch", "router._target_=os.system"], "_target_"),
        (["router=switch", "router.colour=red"], "colour"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, message, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_users_own_router_is_certified(tmp_path, monkeypatch, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("")
    (tmp_path / "ours" / "last.py").write_text(
        "from routers.routing import Router, one_each\n\n\n"
        "class Shifted(Router):\n"
        "    def __init__(self, site, shift: int):\n"
        "        super().__init__(site)\n"
        "        self.shift = shift\n\n"
        "    def forward(self, hidden, tokens):\n"
        "        return one_each((tokens.id + self.shift) % self.site.num_experts, tokens.real)\n"
    )
    (tmp_path / "conf" / "router").mkdir(parents=True)
    (tmp_path / "conf" / "router" / "shifted.yaml").write_text("_target_: ours.last.Shifted\nshift: 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["router=shifted", "--quick", f"hydra.searchpath=[file://{tmp_path}/conf]"]
    assert main(words) == 2
    assert "extra_packages" in capsys.readouterr().err
    assert main([*words, "extra_packages=[ours]", "router.shift=3"]) == 0
    assert "passed" in capsys.readouterr().out
