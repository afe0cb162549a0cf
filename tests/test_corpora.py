import gzip
import hashlib
import json
import lzma
import shutil
import sysconfig
from pathlib import Path

import pytest

from data.corpora import SPLITS, StandardLibrary, TextFiles


def text_files(files, **options) -> TextFiles:
    defaults = dict.fromkeys(("validation_files", "test_files", "document_start"))
    shares = {"validation_share": 0.0, "test_share": 0.0, "text_field": "text"}
    shares |= {"validation_more": 0, "test_more": 0}
    return TextFiles(files, **{**defaults, **shares, **options})


def train(*args, **options) -> list[str]:
    return list(text_files(*args, **options).documents("train"))


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_files_are_read_in_the_order_of_their_paths(tmp_path):
    for number in (2, 1, 0):
        write(tmp_path / f"train.{number}.txt", f"part {number}")
    assert train(str(tmp_path / "*.txt")) == ["part 0", "part 1", "part 2"]


def test_plain_packed_and_jsonl_files_give_the_same_documents(tmp_path):
    text, lines = "naïve\r\n  text\n", json.dumps({"text": "naïve\r\n  text\n", "id": 1}) + "\n\n"
    packers = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
    for end, pack in packers.items():
        assert train(write(tmp_path / f"a.txt{end}", pack(text.encode()))) == [text]
        assert train(write(tmp_path / f"a.jsonl{end}", pack(lines.encode()))) == [text]
    assert train(write(tmp_path / "a.jsonl.txt", lines)) == [lines]


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = "\ufeff"
    assert train(write(tmp_path / "a.txt", f"{mark}a\n{mark}b")) == [f"a\n{mark}b"]
    assert train(write(tmp_path / "a.jsonl", mark + '{"text": "a"}')) == ["a"]


def test_a_list_of_globs_takes_each_file_once(tmp_path, monkeypatch):
    write(tmp_path / "a" / "b" / "1.txt", "one")
    write(tmp_path / "a" / "2.txt", "two")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train(["~/a/**/*.txt", "~/a/2.txt", "~/a/b/../2.txt"]) == ["two", "one"]


def test_a_document_begins_at_each_line_that_matches(tmp_path):
    articles = ["= A =\n\n= = Part = =\nx = 1\n", "= B =\r\ny\r\n", "= C ="]
    path = write(tmp_path / "a.txt", "".join(articles))
    assert train(path, document_start="^= [^=].* =$") == articles
    assert train(path) == ["".join(articles)]


def test_held_out_documents_come_from_their_own_files(tmp_path):
    paths = [write(tmp_path / f"{split}.txt", split) for split in SPLITS]
    corpus = text_files(paths[0], validation_files=paths[1], test_files=[paths[2]], validation_share=0.9)
    assert {split: list(corpus.documents(split)) for split in SPLITS} == {split: [split] for split in SPLITS}


def test_shares_divide_the_documents_without_overlap(tmp_path):
    everything = [f"document {number}" for number in range(3000)]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"body": text}) for text in everything))
    corpus = text_files(path, validation_share=0.1, test_share=0.2, text_field="body")
    splits = {split: list(corpus.documents(split)) for split in SPLITS}
    assert sorted(sum(splits.values(), [])) == sorted(everything)
    # Binomial: standard deviations 16 and 22, so these bounds are five of them wide.
    assert abs(len(splits["validation"]) - 300) < 80 and abs(len(splits["test"]) - 600) < 110
    assert splits == {split: list(corpus.documents(split)) for split in SPLITS}


def test_a_text_that_comes_twice_is_in_one_split(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": f"document {n % 300}"}) for n in range(900)))
    corpus = text_files(path, validation_share=0.2, test_share=0.2)
    splits = [set(corpus.documents(split)) for split in SPLITS]
    assert [len(split) > 20 for split in splits] == [True] * 3
    assert sum(map(len, splits)) == len(set.union(*splits)) == 300


def test_what_stands_in_the_files_of_two_splits_is_in_one(tmp_path):
    """Test before validation before training, and what training files have is not drawn from them either."""
    same = ["two lines\nof it\n", "two lines\r\nof it\r\n", " two  lines\n\nof it"]
    texts = {"train": ["a", "b", "c\n", "d", "a"], "validation": ["b", "e", "b"], "test": ["e\n", "c", "f"]}
    texts = {split: [*found, another] for (split, found), another in zip(texts.items(), same)}
    lines = {split: "\n".join(json.dumps({"text": text}) for text in texts[split]) for split in SPLITS}
    paths = {split: write(tmp_path / f"{split}.jsonl", lines[split]) for split in SPLITS}
    corpus = text_files(paths["train"], validation_files=paths["validation"], test_files=paths["test"])
    splits = {split: list(corpus.documents(split)) for split in SPLITS}
    assert splits == {"train": ["a", "d", "a"], "validation": ["b", "b"], "test": ["e\n", "c", "f", same[2]]}
    drawn = text_files(paths["train"], test_files=paths["test"], validation_share=0.999)
    assert {text for split in SPLITS[:2] for text in drawn.documents(split)} == {"a", "b", "d"}


def test_a_title_of_held_out_files_is_in_no_other_split_whatever_its_text(tmp_path):
    train_files = articles(tmp_path, "train", ["Both", "Shared", *(f"T{number}" for number in range(40))])
    validation = articles(tmp_path, "validation", ["Shared", "V", "Both"], "another text")
    test = articles(tmp_path, "test", ["Both"], "a third text")
    options = {"validation_files": validation, "test_files": test, "document_start": "^= [^=]"}
    corpus = text_files(train_files, validation_more=30, test_more=9, **options)
    titles = {split: [titled(text).strip("= ") for text in corpus.documents(split)] for split in SPLITS}
    assert {split: len(found) for split, found in titles.items()} == {"train": 1, "validation": 32, "test": 10}
    assert titles["validation"][:2] == ["Shared", "V"] and titles["test"][0] == "Both"
    assert sorted(sum(titles.values(), [])) == sorted(["Both", "Shared", "V", *(f"T{number}" for number in range(40))])


def test_equal_files_of_the_standard_library_are_in_one_split(tmp_path, monkeypatch):
    for number in range(200):
        write(tmp_path / f"{number}.py", f"text = {number % 20}\n" + "\n" * (number % 3))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    splits = [list(StandardLibrary(0.2, 0.2).documents(split)) for split in SPLITS]
    assert sum(map(len, splits)) == 200 and min(map(len, splits)) > 0
    assert sum(len({text.strip() for text in split}) for split in splits) == 20


def articles(tmp_path, name: str, titles, body: str = "text") -> str:
    return write(tmp_path / f"{name}.txt", "".join(f"= {title} =\n\n{body} of {title}\n\n" for title in titles))


def test_held_out_splits_are_enlarged_by_titles_of_the_training_files(tmp_path):
    train_files = articles(tmp_path, "train", [f"T{number}" for number in range(200)])
    own = {f"{split}_files": articles(tmp_path, split, [f"{split} {n}" for n in range(3)]) for split in SPLITS[1:]}
    options = {"document_start": "^= [^=]", **own}
    plain = text_files(train_files, **options)
    corpus = text_files(train_files, validation_more=7, test_more=5, **options)
    splits = {split: list(corpus.documents(split)) for split in SPLITS}
    assert {split: len(texts) for split, texts in splits.items()} == {"train": 188, "validation": 10, "test": 8}
    everything = sum((list(plain.documents(split)) for split in SPLITS), [])
    assert sorted(sum(splits.values(), [])) == sorted(everything) and len(set(everything)) == 206
    for split in SPLITS[1:]:
        assert splits[split][:3] == list(plain.documents(split))
    # what is drawn depends on titles alone, not on texts, order or other splits' numbers
    moved = articles(tmp_path, "moved", [f"T{number}" for number in reversed(range(200))], "another text")
    again = text_files(moved, validation_more=7, test_more=0, **options)
    assert {titled(t) for t in again.documents("validation")} == {titled(t) for t in splits["validation"]}
    assert corpus.digest() != plain.digest() != again.digest()


def titled(text: str) -> str:
    return text.split("\n")[0]


def test_documents_of_one_title_stay_together_and_blank_ones_have_none(tmp_path):
    titles = [number // 4 for number in range(80)]
    lines = [json.dumps({"text": f"\n title {title}\nversion {n}"}) for n, title in enumerate(titles)]
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, *[json.dumps({"text": " \n"})] * 9]))
    corpus = text_files(path, validation_more=2, test_more=3)
    splits = [[text.split("\n")[1] for text in corpus.documents(split) if text.strip()] for split in SPLITS]
    assert [len(split) for split in splits] == [60, 8, 12]
    assert sum(len(set(split)) for split in splits) == 20
    with pytest.raises(ValueError, match="validation_more=15 and test_more=6: the training files have but 20 titles"):
        list(text_files(path, validation_more=15, test_more=6).documents("train"))
    with pytest.raises(ValueError, match="validation_more=-1 and test_more=0 must not be negative"):
        text_files(path, validation_more=-1)


def test_titles_are_drawn_in_bounded_memory_as_from_all(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": f"title {n}"}) for n in range(3000)))
    corpus = text_files(path, validation_more=2, test_more=1)
    lowest = sorted(int.from_bytes(hashlib.sha256(f"title {n}".encode()).digest()[:8]) for n in range(3000))[:3]
    assert corpus.drawn == dict(zip(lowest, ["validation", "validation", "test"]))


def test_the_digest_follows_bytes_and_options_but_not_paths(tmp_path):
    first = write(tmp_path / "a.txt", "some text")
    moved = shutil.copy(first, str(tmp_path / "elsewhere.txt"))
    base = text_files(first).digest()
    assert text_files(moved).digest() == base
    assert text_files(write(tmp_path / "b.txt", "some texT")).digest() != base
    assert text_files(shutil.copy(first, str(tmp_path / "a.jsonl"))).digest() != base
    options = {"validation_share": 0.1, "test_share": 0.1, "document_start": "x", "test_files": moved}
    digests = [text_files(first, **{name: value}).digest() for name, value in options.items()]
    assert len({base, *digests}) == 1 + len(options)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"fine\nb\xffd\n", {}, r"a\.txt, line 2: damaged, or not UTF-8: .* invalid start byte"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], {}, r"a\.txt\.gz, line \d: damaged"),
        ("a.txt.gz", b"not packed", {}, r"a\.txt\.gz, line 0: damaged"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-20], {}, r"a\.txt\.xz, line \d: damaged"),
        ("a.txt.xz", b"not packed", {}, r"a\.txt\.xz, line 0: damaged"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', {}, r"a\.jsonl, line 2: must be a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', {}, r"a\.jsonl, line 1: must be .* with a string 'text'"),
        ("a.jsonl", b'["text"]\n', {}, r"a\.jsonl, line 1: must be a JSON object"),
        ("a.jsonl", b'\n{"text": \n', {}, r"a\.jsonl, line 2: must be a JSON object"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "cut\n',
            {},
            r"a\.jsonl, line 2: .*: it is no JSON, or cut off: Unterminated",
        ),
        ("a.jsonl", b"[" * 100_000, {}, r"a\.jsonl, line 1: must be a JSON object"),
        ("a.jsonl", rb'{"text": "\ud800"}', {}, r"a\.jsonl, line 1: must be .* UnicodeEncodeError"),
        ("a.txt", b"x", {"document_start": "("}, r"document_start='\(' is no regular expression"),
        ("a.txt", b"x", {"validation_share": 1.0}, "validation_share=1.0 and test_share=0.0 must be"),
        ("a.txt", b"x", {"test_share": float("nan")}, "validation_share=0.0 and test_share=nan must be"),
        ("a.txt", b"x", {"test_files": "nowhere/*.txt"}, r"no file matches 'nowhere/\*\.txt'"),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(tmp_path, name, content, options, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        train(path, **options)
    assert "\n" not in str(error.value)


def test_a_file_in_two_splits_is_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, name)
    with pytest.raises(ValueError, match=r"b\.txt is named in two splits"):
        text_files(str(tmp_path / "*.txt"), test_files=str(tmp_path / "." / "b.txt"))


def test_the_standard_library_is_source_text_that_people_wrote(tmp_path, monkeypatch):
    kept = {"argparse.py", "json/decoder.py", "unittest/case.py", "html/parser.py", "testing.py"}
    left_out = {"test/test_os.py", "ctypes/test/a.py", "idlelib/idle_test/a.py", "site-packages/torch/a.py"}
    left_out |= {"encodings/cp037.py", "pydoc_data/topics.py", "html/entities.py", "_sysconfigdata__linux.py"}
    left_out |= {"__pycache__/a.py", "lib-dynload/a.py", "config-3.11-x86/a.py", "stringprep.py", "notes.txt"}
    for name in kept | left_out:
        write(tmp_path / name, name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(StandardLibrary(0.0, 0.0).documents("train")) == sorted(kept)


def test_the_real_standard_library_has_each_file_in_one_split():
    corpus = StandardLibrary(0.03, 0.03)
    sizes = {split: len(list(corpus.documents(split))) for split in SPLITS}
    assert sum(sizes.values()) == len(corpus.paths) and sizes["train"] > 300
    assert min(sizes.values()) > 0
    assert corpus.digest() == StandardLibrary(0.03, 0.03).digest() != StandardLibrary(0.02, 0.03).digest()


def test_a_standard_library_without_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="holds no source text"):
        StandardLibrary(0.1, 0.1)


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in ("10", "9", "1", "01"):
        (tmp_path / f"part.{number}.txt").write_text(f"number {number}")
    held_out = tmp_path / "held"
    held_out.write_text("held out")
    corpus = TextFiles(f"{tmp_path}/part.*.txt", str(held_out), None, 0.0, 0.0, None, "text", 0, 0)
    assert list(corpus.documents("train")) == ["number 01", "number 1", "number 9", "number 10"]
