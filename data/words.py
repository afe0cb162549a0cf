"""A dictionary of whole words: what is not in it is the unknown word, and the text does not come back from it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from data.dictionary_files import read_dictionary
from data.records import digest_of
from data.tokenizer import SPECIAL, cut, units

REMEMBERED = 1 << 20  # units
UNKNOWN, LINE_END = "<unk>", "\n"
# The first ids. No word holds a blank, so text that spells the end's name is not the end.
OWN = [*(f"{name} " for name in SPECIAL), UNKNOWN, LINE_END]
WITH_MARKS, APART = r"\n|\w+|[^\w\s]", r"\n|[^\s]+"  # what a word is, by the option punctuation


@dataclass
class Words:
    """Words of the training split by falling frequency, and by the alphabet where they are equally frequent.

    A word is a run of letters, digits and underscores or one other mark, or without `punctuation` all between spaces.
    max_size: entries, with the two special ids, the unknown word and the end of a line; min_count: of a word in the
    training split. Text that spells <unk>, as WikiText-103 does, is the unknown word (without `punctuation`).
    Raises ValueError for values out of range and for a file that is no such dictionary.
    """

    max_size: int | None
    min_count: int
    punctuation: bool
    file: str | None

    def __post_init__(self):
        if self.max_size is not None and self.max_size < 5:
            raise ValueError(f"tokenizer.max_size must be at least 5, for 4 ids and a word; got {self.max_size}")
        if self.min_count < 1:
            raise ValueError(f"tokenizer.min_count must be at least 1; got {self.min_count}")
        self.loaded = read_dictionary(self.file, SPECIAL, [_empty(True), _empty(False)]) if self.file else None

    def digest(self) -> str:
        options = [self.max_size, self.min_count, self.punctuation]
        return digest_of(["words", self.loaded.to_str() if self.loaded else options])

    def size(self) -> int | None:
        return self.loaded.get_vocab_size() if self.loaded else None

    def make(self, texts: Iterable[str]) -> Tokenizer:
        """ValueError if no word is frequent enough."""
        if self.loaded:
            return self.loaded
        tokenizer = _empty(self.punctuation)
        found = count_words(texts, tokenizer.pre_tokenizer)
        frequent = sorted((word for word in found if found[word] >= self.min_count), key=lambda w: (-found[w], w))
        if not set(frequent) - set(OWN):
            raise ValueError(f"tokenizer.min_count={self.min_count}: no word of the training split is that frequent")
        words = list(dict.fromkeys([*OWN, *frequent]))[: self.max_size]
        tokenizer.model = models.WordLevel({word: place for place, word in enumerate(words)}, UNKNOWN)
        return tokenizer


def _empty(punctuation: bool) -> Tokenizer:
    """A dictionary of no words, which cuts text into words."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    pattern = Regex(WITH_MARKS if punctuation else APART)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    return tokenizer


def count_words(texts: Iterable[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> Counter[str]:
    """How often each word stands in the texts."""
    words, waiting = Counter(), Counter()  # units are counted first: each is parted into words but once

    def part() -> None:
        for unit, number in waiting.items():
            for word, _ in pre_tokenizer.pre_tokenize_str(unit):
                words[word] += number
        waiting.clear()

    for piece in chain.from_iterable(map(cut, texts)):
        waiting.update(units(piece))
        if len(waiting) > REMEMBERED:
            part()
    part()
    return words
