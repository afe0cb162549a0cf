"""Corpora of the hub, through `datasets` itself, from files of exactly their schema (tests/fixtures/hub.json)."""

import importlib.util
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, compose_config
from omegaconf import OmegaConf

import data.hub
from data import comment_trees
from data.corpora import SPLITS
from data.dialogue import Form
from data.hub import HubFiles
from data.prepare import prepare
from data.tokenizer import Bytes
from training.preflight import read
from training.targets import target

FIXTURES = json.loads((Path(__file__).parent / "fixtures" / "hub.json").read_text())
DRAWN = {"openwebtext": SPLITS[1:], "fineweb_edu": SPLITS[1:], "cc100_en": SPLITS[1:], "reddit": SPLITS[1:]}
DRAWN |= {"convai2": ("test",), "wizard_of_wikipedia": ("test",)}
PLAIN = ["wikitext103", "openwebtext", "fineweb_edu", "cc100_en"]


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """A folder for each set with the hub's files: same names, columns and types."""
    from datasets import Dataset, Features, disable_progress_bars

    disable_progress_bars()
    folder = tmp_path_factory.mktemp("hub")
    for name, fixture in FIXTURES.items():
        features = Features.from_dict(fixture["features"])
        for path, rows in fixture["rows"].items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            columns = {column: [row.get(column) for row in rows] for column in features}
            Dataset.from_dict(columns, features).to_parquet(folder / name / path)
    return folder


@pytest.fixture
def corpus_of(hub, tmp_path):
    def make(name: str, **options):
        config = OmegaConf.create({"data": OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml")})
        config.data.cache, config.data.corpus.repository = str(tmp_path), str(hub / name)
        for split in DRAWN.get(name, ()):  # enough of the few documents there are
            config.data.corpus[f"{split}_share"] = 0.2
        made, given = target(OmegaConf.to_container(config.data.corpus, resolve=True))
        return made(**given | options)

    return make


def text(document) -> str:
    return document if isinstance(document, str) else "".join(segment.text for segment in document)


def documents(corpus) -> dict[str, list]:
    return {split: list(corpus.documents(split)) for split in SPLITS}


@pytest.mark.parametrize("name", FIXTURES)
def test_every_set_has_three_splits_without_a_document_in_two(name, corpus_of):
    splits = documents(corpus_of(name))
    texts = {split: list(map(text, found)) for split, found in splits.items()}
    assert min(map(len, texts.values())) > 0
    assert len(set(sum(texts.values(), []))) == len(sum(texts.values(), []))
    for document in sum(splits.values(), []):
        assert isinstance(document, str) == (name in PLAIN)
        assert isinstance(document, str) or any(segment.counted for segment in document)
    if name in ("reddit", "wizard_of_wikipedia"):  # several dialogues that begin with the same turn
        begins = {split: {found_text.split("\n")[0] for found_text in found} for split, found in texts.items()}
        assert sum(map(len, begins.values())) == len(set().union(*begins.values()))


def test_a_text_of_other_line_ends_is_the_same_text(corpus_of, monkeypatch):
    texts = ["one\ntwo\n", "one\r\ntwo\r\n", "one  two"]
    rows = {split: [{"text": text}, {"text": split}] for split, text in zip(SPLITS, texts)}
    monkeypatch.setattr(HubFiles, "rows", lambda self, split: rows[split])
    corpus = corpus_of("wikitext103", document_start=None)
    assert documents(corpus) == {"train": ["train"], "validation": ["validation"], "test": [texts[2], "test"]}


@pytest.mark.parametrize("name", ["wikitext103", "bst"])
def test_what_stands_in_the_files_of_two_splits_is_left_out_of_training(name, corpus_of):
    corpus = corpus_of(name)
    files = corpus.files["validation"]
    again = corpus_of(name, files=corpus.files | {"train": "**/*.parquet", "validation": files})
    texts = [
        {split: [text(d).strip() for d in found] for split, found in documents(c).items()} for c in (corpus, again)
    ]
    assert texts[0] == texts[1]


def test_articles_begin_at_their_titles_and_blank_lines_come_back(corpus_of):
    lamp, door, roof = corpus_of("wikitext103").documents("train")
    assert door.startswith(" = Door = \n \n Door is a word . \n = = Use = = \n") and roof.startswith(" = Roof = ")
    assert lamp.startswith(" = Lamp = \n")  # the blank line before the first title is no article


def test_paragraphs_are_joined_up_to_a_blank_row_across_files(corpus_of):
    corpus = corpus_of("cc100_en", validation_share=0.0, test_share=0.0)
    assert list(corpus.documents("train")) == [f"Paragraph one of {n}.\nParagraph two of {n}.\n" for n in range(40)]


FIRST = {  # the first dialogue of training, and which of its turns are responses
    "bst": "[1] Hello train 0.\n[2]* Hi.\n[1] Do you row?\n[2]* Never.\n[1] Why?\n[2]* Too wet.",
    "convai2": "[1] hi train 0 .\n[2]* hello .\n[1] what do you bake ?\n[2]* bread .",
    "wizard_of_wikipedia": "[1] I like tea train 0.\n[2]* Tea is a leaf.",
    "empathetic_dialogues": "[1] I won, train 0.\n[2]* Well done.\n[1] Thanks, you.",
    "daily_dialog": "[1] Tea , train 0 ?\n[2]* Yes .\n[1] With milk ?\n[2]* No .",
    "reddit": "[1] Thread 0: who is in?\n[2]* I am.\n[1]* Good.",
}


@pytest.mark.parametrize("name", FIRST)
def test_rows_become_the_dialogue_that_they_hold(name, corpus_of):
    shares = {"validation_share": 0.0, "test_share": 0.0}
    first, second, *_ = corpus_of(name, **shares).documents("train")
    assert "".join("*" * segment.counted + segment.text for segment in first) == FIRST[name]
    if name == "wizard_of_wikipedia":
        counted = [segment.text for segment in second if segment.counted]
        assert text(second).count("Tea is a leaf.") == 1 and counted == [" Yes, the same leaf."]
    if name == "reddit":
        assert text(second) == "[1] Thread 0: who is in?\n[2] Not me."


def test_a_stopped_copy_goes_on_from_where_it_was(corpus_of, monkeypatch, tmp_path, capsys):
    whole = list(corpus_of("fineweb_edu", cache=str(tmp_path / "whole")).documents("train"))
    monkeypatch.setattr(data.hub, "SAVE_EVERY", 7)
    counted, breaks = [], [30, 60]
    count = data.hub.count_characters

    def breaking(row):
        counted.extend([row] if isinstance(row, dict) else [])
        if breaks and len(counted) == breaks[0]:
            breaks.pop(0)
            raise OSError("the line is dead\nand buried")
        return count(row)

    monkeypatch.setattr(data.hub, "count_characters", breaking)
    corpus = corpus_of("fineweb_edu")
    for rows in (30, 58):  # 28 were noted before the first break, and the second comes 30 rows later
        broke = rf"the stream broke after {rows} rows of train; start again and it goes on: OSError: the line is dead$"
        with pytest.raises(ValueError, match=broke):
            list(corpus.documents("train"))
    assert list(corpus.documents("train")) == whole
    assert "from row 28 on" in capsys.readouterr().out and len(counted) < 80 + 2 * 7
    monkeypatch.setattr(data.hub, "_library", lambda: pytest.fail("a finished copy needs no library"))
    assert list(corpus_of("fineweb_edu").documents("train")) == whole


def test_a_killed_copy_goes_on_and_its_torn_end_is_cut_off(corpus_of, monkeypatch, tmp_path):
    whole = list(corpus_of("openwebtext", cache=str(tmp_path / "whole")).documents("train"))
    monkeypatch.setattr(data.hub, "SAVE_EVERY", 7)
    corpus = corpus_of("openwebtext")

    def killed(row):
        if row["text"].startswith("Page 50."):
            raise SystemExit  # nothing handles it, so nothing is noted
        return len(row["text"])

    monkeypatch.setattr(data.hub, "count_characters", killed)
    with pytest.raises(SystemExit):
        list(corpus.documents("train"))
    [rows] = tmp_path.glob("hub/*/train.jsonl")
    with rows.open("ab") as file:
        file.write(b'{"text": "Page 5')
    monkeypatch.setattr(data.hub, "count_characters", lambda row: len(row["text"]))
    assert list(corpus.documents("train")) == whole


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1  # a letter becomes another one: the line stays JSON
    {
        "flip": lambda: path.write_bytes(content),
        "cut": lambda: os.truncate(path, len(content) // 3),
        "missing": path.unlink,
    }[how]()


@pytest.mark.parametrize("how", ["flip", "cut", "missing"])
def test_a_half_made_copy_that_is_damaged_is_made_anew(how, corpus_of, monkeypatch, tmp_path, capsys):
    whole = list(corpus_of("openwebtext", cache=str(tmp_path / "whole")).documents("train"))
    monkeypatch.setattr(data.hub, "SAVE_EVERY", 7)
    corpus, count = corpus_of("openwebtext"), data.hub.count_characters

    def killed(row):
        if row["text"].startswith("Page 50."):
            raise SystemExit
        return len(row["text"])

    monkeypatch.setattr(data.hub, "count_characters", killed)
    with pytest.raises(SystemExit):
        list(corpus.documents("train"))
    [rows] = tmp_path.glob("hub/*/train.jsonl")
    damage(rows, how)
    monkeypatch.setattr(data.hub, "count_characters", count)
    capsys.readouterr()
    assert list(corpus.documents("train")) == whole
    assert "from row 0 on" in capsys.readouterr().out
    assert list(corpus_of("openwebtext").documents("train")) == whole
    assert "copying" not in capsys.readouterr().out  # what was sealed is what is there


def test_of_a_branch_the_commit_is_named_and_noted_and_of_a_pin_nothing(corpus_of, hub, tmp_path, capsys, monkeypatch):
    corpus = corpus_of("bst", revision="refs/convert/parquet")
    stream = corpus.source._stream
    monkeypatch.setattr(HubFiles, "_commit", lambda self: "c" * 40)
    monkeypatch.setattr(HubFiles, "_stream", lambda self, split, commit: stream(split, ""))
    list(corpus.documents("test"))
    assert f"refs/convert/parquet is a branch; the same rows elsewhere: data.corpus.revision={'c' * 40}\n" in (
        capsys.readouterr().out
    )
    [note] = tmp_path.glob("hub/*/test.json")
    assert json.loads(note.read_text())["commit"] == "c" * 40
    list(corpus_of("bst", revision="c" * 40).documents("test"))
    assert "is a branch" not in capsys.readouterr().out


def test_a_damaged_copy_is_made_again(corpus_of, tmp_path, capsys):
    corpus = corpus_of("bst")
    before = documents(corpus)
    [rows] = tmp_path.glob("hub/*/test.jsonl")
    rows.write_bytes(rows.read_bytes().replace(b"Never", b"Maybe", 1))
    capsys.readouterr()
    assert documents(corpus) == before
    assert capsys.readouterr().out.count("copying the test rows") == 1


def test_no_more_is_copied_than_the_budget(corpus_of, tmp_path):
    size = len("Lesson 0: water boils.") + len("<urn:uuid:0-0>")
    corpus = corpus_of("fineweb_edu", characters=10 * size, validation_share=0.0, test_share=0.0)
    assert 10 <= len(list(corpus.documents("train"))) <= 17
    [rows] = tmp_path.glob("hub/*/train.jsonl")
    lessons = [json.loads(line) for line in rows.read_text().splitlines()]
    total = sum(len(row["text"]) for row in lessons)
    assert list(lessons[0]) == ["text"] and total - 23 < 10 * size <= total


def test_the_digest_names_what_was_asked_for_and_of_a_folder_its_files(corpus_of, hub, tmp_path):
    def source(**changes) -> str:
        files = {"train": "a/*.parquet", "validation": None, "test": None}
        options = {
            "repository": "org/name",
            "revision": "main",
            "files": files,
            "columns": ["text"],
            "characters": None,
        }
        return HubFiles(**options | {"folder": tmp_path} | changes).digest()

    changes = [{"repository": "org/other"}, {"revision": "0" * 40}, {"columns": ["body"]}, {"characters": 5}]
    changes += [{"files": {"train": "a/*.parquet", "validation": "b", "test": None}}, {"repository": str(hub / "bst")}]
    assert len({source(), *(source(**change) for change in changes)}) == len(changes) + 1
    assert source(folder=tmp_path / "elsewhere") == source()
    options = [{}, {"responses": "all"}, {"max_turns": 5}, {"mark": "{}:"}, {"test_share": 0.1}, {"characters": 99}]
    digests = [corpus_of("convai2", **option).digest() for option in options]
    assert len(set(digests)) == len(digests)
    plain = [{}, {"empty_row": "x"}, {"blank_row_ends": True, "document_start": None}, {"document_start": None}]
    assert len({corpus_of("wikitext103", **option).digest() for option in plain}) == len(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": {"train": "nowhere/*.parquet", "validation": None, "test": None}}, "must have files nowhere/"),
        ({"text_field": "body"}, "with the columns body: ValueError: Column name"),
        ({"files": {"train": None, "validation": None, "test": None}}, "files must name train, validation and test"),
        ({"characters": 0}, "data.corpus.characters must be at least 1 or null; got 0"),
        ({"document_start": "("}, r"document_start='\(' is no regular expression"),
        ({"blank_row_ends": True}, "document_start and blank_row_ends exclude each other"),
        ({"validation_share": 2.0}, "validation_share=2.0 and test_share=0.0 must be"),
    ],
)
def test_bad_options_are_one_line_that_names_the_rule(options, message, corpus_of):
    with pytest.raises(ValueError, match=message) as error:
        list(corpus_of("wikitext103", **options).documents("train"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"HF_HUB_OFFLINE": True}, {"ENDPOINT": "http://127.0.0.1:9"}])
def test_offline_ends_at_once_with_a_line_that_says_what_to_do(change, corpus_of, monkeypatch):
    """Forbidden (as the variable of that name does), and unreachable: nothing listens there."""
    from huggingface_hub import constants

    for name, value in change.items():
        monkeypatch.setattr(constants, name, value)
    corpus = corpus_of("bst", repository="ParlAI/blended_skill_talk")
    with pytest.raises(
        ValueError, match="^ParlAI/blended_skill_talk at d7b0093.* data.corpus.repository=FOLDER"
    ) as error:
        list(corpus.documents("train"))
    assert "\n" not in str(error.value)


def test_without_the_library_one_line_says_how_to_get_it(corpus_of, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the library datasets: .*pip install -e '.\[hub\]'"):
        list(corpus_of("bst").documents("train"))


def test_no_yaml_of_the_hub_runs_code_or_leaves_its_revision_open():
    for name in FIXTURES:
        corpus = OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml").corpus
        pinned = len(corpus.revision) == 40 and set(corpus.revision) <= set("0123456789abcdef")
        assert pinned or corpus.revision == "refs/convert/parquet", name
        assert all(glob is None or glob.endswith(".parquet") for glob in corpus.files.values())
    assert "trust_remote_code" not in (ROOT / "data" / "hub.py").read_text()


def comment(name: str, parent: str, thread: str = "t3_t", author: str | None = None, body: str = "x") -> dict:
    return {"id": name, "parent_id": parent, "link_id": thread, "author": author or name, "body": f"{body} {name}"}


THREAD = [comment("a", "t3_t"), comment("b", "t1_a"), comment("c", "t1_a"), comment("d", "t1_b"), comment("e", "t3_t")]
FORKED = [*THREAD, comment("g", "t1_b"), comment("h", "t1_g")]  # below the root as well


def test_paths_go_from_roots_to_leaves_and_count_each_comment_once():
    found = [(thread, [turn.text for turn in path]) for thread, path in comment_trees.dialogues(lambda: THREAD)]
    assert found == [("t3_t", ["x a", "x b", "x d"]), ("t3_t", ["x a", "x c"]), ("t3_t", ["x e"])]
    paths = [path for _, path in comment_trees.dialogues(lambda: THREAD)]
    made = [document for path in paths for document in Form("all", None, "[{}]").documents(path)]
    counted = Counter(segment.text.strip() for document in made for segment in document if segment.counted)
    assert counted == {"x b": 1, "x d": 1, "x c": 1}


def test_a_comment_on_several_paths_counts_on_the_first_alone():
    paths = [path for _, path in comment_trees.dialogues(lambda: FORKED)]
    assert ["".join(turn.text[-1] for turn in path) for path in paths] == ["abd", "abgh", "ac", "e"]
    assert ["".join(turn.text[-1] for turn in path if not turn.again) for path in paths] == ["abd", "gh", "c", "e"]
    made = [document for path in paths for document in Form("all", None, "[{}]").documents(path)]
    counted = [segment.text.strip() for document in made for segment in document if segment.counted]
    assert [word[-1] for text in counted for word in text.splitlines()] == list("bdghc")


def test_what_answers_a_deleted_or_missing_comment_begins_a_path_of_its_own():
    gone = comment("b", "t1_a") | {"body": "[removed]"}
    rows = [THREAD[0], gone, *THREAD[2:4], comment("f", "t1_elsewhere", author="[deleted]")]
    paths = [[turn.text for turn in path] for _, path in comment_trees.dialogues(lambda: rows)]
    assert paths == [["x a", "x c"], ["x d"], ["x f"]]
    turns = [comment("g", "t3_t", author="[deleted]"), comment("h", "t1_g", author="[deleted]")]
    [(_, path)] = comment_trees.dialogues(lambda: turns)
    assert path[0].speaker != path[1].speaker


def test_a_part_of_the_threads_at_a_time_gives_the_same_paths(monkeypatch):
    rows = [row | {"link_id": f"t3_{n}"} for row in THREAD for n in range(20)]
    whole = list(comment_trees.dialogues(lambda: rows))
    monkeypatch.setattr(comment_trees, "PART", 100)
    parted = list(comment_trees.dialogues(lambda: rows))
    assert Counter(map(str, whole)) == Counter(map(str, parted)) and len(whole) == 60
    depth = [comment(str(n), f"t1_{n - 1}") for n in range(5000)]
    [(_, path)] = comment_trees.dialogues(lambda: depth)
    assert len(path) == 5000


def test_every_yaml_is_named_in_readme_and_composes_to_settings():
    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "conf" / "data").glob("*.yaml")):
        assert f"`{path.stem}`" in readme or f"`data={path.stem}`" in readme, path.stem
    for name in FIXTURES:
        settings = read(compose_config(f"data={name}"))
        assert settings.data.packing == ("stream" if name in PLAIN else "documents") and settings.data.corpus["cache"]
        assert settings.data.mask_documents == (name not in PLAIN)


@pytest.mark.parametrize("name", ["openwebtext", "empathetic_dialogues"])
def test_a_set_of_the_hub_is_prepared_and_opened_again_without_it(name, corpus_of, tmp_path, monkeypatch):
    corpus = corpus_of(name)
    prepared = prepare(corpus, Bytes(), tmp_path / "cache", lambda line: None)
    counted = [document if isinstance(document, str) else "" for document in corpus.documents("test")]
    counted += [part.text for found in corpus.documents("test") if name not in PLAIN for part in found if part.counted]
    assert prepared.splits["test"]["bytes"] == len("".join(counted).encode())
    monkeypatch.setattr(data.hub, "_library", lambda: pytest.fail("what is prepared needs no library"))
    assert prepare(corpus, Bytes(), tmp_path / "cache", pytest.fail).fingerprint == prepared.fingerprint
