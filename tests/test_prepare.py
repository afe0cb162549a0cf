import json
import math
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data.encoding
import data.prepare
import data.shards
import data.tokenizer
from data.corpora import SPLITS, TextFiles
from data.prepare import Prepared, open_prepared, prepare
from data.records import read_record, write_record
from data.tokenizer import BEGIN, END, BytePairs, Bytes, cut, decode, encode, load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
WORDS = [
    "the",
    "router",
    "sends",
    "naïve",
    "tokens",
    "to",
    "東京",
    "experts",
    "<|end|>",
    "😀",
    "x=1;\n",
    "\r\n",
]


FILES = (*(f"{split}.npy" for split in SPLITS), "counts.npy", "tokenizer.json")


def prose(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


@pytest.fixture
def corpus(tmp_path) -> TextFiles:
    for seed, split in enumerate(SPLITS):
        documents = [prose(seed * 100 + index, 50) for index in range(20)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in [*documents, "", " \n"])
        (tmp_path / f"{split}.jsonl").write_text(lines)
    return open_corpus(tmp_path)


def open_corpus(folder: Path) -> TextFiles:
    train, validation, test = (str(folder / f"{split}.jsonl") for split in SPLITS)
    return TextFiles(train, validation, test, 0.0, 0.0, None, "text", 0, 0)


def write_documents(folder: Path, **splits: list[str]) -> TextFiles:
    for split in SPLITS:
        lines = [json.dumps({"text": text}) for text in splits[split]]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return open_corpus(folder)


def same_bytes(first: Prepared, second: Prepared) -> bool:
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted(path.name for path in second.folder.iterdir())
    return all((first.folder / name).read_bytes() == (second.folder / name).read_bytes() for name in names)


def test_the_stream_is_every_document_followed_by_the_end_id(corpus, tmp_path):
    prepared = prepare(corpus, BytePairs(300, None), tmp_path / "cache")
    tokenizer = load_tokenizer(prepared.folder)
    for split in SPLITS:
        ids = prepared.tokens[split].tolist()
        ends = [place for place, token in enumerate(ids) if token == END]
        assert ends[-1] == len(ids) - 1 and BEGIN not in ids
        starts = [0, *(end + 1 for end in ends)]
        documents = [decode(tokenizer, ids[a:b]) for a, b in zip(starts, ends, strict=False)]
        texts = [text for text in corpus.documents(split) if text.strip()]
        assert documents == texts
        assert ids == [token for text in texts for token in [*encode(tokenizer, text), END]]


def test_figures_are_those_of_hand_arithmetic(tmp_path):
    # 258 entries are the bytes and the two special ids, so a token is a byte.
    corpus = write_documents(tmp_path, train=["ab", "", "b"], validation=["abab"], test=["é"])
    prepared = prepare(corpus, BytePairs(258, None), tmp_path / "cache")
    a, b = encode(load_tokenizer(prepared.folder), "ab")
    assert prepared.tokens["train"].tolist() == [a, b, END, b, END]
    expected = torch.zeros(258, dtype=torch.int64)
    expected[a], expected[b], expected[END] = 1, 2, 2
    assert torch.equal(prepared.token_counts, expected)
    entropy = -2 * 0.4 * math.log(0.4) - 0.2 * math.log(0.2)
    figures = {"documents": 1, "tokens": 5, "counted": 5, "words": 1, "bytes": 4, "unknown": 0}
    figures["unigram_entropy"] = pytest.approx(entropy, abs=1e-12)
    assert prepared.splits["validation"] == figures
    assert prepared.splits["test"]["bytes"] == 2 and prepared.splits["test"]["tokens"] == 3


def test_text_survives_encoding_and_never_becomes_a_special_id(corpus, tmp_path):
    tokenizer = load_tokenizer(prepare(corpus, BytePairs(300, None), tmp_path / "cache").folder)
    draw = random.Random(0)
    texts = ["", "<|end|>", " <|begin|><|end|>\x00", "\r\n\t  x", "".join(map(chr, range(0x300)))]
    texts += ["".join(chr(draw.choice([32, 10, draw.randrange(0xD800)])) for _ in range(200)) for _ in range(50)]
    for text in texts:
        ids = encode(tokenizer, text)
        assert decode(tokenizer, ids) == text
        assert not {END, BEGIN} & set(ids)
    assert [tokenizer.token_to_id(name) for name in ("<|end|>", "<|begin|>")] == [END, BEGIN]


def test_long_documents_encode_in_pieces_as_they_do_whole(monkeypatch):
    monkeypatch.setattr(data.tokenizer, "PIECE", 16)
    tokenizer = train_tokenizer([prose(0, 2000)], 300)
    draw = random.Random(1)
    for seed in range(100):
        words = prose(seed, 40).split()  # none of them fills a piece, so there is always a space to cut at
        text = " ".join(draw.choice(["", " ", "\n", "\t", "'s"]) + word for word in words)
        pieces = list(cut(text))
        assert "".join(pieces) == text and all(16 <= len(piece) < 32 for piece in pieces[:-1])
        assert [token for piece in pieces for token in encode(tokenizer, piece)] == encode(tokenizer, text)
    assert list(cut("x" * 40)) == ["x" * 32, "x" * 8] and list(cut("")) == []


def test_pieces_and_batches_leave_no_mark_in_the_stream(corpus, tmp_path, monkeypatch):
    whole = prepare(corpus, BytePairs(300, None), tmp_path / "whole")
    monkeypatch.setattr(data.encoding, "BATCH", 100)
    monkeypatch.setattr(data.shards, "SHARD", 1000)
    monkeypatch.setattr(data.tokenizer, "PIECE", 16)
    assert same_bytes(prepare(corpus, BytePairs(300, None), tmp_path / "cut"), whole)


def test_the_tokenizer_sees_the_first_of_the_text_alone(monkeypatch):
    monkeypatch.setattr(data.tokenizer, "TRAIN_BYTES", 4000)
    texts = [prose(seed, 10) for seed in range(100)]
    whole = train_tokenizer(texts, 300).to_str()
    assert whole == train_tokenizer([*texts, "qq" * 2000], 300).to_str()
    monkeypatch.setattr(data.tokenizer, "TRAIN_BYTES", 40_000)
    assert whole != train_tokenizer([*texts, "qq" * 2000], 300).to_str()


def tokenizer_of(ids: list[int], vocab_size: int):
    """One that gives every text these ids."""
    encodings = [SimpleNamespace(ids=ids)]
    fake = {"get_vocab_size": lambda: vocab_size, "encode_batch_fast": lambda *_, **__: encodings, "model": None}
    return SimpleNamespace(**fake)


def test_an_id_that_is_not_in_the_dictionary_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="token ids must be below 300; the tokenizer gives 300"):
        data.shards.write_split(tmp_path, "train", ["text"], tokenizer_of([5, 300], 300), id)
    assert not (tmp_path / "train.npy").exists()


def test_an_id_that_is_not_in_the_dictionary_is_never_read(corpus, tmp_path):
    """Also if every digest is that of the file."""
    folder = prepare(corpus, Bytes(), tmp_path / "cache").folder
    meta = read_record(folder / "meta.json")
    tokens = np.load(folder / "test.npy")
    for highest, fits in ((257, True), (258, False)):
        tokens[3] = highest
        np.save(folder / "test.npy", tokens)
        write_record(folder / "meta.json", {"splits": meta["splits"]}, meta["files"])
        with nullcontext() if fits else pytest.raises(ValueError, match="test.npy must have ids below 258; it has 258"):
            assert open_prepared(folder).tokens["test"][3] == highest


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_the_largest_id_fits_the_file(tmp_path, vocab_size, dtype):
    figures = data.shards.write_split(tmp_path, "train", ["text"], tokenizer_of([5, vocab_size - 1], vocab_size), id)
    ids = np.load(tmp_path / "train.npy", mmap_mode="r", allow_pickle=False)
    assert ids.tolist() == [5, vocab_size - 1, END] and ids.dtype == dtype
    assert figures["tokens"] == 3 and data.shards.token_counts(vocab_size, ids)[vocab_size - 1] == 1


def test_what_is_prepared_is_opened_without_a_word_or_a_write(corpus, tmp_path):
    said: list[str] = []
    first = prepare(corpus, BytePairs(300, None), tmp_path / "cache", said.append)
    assert said[0].startswith("preparing the corpus") and "20 documents" in said[1]
    said.clear()
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(corpus, BytePairs(300, None), tmp_path / "cache", said.append)
    assert said == [] and second.fingerprint == first.fingerprint and second.splits == first.splits
    assert stamps == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert not second.tokens["train"].flags.writeable


def test_the_key_follows_everything_and_the_fingerprint_the_data(corpus, tmp_path, monkeypatch):
    first = prepare(corpus, BytePairs(300, None), tmp_path / "cache")
    assert prepare(corpus, BytePairs(301, None), tmp_path / "cache").fingerprint != first.fingerprint
    monkeypatch.setattr(data.prepare.tokenizers, "__version__", "another")
    other_code = prepare(corpus, BytePairs(300, None), tmp_path / "cache")
    assert other_code.folder != first.folder and other_code.fingerprint == first.fingerprint
    source = tmp_path / "test.jsonl"
    source.write_text(source.read_text().replace("router", "Router", 1))
    changed = prepare(corpus, BytePairs(300, None), tmp_path / "cache")
    assert changed.folder != other_code.folder and changed.fingerprint != first.fingerprint


@pytest.mark.parametrize("name", data.prepare.CODE)
def test_what_other_code_prepared_is_prepared_anew(name, corpus, tmp_path, monkeypatch):
    first = prepare(corpus, Bytes(), tmp_path / "cache", lambda line: None)
    assert prepare(corpus, Bytes(), tmp_path / "cache", pytest.fail).folder == first.folder
    digest = data.prepare.file_digest
    monkeypatch.setattr(data.prepare, "file_digest", lambda path: "another" if path.name == name else digest(path))
    with pytest.raises(data.prepare.NotPrepared):
        prepare(corpus, Bytes(), tmp_path / "cache", build=False)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, "meta.json"])
def test_a_damaged_cache_is_made_again_and_says_so(corpus, tmp_path, name):
    good = prepare(corpus, BytePairs(300, None), tmp_path / "good")
    prepared = prepare(corpus, BytePairs(300, None), tmp_path / "cache")
    path = prepared.folder / name
    size = path.stat().st_size
    damages = [lambda place=place: flip(path, place) for place in (0, size // 2, size - 3)]
    damages += [lambda: os.truncate(path, size // 2), lambda: os.truncate(path, 0), path.unlink]
    for damage in damages:
        damage()
        said: list[str] = []
        again = prepare(corpus, BytePairs(300, None), tmp_path / "cache", said.append)
        assert "is broken and is made again" in said[0] and "\n" not in said[0]
        assert same_bytes(again, good) and again.fingerprint == good.fingerprint


def start(script: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(folder), *words]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


OPEN_CORPUS = """
import os, signal, sys
from pathlib import Path
import data.prepare, data.records, data.encoding, data.shards
from data.corpora import TextFiles
from data.tokenizer import BytePairs
data.shards.SHARD, data.encoding.BATCH = 1500, 400
folder = Path(sys.argv[1])
names = ("train", "validation", "test")
corpus = TextFiles(*(str(folder / f"{name}.jsonl") for name in names), 0.0, 0.0, None, "text", 0, 0)
"""

PREPARE = f"""{OPEN_CORPUS}
print("ready", flush=True)
sys.stdin.readline()
data.prepare.prepare(corpus, BytePairs(300, None), folder / "cache")
print(data.prepare.prepare(corpus, BytePairs(300, None), folder / "cache").fingerprint)
"""


@pytest.mark.parametrize("number", [3, pytest.param(8, marks=pytest.mark.long)])
def test_processes_that_prepare_at_once_share_one_result(corpus, tmp_path, number):
    processes = [start(PREPARE, tmp_path) for _ in range(number)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * number
    good = prepare(corpus, BytePairs(300, None), tmp_path / "alone")
    assert {lines[-1] for lines in outputs} == {good.fingerprint}
    assert sum("making a dictionary" in line for lines in outputs for line in lines) == 1
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]


# Every line said, every batch encoded and every file digested is a moment to die at.
KILL = f"""{OPEN_CORPUS}
def dying_at(moment, action):
    def step(*arguments):
        global moments
        moments += 1
        if moments == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return action(*arguments)
    return step

def run(cache, moment, digests=True):
    if (child := os.fork()) == 0:
        global moments
        moments = 0
        if digests:
            data.records.file_digest = dying_at(moment, data.records.file_digest)
        data.encoding.Encoded = dying_at(moment, data.encoding.Encoded)
        say = dying_at(moment, lambda line: None)
        data.prepare.prepare(corpus, BytePairs(300, None), folder / cache, say)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

moment, deaths = 1, 0
while run(f"cache {{moment}}", moment):
    moment += int(sys.argv[2])
while run("cache 0", 9, digests=False):
    deaths += 1
    assert deaths < 100, "it never gets further"
print(moment, deaths)
"""


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.long)])
def test_a_preparer_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(corpus, tmp_path, stride):
    good = prepare(corpus, BytePairs(300, None), tmp_path / "alone")
    output = start(KILL, tmp_path, str(stride)).communicate()[0]
    moments, deaths = map(int, output.split())
    assert moments > 80 and deaths > 5  # killed once at each moment; killed again and again after a little work
    for moment in (0, *range(1, moments, stride)):
        cache = tmp_path / f"cache {moment}"
        assert same_bytes(prepare(corpus, BytePairs(300, None), cache), good)
        assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_a_failure_leaves_no_half_made_cache(tmp_path):
    corpus = write_documents(tmp_path, train=["ab"], validation=["a"], test=["   "])
    with pytest.raises(ValueError, match="the test split of the corpus is empty"):
        prepare(corpus, BytePairs(258, None), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_too_short_a_corpus_and_too_small_a_vocabulary_are_refused(corpus, tmp_path):
    for size in (257, 0):
        with pytest.raises(ValueError, match=f"data.vocab_size must be at least 258, .*; got {size}"):
            prepare(corpus, BytePairs(size, None), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"vocab_size=9000: the training text is too short, it yields \d+"):
        prepare(corpus, BytePairs(9000, None), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_one_line(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be prepared in .*Not a directory") as error:
        prepare(corpus, BytePairs(300, None), tmp_path / "file" / "cache")
    assert "\n" not in str(error.value)


def test_a_corpus_that_changes_meanwhile_is_refused(corpus, tmp_path):
    def say(line: str) -> None:
        if "train:" in line:
            (tmp_path / "test.jsonl").write_text('{"text": "changed"}')

    with pytest.raises(ValueError, match="changed while it was being prepared"):
        prepare(corpus, BytePairs(300, None), tmp_path / "cache", say)


def test_files_of_nothing_or_of_one_line_are_no_corpus_of_three_splits(tmp_path):
    for number, content in enumerate(["", "\n \n", "one line"]):
        path = tmp_path / f"{number}.txt"
        path.write_text(content)
        corpus = TextFiles(str(path), None, None, 0.1, 0.1, None, "text", 0, 0)
        names = "validation and test" if content.strip() else "train, validation and test"
        with pytest.raises(ValueError, match=f"the {names} splits of the corpus are empty: .*") as error:
            prepare(corpus, Bytes(), tmp_path / "cache")
        assert "\n" not in str(error.value)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


@pytest.mark.parametrize("build", [True, False])
def test_too_few_files_to_divide_are_counted_and_the_options_named(tmp_path, build):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    corpus = TextFiles(f"{tmp_path}/[01].txt", None, f"{tmp_path}/2.txt", 1e-9, 0.0, None, "text", 0, 0)
    with pytest.raises(ValueError, match="split of the corpus is empty") as error:
        prepare(corpus, BytePairs(9000, None), tmp_path / "cache", pytest.fail, build=build)
    assert str(error.value) == (
        "the validation split of the corpus is empty: it has documents with text: 2 in train, 0 in validation, "
        "1 in test; raise data.corpus.validation_share (now 1e-09), or name data.corpus.validation_files (now null), "
        "or give data.corpus.document_start (now null)"
    )


def test_what_is_said_of_a_preparation_is_what_is_done(corpus, tmp_path):
    said: list[str] = []
    trained = prepare(corpus, BytePairs(300, None), tmp_path / "cache", said.append)
    assert said[0] == "preparing the corpus: making a dictionary of 300 entries"
    for dictionary, size in ((BytePairs(900, str(trained.folder)), 300), (Bytes(), 258)):
        said.clear()
        prepare(corpus, dictionary, tmp_path / "cache", said.append)
        assert said[0] == f"preparing the corpus: the dictionary has {size} entries"
        assert not any("making" in line for line in said)


def test_one_line_for_each_split_is_a_corpus(tmp_path):
    prepared = prepare(write_documents(tmp_path, train=["ab c"], validation=["a"], test=["b"]), Bytes(), tmp_path / "c")
    assert prepared.tokens["train"].tolist() == [byte + 2 for byte in b"ab c"] + [END]


def test_text_that_is_no_utf_8_leaves_nothing_behind(corpus, tmp_path):
    (tmp_path / "test.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: damaged, or not UTF-8"):
        prepare(open_corpus(tmp_path), Bytes(), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


LONG_LINE = """
import resource, sys
from pathlib import Path
from data.corpora import TextFiles
from data.prepare import prepare
from data.tokenizer import BytePairs
folder = Path(sys.argv[1])
size = int(sys.argv[2])
for name, text in (("train", "ab " * (size // 3)), ("validation", "x" * size), ("test", "it")):
    (folder / f"{name}.txt").write_text(text)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = TextFiles(*(str(folder / f"{name}.txt") for name in ("train", "validation", "test")), 0, 0, None, "text", 0, 0)
prepared = prepare(corpus, BytePairs(259, None), folder / "cache", lambda _: None)
assert prepared.splits["train"]["words"] == size // 3 and prepared.splits["validation"]["words"] == 1
assert prepared.splits["validation"]["bytes"] == size
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("size", [600_000, pytest.param(10_000_000, marks=pytest.mark.long)])
def test_a_line_of_ten_million_characters_is_text_like_any_other(tmp_path, size):
    output, _ = start(LONG_LINE, tmp_path, str(size)).communicate()
    assert int(output) < 1000  # MB more than before
