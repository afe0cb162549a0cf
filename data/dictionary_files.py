"""A dictionary made before: found by a file, a prepared folder or a run folder, and checked to be one of its kind."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from data.records import read_record

OF_PARTS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")  # options by which a byte has several names


def read_dictionary(file: str, special: list[str], alike: Sequence[Tokenizer]) -> Tokenizer:
    """The tokenizer that tokenizer.file names. special: the names of ids 0 and 1, of which a blank is no part.
    alike: empty ones of its kind, as they are made here; it must cut text as one of them does.

    Raises ValueError if it cannot be read, and for what of it could drop or change text, or cut it otherwise.
    """
    path = find_dictionary(file)
    try:
        if (path.parent / "meta.json").exists():  # of a prepared corpus, which knows its digest
            read_record(path.parent / "meta.json")
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        why = str(error).partition("\n")[0]
        raise ValueError(f"tokenizer.file={file}: {path} is no dictionary that can be read: {why}") from error
    for broken in _broken_rules(tokenizer, special, alike):
        raise ValueError(f"tokenizer.file={file} must {broken}; {path} does not")
    tokenizer.encode_special_tokens = True  # the file does not keep it
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _broken_rules(tokenizer: Tokenizer, special: list[str], alike: Sequence[Tokenizer]) -> Iterator[str]:
    content, vocab, model = json.loads(tokenizer.to_str()), tokenizer.get_vocab(), tokenizer.model
    if type(model) is not type(alike[0].model):
        yield f"hold a {type(alike[0].model).__name__} dictionary"
        return
    if [(tokenizer.id_to_token(place) or "").strip() for place in (0, 1)] != special:
        yield f"have {special[0]} as id 0 and {special[1]} as id 1, as all have that are made here"
    if sorted(vocab.values()) != list(range(len(vocab))):
        yield f"have ids from 0 to {len(vocab) - 1} without a gap"
    if isinstance(model, models.WordLevel):
        if model.unk_token not in vocab:
            yield f"have an entry for its unknown word {model.unk_token}"
    elif not set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocab):
        yield "have an entry for each of the 256 bytes"
    elif any(getattr(model, option) for option in OF_PARTS):
        yield f"have no {', '.join(OF_PARTS)}"
    if content["normalizer"] is not None:
        yield "change no text (normalizer)"
    if any(not added["special"] for added in content["added_tokens"]):
        yield "have no added token besides special ones"
    known = [json.loads(each.to_str())["pre_tokenizer"] for each in alike]
    if content["pre_tokenizer"] not in known:
        yield f"cut text as those made here do (pre_tokenizer): {' or '.join(map(json.dumps, known))}"


def find_dictionary(file: str) -> Path:
    """The tokenizer.json itself, that of a prepared folder, or that of the corpus which a run was trained on."""
    path = Path(file).expanduser()
    try:
        if (path / "provenance.json").exists():
            cache = yaml.safe_load((path / "config.yaml").read_text())["data"]["cache"]
            key = json.loads((path / "provenance.json").read_text())["data"]["cache_key"]
            path = Path(cache).expanduser() / key
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"tokenizer.file={file} is no whole run folder: {type(error).__name__}: {error}") from error
    return path / "tokenizer.json" if path.is_dir() else path
