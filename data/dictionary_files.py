"""A dictionary made before: found by a file, a prepared folder or a run folder, and checked to be one of its kind."""

import json
from pathlib import Path

import yaml
from tokenizers import Tokenizer, pre_tokenizers

from data.records import read_record


def read_dictionary(file: str, model: type, special: list[str]) -> Tokenizer:
    """The tokenizer that tokenizer.file names. special: the names of ids 0 and 1, of which a blank is no part.

    Raises ValueError if it cannot be read, has another model than this, or has no such ids.
    """
    path = find_dictionary(file)
    try:
        if (path.parent / "meta.json").exists():  # of a prepared corpus, which knows its digest
            read_record(path.parent / "meta.json")
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        why = str(error).partition("\n")[0]
        raise ValueError(f"tokenizer.file={file}: {path} is no dictionary that can be read: {why}") from error
    if not isinstance(tokenizer.model, model):
        found = type(tokenizer.model).__name__
        raise ValueError(f"tokenizer.file={file} must hold a {model.__name__} dictionary; {path} is {found}")
    size = tokenizer.get_vocab_size()
    if [(tokenizer.id_to_token(place) or "").strip() for place in (0, 1)] != special:
        rule = f"must have {special[0]} as id 0 and {special[1]} as id 1, as all have that are made here"
        raise ValueError(f"tokenizer.file={file} {rule}; {path} has not")
    if sorted(tokenizer.get_vocab().values()) != list(range(size)):
        raise ValueError(f"tokenizer.file={file} must have ids from 0 to {size - 1} without a gap; {path} has not")
    bytewise = isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    if bytewise and not set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab()):
        raise ValueError(f"tokenizer.file={file} must have an entry for each of the 256 bytes; {path} has not")
    tokenizer.encode_special_tokens = True  # the file does not keep it
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
