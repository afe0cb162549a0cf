import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import compose_config
from test_training import folder_of

import data.prepare
from data.dictionary_files import find_dictionary
from data.mixed_batches import MixedBatches, MixedSplit, open_split
from data.mixture import Mixture, prepare_mixture, schedule, whole_shares
from data.tokenizer import END, BytePairs, decode, load_tokenizer
from training.job import FINISHED, open_run, run
from training.preflight import read


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two corpora of texts that a letter tells apart, a the larger."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, files, text in (("a", 40, "abc ab cab "), ("b", 24, "xyz xzy yx ")):
        for number in range(files):
            (folder / f"{name}{number}.txt").write_text(text * (4 + number % 5) + f"{name}{number}")
    return folder


@pytest.fixture
def words(folders, tmp_path, tmp_path_factory, tiny):
    """Overrides of a run on the mixture a : b = 2 : 3."""
    chosen = [word for word in tiny if not word.startswith(("data", "runs"))]
    for name in "ab":
        part = f"data.corpus.parts.{name}"
        chosen += [f"+data@{part}=text", f"{part}.corpus.files={folders}/{name}*.txt"]
        chosen += [f"{part}.corpus.validation_share=0.2", f"{part}.corpus.test_share=0.2"]
    chosen += ["data=mixture", "data.corpus.weights={a: 2, b: 3}", "data.vocab_size=258", "data.sequence_length=32"]
    return [*chosen, f"data.cache={tmp_path_factory.getbasetemp() / 'mixtures'}", f"runs={tmp_path}/runs"]


@pytest.mark.parametrize("shares", [[1], [1, 1], [2, 3], [1, 2, 4], [1, 1, 1, 97], [7, 11, 13, 17, 19], [1] * 9 + [9]])
def test_no_corpus_is_ever_a_window_from_its_share(shares):
    order = schedule(shares)
    assert len(order) == sum(shares)
    seen = np.cumsum(order[:, None] == np.arange(len(shares)), 0)
    exact = np.arange(1, len(order) + 1)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(seen - exact).max() < 1
    assert seen[-1].tolist() == shares


def test_a_part_of_a_mixtures_split_has_some_of_each_corpus(words):
    split = opened(words).splits["validation"]
    sizes = [len(part) for part in split.parts]
    for windows in (1, 3, sum(sizes) + 1):
        numbers = split.spread(windows).tolist()
        assert numbers == sorted(set(numbers)) and numbers[0] == 0 and numbers[-1] < len(split)
        assert all(any(first <= n < first + size for n in numbers) for first, size in zip(split.first, sizes))
    assert numbers == list(range(sum(sizes)))


def test_random_weights_are_kept_as_well():
    draws = np.random.default_rng(0)
    for _ in range(40):
        test_no_corpus_is_ever_a_window_from_its_share(draws.integers(1, 60, draws.integers(2, 8)).tolist())


def test_weights_become_the_smallest_whole_numbers():
    assert whole_shares({"a": 0.5, "b": 0.3, "c": 0.2}, ["a", "b", "c"]) == [5, 3, 2]
    assert whole_shares({"a": 4, "b": 2}, ["b", "a"]) == [1, 2]


def opened(words):
    return open_run(read(compose_config(*words)))


def corpus_of(run, batch):
    """The corpus of each row, read off the text itself."""
    tokenizer = load_tokenizer(run.prepared.folder)
    texts = [decode(tokenizer, [i for i in row.tolist() if i != END]) for row in batch.tokens.id]
    assert all(("a" in text) != ("x" in text) for text in texts)
    return ["a" if "a" in text else "b" for text in texts]


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_training_keeps_the_weights_and_sees_every_window_once_an_epoch_of_its_corpus(packing, words):
    run = opened([*words, f"data.packing={packing}"])
    split = run.splits["train"]
    assert isinstance(split, MixedSplit)
    batches, seen, windows = MixedBatches(split, 5, seed=0), Counter(), {"a": [], "b": []}
    full = {"a": split.parts[0].full, "b": split.parts[1].full}
    for step in range(3 * max(full.values())):
        batch = batches.batch(step)
        for row, name in enumerate(corpus_of(run, batch)):
            seen[name] += 1
            windows[name].append((tuple(batch.tokens.id[row].tolist()), tuple(batch.document[row].tolist())))
        assert seen["a"] == 2 * (step + 1) and seen["b"] == 3 * (step + 1)  # a period a step
    for name, rows in windows.items():
        for first in range(0, len(rows) - full[name], full[name]):
            epoch = rows[first : first + full[name]]
            assert len(set(epoch)) == full[name] and set(epoch) == set(rows)
        assert len(rows) < 2 * full[name] or rows[: full[name]] != rows[full[name] : 2 * full[name]]


def test_a_batch_depends_on_data_seed_and_step_alone(words):
    split = opened(words).splits["train"]
    one, other = MixedBatches(split, 8, seed=1), MixedBatches(split, 8, seed=1)
    for step in (3, 0, 200, 3):
        one.batch(step * 2)
        left, right = one.batch(step), other.batch(step)
        assert torch.equal(left.tokens.id, right.tokens.id) and torch.equal(left.tokens.key, right.tokens.key)
    assert not torch.equal(one.batch(0).tokens.id, MixedBatches(split, 8, seed=2).batch(0).tokens.id)


def test_a_mixture_in_evaluation_is_its_parts_one_after_the_other(words):
    run = opened(words)
    split, length = run.splits["validation"], run.settings.data.sequence_length
    parts = [open_split(part.prepared, "validation", length, "documents") for part in run.prepared.parts]
    numbers = torch.arange(len(split) + 2)
    whole = split.windows(numbers, numbers)
    alone = [part.windows(torch.arange(len(part)), torch.arange(len(part))) for part in parts]
    assert torch.equal(whole.tokens.id[:-2], torch.cat([batch.tokens.id for batch in alone]))
    assert torch.equal(whole.counted[:-2], torch.cat([batch.counted for batch in alone]))
    assert not whole.counted[-2:].any() and not whole.tokens.real[-2:].any()
    first = len(parts[0].ends)
    assert torch.equal(whole.document[: len(parts[0])], alone[0].document)
    assert torch.equal(whole.document[len(parts[0]) : -2], alone[1].document + first)
    shuffled = split.windows(numbers.flip(0), numbers.flip(0))
    assert all(torch.equal(one.flip(0), other) for one, other in zip(whole.tokens[:6], shuffled.tokens[:6]))


def test_a_run_on_a_mixture_reports_each_corpus_apart(words):
    words = [*words, "router=hash_balanced"]
    assert run(compose_config(*words)) == FINISHED
    folder = folder_of(*words)
    result = json.loads((folder / "result.json").read_text())
    for name in ("val", "test"):
        tokens = {corpus: result[f"{name}/{corpus}/tokens"] for corpus in "ab"}
        assert sum(tokens.values()) == result[f"{name}/tokens"]
        mean = sum(result[f"{name}/{corpus}/ce"] * tokens[corpus] for corpus in "ab") / result[f"{name}/tokens"]
        assert mean == pytest.approx(result[f"{name}/ce"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "val/ce" in line][-1]["val/b/ce"] == pytest.approx(result["val/b/ce"])
    provenance = json.loads((folder / "provenance.json").read_text())
    assert set(provenance["data"]["parts"]) == {"a", "b"}


def test_fine_tuning_on_a_mixture_keeps_its_weights_and_the_dictionary_it_starts_with(words, tiny, tmp_path):
    first = [*tiny, "data.vocab_size=258", "train.steps=1", f"runs={tmp_path}/first"]
    assert run(compose_config(*first)) == FINISHED
    words = [*words, f"train.init_from={folder_of(*first)}", "train.steps=5", "train.batch_size=5"]
    words += ["train.routing_group=5", "record.log_every=5", "record.evaluate_every=5"]
    seen, batch = {}, MixedBatches.batch

    def noted(self, step):
        made = batch(self, step)
        seen[step] = Counter(corpus_of(opened_run, made))
        return made

    opened_run = opened(words)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MixedBatches, "batch", noted)
        assert run(compose_config(*words)) == FINISHED
    assert len(seen) >= 5 and all(each == {"a": 2, "b": 3} for each in seen.values())
    dictionaries = [(part.prepared.folder / "tokenizer.json").read_text() for part in opened_run.prepared.parts]
    assert set(dictionaries) == {find_dictionary(str(folder_of(*first))).read_text()}
    assert json.loads((opened_run.folder / "result.json").read_text())["val/b/tokens"] > 0


def test_the_dictionary_is_trained_on_the_mixture_and_weights_are_in_the_id(words, tmp_path):
    words = [*words, "data.vocab_size=262", f"data.cache={tmp_path}/cache"]
    one = opened(words)
    texts = {part.prepared.folder.joinpath("tokenizer.json").read_text() for part in one.prepared.parts}
    assert len(texts) == 1
    entries = set(load_tokenizer(one.prepared.folder).get_vocab())
    assert entries & {"xy", "yx", "xz", "zy"} and entries & {"ab", "ca", "Ġab", "bc"}  # of both corpora
    other = opened([*words, "data.corpus.weights={a: 3, b: 2}", f"tokenizer.file={one.prepared.folder}"])
    assert {p.prepared.fingerprint for p in one.prepared.parts} == {
        p.prepared.fingerprint for p in other.prepared.parts
    }
    assert one.folder != other.folder
    same = opened([*words, "data.corpus.weights={a: 4, b: 6}"])
    assert same.folder == one.folder
    total = sum(part.prepared.splits["train"]["tokens"] for part in one.prepared.parts)
    assert int(one.prepared.token_counts.sum()) == pytest.approx(total, abs=len(one.prepared.token_counts))


WRONG = [
    ("~data.corpus.weights.b", "data.corpus.weights must name the corpora of data.corpus.parts"),
    ("data.corpus.weights={a: 1, b: 0}", "data.corpus.weights must be above 0"),
    ("data.corpus.weights={a: 1, b: much}", "data.corpus.weights must be numbers"),
    ("data.corpus.weights={a: 1, b: 0.0000001}", "sum to at most 100,000"),
    ("data.corpus.parts.a.corpus.files=/nowhere/*.txt", "data.corpus.parts.a: no file matches"),
    ("data.corpus.parts.a.corpus._target_=os.system", "data.corpus.parts.a.corpus._target_ must be a class of"),
    (
        "data.corpus.parts.a.corpus.validation_share=0",
        "data.corpus.parts.a: the validation split of the corpus is empty",
    ),
    (
        "data.corpus.parts.a.corpus.validation_share=0",
        "; raise data.corpus.parts.a.corpus.validation_share (now 0.0), or name",
    ),
]


@pytest.mark.parametrize(("word", "message"), WRONG)
def test_what_is_wrong_with_a_mixture_is_one_line(word, message, words):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        opened([*words, word])
    assert message in str(raised.value) and "\n" not in str(raised.value)


class Letters:
    def __init__(self, letter):
        self.letter = letter

    def documents(self, split):
        yield from [self.letter] * 6

    def digest(self):
        return self.letter


def mixture_of_letters() -> Mixture:
    return Mixture({name: {"corpus": lambda name=name: Letters(name)} for name in "ab"}, {"a": 1, "b": 2})


def test_a_dictionary_that_other_code_made_is_made_anew(tmp_path, monkeypatch):
    prepare_mixture(mixture_of_letters(), BytePairs(258, None), tmp_path, lambda line: None)
    digest = data.prepare.file_digest
    for name in ("tokenizer.py", "mixture.py"):
        before = set(tmp_path.glob("*.dictionary"))
        other = lambda path, name=name: "another" if path.name == name else digest(path)  # noqa: E731
        monkeypatch.setattr(data.prepare, "file_digest", other)
        prepare_mixture(mixture_of_letters(), BytePairs(258, None), tmp_path, lambda line: None)
        assert len(set(tmp_path.glob("*.dictionary")) - before) == 1


def test_an_empty_corpus_of_a_mixture_is_named_before_a_dictionary_is_made(tmp_path):
    mixture = mixture_of_letters()
    mixture.corpora["b"] = Letters(" ")
    with pytest.raises(ValueError, match="^data.corpus.parts.b: the train, validation and test splits .* are empty: "):
        prepare_mixture(mixture, BytePairs(258, None), tmp_path, pytest.fail)


def test_the_dictionary_sees_documents_in_turn():
    mixture = mixture_of_letters()
    text = "".join(str(document) for document in mixture.documents("train"))
    assert text == "babbabbab"  # until b has no more
    assert BytePairs(258, None).size() == 258
