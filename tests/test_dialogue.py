import gzip
import json
import lzma
import re
from pathlib import Path

import pytest
from conftest import ROOT, compose_config
from omegaconf import OmegaConf

from data.corpora import SPLITS, Segment
from data.dialogue import READERS, Dialogues, Form, Turn
from data.prepare import prepare
from data.tokenizer import Bytes
from training.job import FINISHED, run
from training.targets import target

HELLO = [Turn("Ann", "Hi  there."), Turn("Bo", "Hello!\nAnn?"), Turn("Ann", "Yes."), Turn("Cy", "Me too.")]


def dialogues(files, **options) -> Dialogues:
    defaults = {"format": "turns", "validation_files": None, "test_files": None, "validation_share": 0.0}
    defaults |= {"test_share": 0.0, "draw_from": None, "responses": "all", "max_turns": None, "mark": "[{}]"}
    return Dialogues(files, **{**defaults, **options})


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*conversations: list) -> str:
    return "".join(json.dumps({"id": "x", "turns": turns}) + "\n" for turns in conversations)


def text(document) -> str:
    return "".join(segment.text for segment in document)


def counted(document) -> list[str]:
    return [segment.text for segment in document if segment.counted]


def form(**options) -> Form:
    return Form(**{"responses": "all", "max_turns": None, "mark": "[{}]", **options})


def test_turns_become_context_and_responses_by_hand():
    [document] = form(responses="last").documents(HELLO)
    context = "[1] Hi there.\n[2] Hello! Ann?\n[1] Yes.\n[3]"
    assert document == (Segment(context, False), Segment(" Me too.", True))
    [document] = form(responses="others", mark="<{}>:").documents(HELLO)
    assert document == (
        Segment("<1>: Hi there.\n<2>:", False),
        Segment(" Hello! Ann?\n", True),
        Segment("<1>: Yes.\n<3>:", False),
        Segment(" Me too.", True),
    )
    [document] = form(responses="all").documents(HELLO)
    assert counted(document) == [" Hello! Ann?\n", " Yes.\n", " Me too."]


@pytest.mark.parametrize("responses", ["last", "others", "all"])
@pytest.mark.parametrize("max_turns", [None, 3, 4, 7])
def test_every_turn_stands_once_and_every_document_has_a_response_after_some_context(responses, max_turns):
    for length in range(2, 40):
        turns = [Turn("abc"[place * place % 3], f"word{place}") for place in range(length)]
        made = list(form(responses=responses, max_turns=max_turns).documents(turns))
        assert re.findall(r"word\d+", " ".join(map(text, made))) == [turn.text for turn in turns]
        for document in made:
            assert not document[0].counted and document[-1].counted >= (responses != "others")
            assert max_turns is None or text(document).count("[") <= max_turns
            assert all(a.counted != b.counted for a, b in zip(document, document[1:]))
            assert not any("[" in said for said in counted(document))


def test_long_dialogues_are_cut_evenly_and_no_turn_is_alone():
    for length in range(2, 60):
        turns = [Turn(str(place % 2), "word") for place in range(length)]
        sizes = [text(document).count("word") for document in form(max_turns=6).documents(turns)]
        assert sum(sizes) == length and len(sizes) == -(-length // 6) and max(sizes) - min(sizes) <= 1 < min(sizes)


def test_what_a_speaker_says_in_a_row_is_one_turn_and_a_monologue_none():
    said = [Turn("A", "one"), Turn("A", "two"), Turn("B", "three"), Turn("B", "four")]
    [document] = form().documents(said)
    assert document == (Segment("[1] one two\n[2]", False), Segment(" three four", True))
    assert list(form().documents(said[:2])) == [] == list(form().documents([]))


def test_what_an_earlier_document_counts_is_context():
    turns = [Turn("A", "a"), Turn("B", "b", again=True), Turn("A", "c", again=True), Turn("A", "d"), Turn("B", "e")]
    [document] = form().documents(turns)
    assert counted(document) == [" c d\n", " e"]


def test_the_three_formats_hold_the_same_dialogue(tmp_path):
    said = ["How are you ?", "Fine , thanks .", "Good ."]
    by_turns = [["Ann", "J", said[0]], ["Bo", "A", said[1]], ["Ann", "J", said[2]]]
    files = {
        "turns": ("a.jsonl.xz", lzma.compress(lines(by_turns).encode())),
        "eou": ("a.txt.gz", gzip.compress("".join(f"{turn} __eou__ " for turn in said).encode() + b"\n")),
        "utterances": ("a.json", json.dumps([{"label": 1, "dialogue": said[:2], "response": said[2]}])),
    }
    expected = [Segment(f"[1] {said[0]}\n[2]", False), Segment(f" {said[1]}\n", True), Segment(f"[1] {said[2]}", False)]
    for name, (file, content) in files.items():
        corpus = dialogues(write(tmp_path / file, content), format=name, responses="others")
        assert list(corpus.documents("train")) == [tuple(expected)], name


@pytest.mark.parametrize("name", READERS)
def test_the_line_that_readme_shows_of_each_format_is_one(name, tmp_path):
    [line] = re.findall(rf"^    {name} +(.*)$", (ROOT / "README.md").read_text(), re.M)
    corpus = dialogues(write(tmp_path / "a", f"{line}\n"), format=name)
    assert [text(document) for document in corpus.documents("train")] == ["[1] Good morning.\n[2] Hello! You too."]


def test_a_dialogue_of_one_speaker_is_left_out(tmp_path):
    alone, two = [["A", "alone"], ["A", "still"]], [["A", "a"], ["B", "b"]]
    corpus = dialogues(write(tmp_path / "a.jsonl", lines(alone, two, alone)))
    assert [text(document) for document in corpus.documents("train")] == ["[1] a\n[2] b"]


def test_shares_are_drawn_from_whole_dialogues_and_equal_ones_stay_together(tmp_path):
    conversations = [[["A", f"question {number % 500}"], ["B", "x"], ["A", "y"], ["B", "z"]] for number in range(1000)]
    path = write(tmp_path / "a.jsonl", lines(*conversations))
    corpus = dialogues(path, validation_share=0.2, test_share=0.1, max_turns=3)
    splits = {split: list(map(text, corpus.documents(split))) for split in SPLITS}
    begins = {split: [t for t in texts if "question" in t] for split, texts in splits.items()}
    assert sum(map(len, begins.values())) == 1000 and sum(map(len, splits.values())) == 2000
    assert all(len(splits[split]) == 2 * len(begins[split]) for split in SPLITS)  # both parts of a dialogue
    assert len(set(begins["train"]) | set(begins["validation"]) | set(begins["test"])) == 500
    assert sum(len(set(found)) for found in begins.values()) == 500
    # 500 different dialogues, twice each: deviations of 9 and 7 of them, so these bounds are five wide.
    assert abs(len(begins["validation"]) - 200) < 90 and abs(len(begins["test"]) - 100) < 70


def test_a_dialogue_of_the_files_of_two_splits_is_in_one(tmp_path):
    """Whoever is said to speak, and however it is spaced; one drawn for a split stays in no file not drawn from."""
    same = [["A", "both"], ["B", "x"]], [["Ann", " both "], ["Bo", "x"]], [["C", "both"], ["D", "x"]]
    files = [
        write(tmp_path / f"{split}.jsonl", lines(talk, [["A", split], ["B", "x"]])) for split, talk in zip(SPLITS, same)
    ]
    corpus = dialogues(files[0], validation_files=files[1], test_files=files[2])
    found = {split: [text(document).split()[1] for document in corpus.documents(split)] for split in SPLITS}
    assert found == {"train": ["train"], "validation": ["validation"], "test": ["both", "test"]}
    many = [[["A", f"question {number}"], ["B", "x"]] for number in range(200)]
    copies = [write(tmp_path / f"{name}.jsonl", lines(*many, [["A", name], ["B", "x"]])) for name in ("one", "two")]
    drawn = dialogues(copies, draw_from=copies[1], validation_share=0.3, test_share=0.2)
    splits = [list(map(text, drawn.documents(split))) for split in SPLITS]
    assert (
        len(set.union(*map(set, splits))) == sum(len(set(split)) for split in splits) >= 201
        and min(map(len, splits)) > 20
    )
    assert any("one" in document for document in splits[0])


def test_shares_come_from_the_files_that_draw_from_names(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", lines(*([["A", f"{name} {number}"], ["B", "x"]] for number in range(100))))
    held_out = write(tmp_path / "test.jsonl", lines([["A", "test"], ["B", "x"]]))
    files = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    corpus = dialogues(files, test_files=held_out, draw_from=files[0], validation_share=0.15, test_share=0.5)
    names = {split: [text(document)[4] for document in corpus.documents(split)] for split in SPLITS}
    assert set(names["validation"]) == {"a"} and 5 <= len(names["validation"]) <= 30
    assert names["train"].count("b") == 100 and names["train"].count("a") == 100 - len(names["validation"])
    assert names["test"] == ["t"]
    with pytest.raises(ValueError, match="draw_from must name training files alone; got .*test.jsonl"):
        dialogues(files, test_files=held_out, draw_from=held_out)


def test_the_digest_follows_bytes_and_options_but_not_paths(tmp_path):
    content = lines([["A", "a"], ["B", "b"]])
    for name in ("a.jsonl", "moved.jsonl", "b.jsonl"):
        write(tmp_path / name, content)
    first, moved, other = (f"{tmp_path}/{name}.jsonl" for name in ("a", "moved", "b"))
    assert dialogues(first).digest() == dialogues(moved).digest()
    both = [first, other]
    changes = [{"responses": "last"}, {"max_turns": 5}, {"mark": "{}:"}, {"validation_share": 0.1}, {"test_share": 0.1}]
    changes += [{"format": "eou"}, {"draw_from": first}, {"draw_from": other}, {"test_files": moved}]
    digests = [dialogues(both).digest(), *(dialogues(both, **change).digest() for change in changes)]
    assert len(set(digests)) == len(digests)


BAD = [
    ("turns", b'\n{"id": 1}\n', r"a\.jsonl, line 2: no dialogue of format=turns: KeyError: 'turns'"),
    ("turns", b'{"turns": "x"}', r"line 1: .* turns must be a list; got 'x'"),
    ("turns", b'{"turns": []}', r"line 1: .* it is empty"),
    ("turns", b'{"turns": [["A", "a"], ["B", 7]]}', r"line 1: .* turn 2 must be a text; got '7'"),
    ("turns", b'{"turns": [["A", "a"], ["B", " "]]}', r"turn 2 must be a text; got ' '"),
    ("turns", b'{"turns": [["A", "a"], "B"]}', r"turn 2 must be a list of a speaker and a text"),
    ("turns", b'{"turns": [["A", "a"], ["A", "b"]]}', r"a\.jsonl holds no dialogue of two speakers"),
    ("turns", rb'{"turns": [["A", "a"], ["B", "\ud800"]]}', r"line 1: .* UnicodeEncodeError"),
    ("turns", lines([["A", "a"], ["B", "b"]]).encode() + b'{"turns": [', r"line 2: .* it is no JSON, or cut off"),
    ("turns", b"[" * 100_000, r"line 1: .* RecursionError"),
    ("turns", b"fine\n\xff", r"a\.jsonl, line 1: no dialogue"),
    ("turns", lines([["A", "a"], ["B", "b"]]).encode() + b"\xff\n", r"a\.jsonl, line 2: damaged, or not UTF-8"),
    ("turns", b"", r"a\.jsonl holds no dialogue"),
    ("eou", b"\n \n", r"a\.jsonl holds no dialogue"),
    ("eou", b"a __eou__ b __eou__\na __eou__ b", r"line 2: .* its last turn must end with __eou__; got 'b'"),
    ("eou", b"a __eou__  __eou__", r"line 1: .* turn 2 must be a text"),
    ("eou", b"alone __eou__", r"a\.jsonl holds no dialogue of two speakers"),
    ("utterances", b'[\n{"dialogue": \n', r"a\.jsonl, line 3: no JSON"),
    ("utterances", b'{"dialogue": []}', r"a\.jsonl, line 1: must hold a JSON list"),
    (
        "utterances",
        b'[{"dialogue": ["a"], "response": "b"}, {"response": "b"}]',
        r"dialogue 2: .* KeyError: 'dialogue'",
    ),
    ("utterances", b'[{"dialogue": "a", "response": "b"}]', r"dialogue 1: .* dialogue must be a list"),
    ("utterances", b'[{"dialogue": [], "response": "b"}]', r"a\.jsonl holds no dialogue of two speakers"),
    ("utterances", b"[]", r"a\.jsonl holds no dialogue"),
    ("utterances", b"", r"a\.jsonl, line 1: no JSON"),
]


@pytest.mark.parametrize(("format", "content", "message"), BAD)
def test_bad_input_is_one_line_that_names_the_place(tmp_path, format, content, message):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(ValueError, match=message) as error:
        list(dialogues(path, format=format).documents("train"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "data.corpus.format must be one of turns, eou, utterances; got csv"),
        ({"responses": "first"}, "data.corpus.responses must be one of last, others, all; got first"),
        ({"max_turns": 2}, "data.corpus.max_turns must be at least 3 or null; got 2"),
        ({"mark": "speaker:"}, "data.corpus.mark must hold one {} for the speaker's number; got 'speaker:'"),
        ({"validation_share": 1.0}, "validation_share=1.0 and test_share=0.0 must be"),
        ({"test_files": "nowhere/*"}, r"no file matches 'nowhere/\*'"),
    ],
)
def test_bad_options_are_one_line_that_names_the_rule(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        dialogues(write(tmp_path / "a.jsonl", lines([["A", "a"], ["B", "b"]])), **options)


def make_folders(folder: Path) -> None:
    """Files named and made as the four sets are, a few dialogues each."""
    for split in ("train", "train.0", "train.1", "valid", "test"):
        talk = [[[f"S{turn % 3}", "J", f"{split} {number} {turn}"] for turn in range(30)] for number in range(8)]
        write(folder / f"{split}.jsonl.xz", lzma.compress(lines(*talk).encode()))
        eou = "".join("".join(f"{split} {number} {turn} . __eou__ " for turn in range(4)) + "\n" for number in range(8))
        write(folder / f"{split}.txt.xz", lzma.compress(eou.encode()))
    for name in ("bst", "personachat", "empatheticdialogues"):
        for split in ("valid", "test"):
            items = [{"dialogue": [f"{name} {split} {n}", "b", "c"], "response": "d"} for n in range(100)]
            write(folder / f"{name}.{split}.json.xz", lzma.compress(json.dumps(items).encode()))


@pytest.mark.parametrize("name", ["scotus", "crd3", "dailydialog", "bst_files"])
def test_each_set_is_read_by_a_yaml_that_takes_its_folder(name, tmp_path):
    make_folders(tmp_path)
    config = compose_config(f"data={name}", f"data.folder={tmp_path}")
    made, options = target(OmegaConf.to_container(config.data.corpus, resolve=True))
    corpus = made(**options)
    splits = {split: [text(document) for document in corpus.documents(split)] for split in SPLITS}
    everything = sum(splits.values(), [])
    assert min(map(len, splits.values())) > 0 and len(set(everything)) == len(everything)
    assert all("test" in document for document in splits["test"])
    assert not any("test" in document for document in splits["train"] + splits["validation"])
    if name == "bst_files":
        assert (
            all("bst valid" in document for document in splits["validation"]) and 5 <= len(splits["validation"]) <= 30
        )
        assert len(splits["train"]) == 300 - len(splits["validation"]) and len(splits["test"]) == 100
    elif name == "scotus":
        assert len(splits["train"]) == 2 * 8 * 4 and len(splits["validation"]) == 8 * 4


def test_what_is_prepared_counts_the_responses_byte_by_byte(tmp_path):
    make_folders(tmp_path)
    config = compose_config("data=dailydialog", f"data.folder={tmp_path}")
    made, options = target(OmegaConf.to_container(config.data.corpus, resolve=True))
    said: list[str] = []
    prepared = prepare(made(**options), Bytes(), tmp_path / "cache", said.append)
    assert "test: 8 documents, 184 bytes, 192 tokens that count, 288 tokens of context" in said[1]
    for split, file in (("train", "train"), ("validation", "valid"), ("test", "test")):
        # A dialogue is "[1] F N 0 .\n[2] F N 1 .\n[1] F N 2 .\n[2] F N 3 ."; the second speaker's two turns count.
        turn = len(f"{file} 0 0 .")
        assert prepared.splits[split]["tokens"] == 8 * (4 * (4 + turn) + 4)  # marks, texts, line ends, END
        assert int(prepared.counted[split].sum()) == 8 * (2 * (1 + turn) + 2)


@pytest.mark.parametrize("name", ["dailydialog", "bst_files"])
def test_a_run_trains_and_evaluates_on_the_responses_alone(name, tmp_path, tiny):
    make_folders(tmp_path)
    sizes = [word for word in tiny if not word.startswith("data")] + ["data.sequence_length=64", "train.steps=3"]
    data = [f"data={name}", f"data.folder={tmp_path}", f"data.cache={tmp_path}", "tokenizer=bytes"]
    config = compose_config("router=hash_random", *data, *sizes)
    assert run(config) == FINISHED
    [result] = (tmp_path / "runs").glob("*/result.json")
    evaluated = json.loads(result.read_text())["test/tokens"]
    made, options = target(OmegaConf.to_container(config.data.corpus, resolve=True))
    said = list(made(**options).documents("test"))
    assert evaluated == len(said) + sum(
        len(part.text.encode()) for document in said for part in document if part.counted
    )
