import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import compose_config
from tokenizers import Tokenizer, models, pre_tokenizers

import data.dictionary_files
from data.corpora import Segment
from data.encoding import Encoder
from data.prepare import prepare
from data.tokenizer import BEGIN, END, BytePairs, Bytes, decode, encode, load_tokenizer, train_tokenizer, units
from data.words import Words
from training.checkpoint import load_run
from training.job import FINISHED, run
from training.preflight import read
from training.targets import target

TEXT = "the cat sat.\nThe cat, the end\n the <|end|> of <unk>"


class Told:
    """A corpus of these documents in each split."""

    def __init__(self, *documents):
        self.told = documents

    def documents(self, split):
        return iter(self.told)

    def digest(self):
        return repr(self.told)


def corpus_of(settings):
    kind, options = target(settings.data.corpus)
    return kind(**options)


def entries(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(place) for place in range(tokenizer.get_vocab_size())]


def test_a_byte_is_its_own_token():
    tokenizer = Bytes().make([])
    everything = "".join(map(chr, range(1, 0x250))) + "東京 😀\r\n <|end|>"
    assert encode(tokenizer, everything) == [byte + 2 for byte in everything.encode()]
    assert decode(tokenizer, encode(tokenizer, everything)) == everything
    assert tokenizer.get_vocab_size() == Bytes().size() == 258


def test_words_are_those_of_the_text_by_falling_frequency():
    tokenizer = Words(None, 1, True, None).make([TEXT])
    own = ["<|end|> ", "<|begin|> ", "<unk>", "\n"]
    # 3 the, 2 of each of these marks and words, 1 of the rest: equals by the alphabet; \n is one of the four
    assert entries(tokenizer) == [*own, "the", "<", ">", "cat", "end", "|", ",", ".", "The", "of", "sat", "unk"]
    ids = encode(tokenizer, "the cat\n\nran.")
    assert [tokenizer.id_to_token(i) for i in ids] == ["the", "cat", "\n", "\n", "<unk>", "."]


def test_words_can_be_what_stands_between_spaces():
    tokenizer = Words(None, 1, False, None).make([TEXT])
    assert entries(tokenizer)[4:] == ["the", "<|end|>", "The", "cat", "cat,", "end", "of", "sat."]
    ids = encode(tokenizer, "<|end|> <unk> <|begin|>\r\n")
    assert END not in ids and BEGIN not in ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["<|end|>", "<unk>", "<unk>", "\n"]


def test_a_dictionary_of_words_is_limited_by_count_and_by_size():
    often = Words(None, 2, True, None).make([TEXT])
    assert entries(often)[4:] == ["the", "<", ">", "cat", "end", "|"]
    assert entries(Words(7, 1, True, None).make([TEXT]))[4:] == ["the", "<", ">"]
    assert often.to_str() == Words(None, 2, True, None).make([TEXT[:20], TEXT[20:]]).to_str()
    with pytest.raises(ValueError, match="tokenizer.min_count=9: no word of the training split is that frequent"):
        Words(None, 9, True, None).make([TEXT])
    for options, message in (((4, 1), "tokenizer.max_size must be at least 5"), ((None, 0), "tokenizer.min_count")):
        with pytest.raises(ValueError, match=message):
            Words(*options, True, None)


def test_words_are_counted_alike_whether_remembered_or_not(monkeypatch):
    whole = Words(None, 2, True, None).make([TEXT, TEXT]).to_str()
    monkeypatch.setattr("data.words.REMEMBERED", 3)
    assert Words(None, 2, True, None).make([TEXT, TEXT]).to_str() == whole


def odd_texts(number: int) -> list[str]:
    """Of letters, marks and blanks of every kind."""
    draw = random.Random(0)
    blanks = [" "] * 6 + ["\n", "\t", "\r\n", "  ", "\x1c", "\x85", "\xa0", "\u3000"]
    words = ["a", "it's", "don't", "x=1;", "naïve", "東京", "12", "...", "\u0301", "<unk>", "😀"]
    return ["".join(draw.choice(draw.choice([words, blanks])) for _ in range(30)) for _ in range(number)]


@pytest.mark.parametrize("spaces", ["of every kind", "single"])
def test_units_encode_as_the_whole_does(spaces, monkeypatch):
    texts = odd_texts(300) if spaces != "single" else [" ".join(text.split()) for text in odd_texts(300)]
    dictionaries = [train_tokenizer(texts, 300), Words(None, 2, True, None).make(texts)]
    dictionaries += [Words(None, 2, False, None).make(texts), Bytes().make([])]
    monkeypatch.setattr("data.encoding.REMEMBERED", 50)
    for tokenizer in dictionaries:
        for text, ids in zip(texts, Encoder(tokenizer)(texts)):
            assert "".join(units(text)) == text
            assert ids.tolist() == encode(tokenizer, text)


def test_what_counts_stands_on_disk_beside_the_tokens(tmp_path):
    dialogue = (Segment("ab ", False), Segment("c d", True), Segment("e", False), Segment("", True))
    prepared = prepare(Told(dialogue, "f g", (Segment("h", False),)), Bytes(), tmp_path)
    ids = [byte + 2 for byte in b"ab c de"] + [END] + [byte + 2 for byte in b"f g"] + [END, ord("h") + 2, END]
    counted = [False] * 3 + [True] * 3 + [False, True] + [True] * 4 + [False] * 2
    for split in ("train", "validation", "test"):
        assert prepared.tokens[split].tolist() == ids and prepared.counted[split].tolist() == counted
        figures = prepared.splits[split]
        assert [figures[key] for key in ("documents", "tokens", "counted", "words", "bytes")] == [3, 14, 8, 4, 6]
    assert prepared.token_counts.sum() == 14  # routers see context too
    shares = torch.tensor([1, 2, 1, 1, 1, 2]) / 8  # c, space, d, f, g, end
    assert figures["unigram_entropy"] == pytest.approx(float(-(shares * shares.log()).sum()), abs=1e-6)
    plain = prepare(Told("ab c de", "f g", "h"), Bytes(), tmp_path)
    assert plain.counted == {} and plain.fingerprint != prepared.fingerprint
    assert plain.tokens["train"].tolist() == ids


def test_a_mask_is_verified_as_all_files_are(tmp_path):
    corpus = Told((Segment("ab", False), Segment("c", True)))
    prepared = prepare(corpus, Bytes(), tmp_path)
    path = prepared.folder / "test.counted.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\0")
    said: list[str] = []
    assert prepare(corpus, Bytes(), tmp_path, said.append).folder == prepared.folder
    assert "test.counted.npy is damaged" in said[0] and path.read_bytes() == content


def test_a_split_without_a_token_that_counts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the test split of the corpus has no token that counts"):
        prepare(Told((Segment("ab", False),)), Bytes(), tmp_path)


# dictionaries made before


def words_of(folder: Path, cache: Path) -> str:
    """tokenizer.file: the folder of a corpus prepared with words."""
    return str(prepare(Told(TEXT), Words(None, 1, True, None), cache).folder)


@pytest.fixture
def finished(tiny, tmp_path) -> Path:
    """A finished run with a dictionary of words."""
    assert run(compose_config("router=dense", *tiny, "tokenizer=words", "tokenizer.min_count=1")) == FINISHED
    return next((tmp_path / "runs").glob("dense-*"))


def test_everything_has_the_size_that_the_text_tells_and_a_runs_dictionary_serves_another_corpus(finished, tmp_path):
    loaded = load_run(finished)
    size = len(entries(load_tokenizer(loaded.prepared.folder)))
    assert loaded.prepared.vocab_size == loaded.result["vocab_size"] == size != loaded.settings.data.vocab_size
    assert loaded.model.embedding.shape[0] == len(loaded.prepared.token_counts) == size
    assert f"dictionary of {size:,} entries" in (finished / "console.log").read_text()
    key, prepared = json.loads((finished / "provenance.json").read_text())["data"], loaded.prepared.folder
    assert prepared.name == key["cache_key"]
    dictionary = (prepared / "tokenizer.json").read_bytes()
    for file in (finished, prepared, prepared / "tokenizer.json"):
        words = Words(None, 3, False, str(file))
        other = prepare(Told(TEXT), words, tmp_path / "other")
        assert (other.folder / "tokenizer.json").read_bytes() == dictionary
        assert other.vocab_size == words.size() == key["vocab_size"]
        assert words.digest() == Words(99, 1, True, str(prepared)).digest() != Words(None, 3, False, None).digest()


def test_a_file_that_is_no_dictionary_or_anothers_is_refused_in_one_line(tmp_path):
    cache = tmp_path / "cache"
    words = words_of(tmp_path, cache)
    (tmp_path / "text").write_text("no\ndictionary")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "provenance.json").write_text("{}")
    other = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    other.save(str(tmp_path / "other.json"))
    few = Tokenizer(models.BPE({"<|end|>": 0, "<|begin|>": 1, "a": 2}, []))
    few.pre_tokenizer = pre_tokenizers.ByteLevel()
    few.save(str(tmp_path / "few.json"))
    gap = Tokenizer(models.WordLevel({"<|end|> ": 0, "<|begin|> ": 1, "a": 7}, "a"))
    gap.save(str(tmp_path / "gap.json"))
    refused = [
        (words, BytePairs, "must hold a BPE dictionary; .* does not"),
        (f"{tmp_path}/nothing", BytePairs, "no dictionary that can be read"),
        (f"{tmp_path}/text", BytePairs, "no dictionary that can be read"),
        (f"{tmp_path}/cache", BytePairs, "no dictionary that can be read"),
        (f"{tmp_path}/broken", BytePairs, "is no whole run folder"),
        (f"{tmp_path}/other.json", BytePairs, r"must have <\|end\|> as id 0 and <\|begin\|> as id 1"),
        (f"{tmp_path}/few.json", BytePairs, "must have an entry for each of the 256 bytes"),
        (f"{tmp_path}/gap.json", Words, "must have ids from 0 to 2 without a gap"),
    ]
    for file, kind, message in refused:
        with pytest.raises(ValueError, match=f"tokenizer.file={file}.* {message}") as error:
            kind(300, file) if kind is BytePairs else kind(None, 1, True, file)
        assert "\n" not in str(error.value)
    path = Path(words) / "tokenizer.json"
    path.write_text(path.read_text().replace("cat", "cad"))
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        Words(None, 1, True, str(path))
    assert data.dictionary_files.find_dictionary(words) == path


def changed(made: Tokenizer, path: Path, **parts) -> str:
    """The file of a dictionary with other parts: of its model, or beside it."""
    content = json.loads(made.to_str())
    for name, value in parts.items():
        (content["model"] if name in content["model"] else content)[name] = value
    path.write_text(json.dumps(content))
    return str(path)


LOWER, SPACES = {"type": "Lowercase"}, {"type": "WhitespaceSplit"}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ADDED = {"content": "the cat", "special": False, "single_word": False, "lstrip": True, "rstrip": False}
OTHERWISE = [  # what would drop text, change it, or encode units otherwise than the whole
    (BytePairs, {"pre_tokenizer": None}, "cut text as those made here do"),
    (BytePairs, {"pre_tokenizer": LEVEL | {"add_prefix_space": True}}, "cut text as those made here do"),
    (BytePairs, {"pre_tokenizer": LEVEL | {"use_regex": False}}, "cut text as those made here do"),
    (BytePairs, {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPACES, LEVEL]}}, "cut text as those"),
    (BytePairs, {"normalizer": LOWER}, "change no text"),
    (BytePairs, {"end_of_word_suffix": "</w>"}, "have no dropout, continuing_subword_prefix, end_of_word_suffix"),
    (BytePairs, {"dropout": 0.5}, "have no dropout"),
    (BytePairs, {"added_tokens": [ADDED | {"id": 5, "normalized": False}]}, "have no added token besides special ones"),
    (Words, {"pre_tokenizer": None}, "cut text as those made here do"),
    (Words, {"pre_tokenizer": SPACES}, "cut text as those made here do"),
    (Words, {"normalizer": LOWER}, "change no text"),
    (Words, {"unk_token": "[UNK]"}, r"have an entry for its unknown word \[UNK\]"),
]


@pytest.mark.parametrize(("kind", "parts", "rule"), OTHERWISE)
def test_a_loaded_dictionary_never_drops_or_changes_text(kind, parts, rule, tmp_path):
    options = (300,) if kind is BytePairs else (None, 1, True)
    texts = odd_texts(50)
    made = kind(*options, None).make([*texts, "the cat"])
    same = kind(*options, changed(made, tmp_path / "same.json")).make([])
    assert all(ids.tolist() == encode(made, text) for text, ids in zip(texts, Encoder(same)(texts)))
    file = changed(made, tmp_path / "other.json", **parts)
    with pytest.raises(ValueError, match=f"tokenizer.file={file} must .*{rule}") as error:
        kind(*options, file)
    assert "\n" not in str(error.value)


# sizes that only the text tells, and figures by another way


def test_a_router_that_the_real_size_does_not_suit_ends_in_one_line(tiny, run_here):
    words = ["router=hash_balanced", "tokenizer=words", "tokenizer.max_size=6", "num_experts=8"]
    read(compose_config(*tiny, *words))  # nothing is known yet
    status, _, said = run_here(*tiny, *words)
    assert (status, said) == (2, "error: num_experts must be at most the dictionary's 6; got 8\n")


@pytest.mark.parametrize("tokenizer", ["bpe", "words", pytest.param("bytes", marks=pytest.mark.long)])
def test_figures_per_word_and_byte_are_those_of_the_decoded_text(tokenizer, tiny, tmp_path):
    more = ["tokenizer.max_size=40"] if tokenizer == "words" else []
    assert run(compose_config("router=dense", *tiny, f"tokenizer={tokenizer}", *more)) == FINISHED
    loaded = load_run(next((tmp_path / "runs").glob("dense-*")))
    result, prepared = loaded.result, loaded.prepared
    library, name = load_tokenizer(prepared.folder), loaded.settings.data.sequence_length
    for key, split in (("val", "validation"), ("test", "test")):
        stream = torch.from_numpy(prepared.tokens[split].astype(int))
        sums = []
        for start in range(0, len(stream) - 1, name):  # window by window, without the batches
            window = stream[start : start + name + 1]
            scores = plain_scores(loaded.model, window[:-1])
            sums.append(-scores.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]].sum())
        nats = float(sum(sums)) / (len(stream) - 1) * len(stream)  # the first token at the mean price
        if tokenizer == "words":  # the unknown words are not to be had from their tokens
            text = list(corpus_of(loaded.settings).documents(split))
            unknown = sum(i == 2 for i in stream.tolist())
            assert result[f"{key}/unknown_share"] == pytest.approx(unknown / len(stream)) and unknown > 0
        else:
            text = [decode(library, part) for part in documents_of(stream.tolist())]
            assert result[f"{key}/unknown_share"] == 0
        words, size = sum(len(each.split()) for each in text), sum(len(each.encode()) for each in text)
        assert result[f"{key}/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
        assert result[f"{key}/word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-3)


def test_figures_of_a_dialogue_are_those_of_its_responses(tiny, tmp_path):
    talk = [[["A", f"ask {n}"], ["B", f"say {n} ö"], ["A", "go on"], ["B", "no" * (n % 3 + 1)]] for n in range(60)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in talk))
    words = [word for word in tiny if not word.startswith(("data=", "data.corpus.files"))] + ["data=dialogue"]
    words += [f"data.corpus.files={tmp_path}/*.jsonl", "data.sequence_length=80", "tokenizer=bytes", "train.steps=2"]
    assert run(compose_config("router=dense", *words)) == FINISHED
    loaded = load_run(next((tmp_path / "runs").glob("dense-*")))
    tokenizer, nats, responses, said = load_tokenizer(loaded.prepared.folder), 0.0, 0, []
    for part in filter(None, documents_of(loaded.prepared.tokens["test"].tolist())):
        text = decode(tokenizer, part)
        ids = torch.tensor([byte + 2 for byte in text.encode()] + [END])
        spans = [match.span(1) for match in re.finditer(rb"\[2\]( [^\n]*\n?)", text.encode())]  # the other's turns
        places = [place for first, last in spans for place in range(first, last)] + [len(ids) - 1]
        scores = plain_scores(loaded.model, ids[:-1]).log_softmax(-1)
        nats -= float(sum(scores[place - 1, ids[place]] for place in places))
        responses += len(places)
        said += [text.encode()[first:last].decode() for first, last in spans]
    result, bytes_said = loaded.result, len("".join(said).encode())
    assert result["test/tokens"] == responses
    assert result["test/ce"] == pytest.approx(nats / responses, rel=1e-4)
    assert result["test/bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_said, rel=1e-4)
    assert result["test/word_perplexity"] == pytest.approx(math.exp(nats / len(" ".join(said).split())), rel=1e-3)


def documents_of(stream: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in stream:
        if token == END:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def plain_scores(model, ids: torch.Tensor) -> torch.Tensor:
    from data.batches import make_batch

    window = torch.cat([ids, ids[-1:]])[None]
    real = torch.ones(1, len(ids), dtype=torch.bool)
    batch = make_batch(window, torch.zeros_like(window), real, torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        return model(batch.tokens).logits[0].double()
