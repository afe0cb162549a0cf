"""A synthetic language whose entropy is known exactly: an order-1 Markov chain over a small alphabet.

N symbols; state 0 is the end of a document, state i the i-th letter
"""

import hashlib
from bisect import bisect
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from data.randomness import generator
from data.records import digest_of
from data.splits import SPLITS


@dataclass
class Markov:
    """Documents of letters; after any letter a document ends with probability `end`, after an end a new one begins.

    symbols N: 2 to 26 letters. sharpness: the standard deviation of the logits that a letter's successors are drawn
    from; 0 makes them uniform. tokens: of the training split, ends included; validation and test have held_out each.
    A letter is one byte: with data.vocab_size=258 it is one token. Raises ValueError for values out of range.
    """

    symbols: int
    end: float
    sharpness: float
    tokens: int
    held_out: int
    seed: int

    def __post_init__(self):
        if not 2 <= self.symbols <= 26:
            raise ValueError(f"data.corpus.symbols must be in 2..26; got {self.symbols}")
        if not 0 < self.end < 1:
            raise ValueError(f"data.corpus.end must be between 0 and 1, both excluded; got {self.end}")
        if not self.sharpness >= 0:
            raise ValueError(f"data.corpus.sharpness must not be negative; got {self.sharpness}")
        if min(self.tokens, self.held_out) < 1:
            raise ValueError(f"data.corpus.tokens and held_out must be at least 1; got {self.tokens}, {self.held_out}")
        logits = torch.randn(self.symbols + 1, self.symbols, generator=generator("markov", self.seed)).double()
        self.transition = torch.zeros(self.symbols + 1, self.symbols + 1, dtype=torch.float64)  # row: from, column: to
        self.transition[:, 1:] = (self.sharpness * logits).softmax(-1)
        self.transition[1:] *= 1 - self.end
        self.transition[1:, 0] = self.end  # after an end comes a letter: no document is empty

    def entropy(self) -> float:
        """The entropy rate in nats a token, ends being tokens: sum_i pi_i H(row i), pi the stationary distribution."""
        size = len(self.transition)
        balance = torch.cat([self.transition.T - torch.eye(size), torch.ones(1, size)])  # pi P = pi, sum pi = 1
        wanted = torch.cat([torch.zeros(size), torch.ones(1)]).double()[:, None]
        stationary = torch.linalg.lstsq(balance, wanted).solution[:, 0]
        return float(stationary @ torch.special.entr(self.transition).sum(-1))

    def states(self, split: str) -> Iterator[int]:
        """Endless states of a split's text; it begins with a document."""
        rows = (self.transition.cumsum(-1) / self.transition.sum(-1, keepdim=True)).tolist()
        draws, state = generator("markov text", self.seed, split), 0
        while True:
            for draw in torch.rand(1 << 14, dtype=torch.float64, generator=draws).tolist():
                state = min(bisect(rows[state], draw), self.symbols)
                yield state

    def documents(self, split: str) -> Iterator[str]:
        """Whole documents, until the split has its number of tokens."""
        wanted, letters = self.tokens if split == SPLITS[0] else self.held_out, []
        for number, state in zip(count(1), self.states(split)):
            if state:
                letters.append(chr(ord("a") + state - 1))
                continue
            yield "".join(letters)
            letters.clear()
            if number >= wanted:
                return

    def digest(self) -> str:
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        return digest_of([asdict(self), code, torch.__version__])

    def surprise(self, previous: Tensor, following: Tensor) -> Tensor:
        """-log P(following | previous) in nats, of states of the same shape."""
        return -self.transition.log()[previous, following]
