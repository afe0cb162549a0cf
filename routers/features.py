"""Features: what of the text a hash looks at. Each maps Tokens to keys (B, S) int64 in [0, size).

V vocabulary, S sequence length. Where a document starts, and at t = 0, the token before is the begin id; where one
ends, the token after is the end id (data.batches.make_batch).
"""

import torch
from torch import Tensor, nn

from data.batches import Tokens
from data.randomness import mix
from routers.routing import Site, count

BIGRAM_PRIME = 1000003  # of bigram_mod


class Feature(nn.Module):
    """keys = feature(tokens). is_token: keys are token ids. leaks and uses_prediction: as of routers.routing.Router."""

    is_token: bool = True
    size_is_fixed: bool = True  # by the options alone, not by the training text
    leaks: frozenset[str] = frozenset()
    uses_prediction: bool = False

    def __init__(self, site: Site, buckets: int):
        super().__init__()
        self.site, self.buckets, self.size = site, buckets, site.vocab_size

    def forward(self, tokens: Tokens) -> Tensor:
        raise TypeError(f"{type(self).__name__} is a feature without a forward")

    def counts(self) -> Tensor:
        """(size,) int64, how often each key stands in the training split; all 1 while options are checked."""
        if self.site.training_text is None:
            return torch.ones(self.size, dtype=torch.int64)
        total = torch.zeros(self.size, dtype=torch.int64)
        for batch in self.site.training_text():
            tokens = batch.routed(self.site.in_encoder)
            total += count(self(tokens).reshape(-1), self.size, tokens.real.reshape(-1).long())
        return total


class Token(Feature):
    """x_t (Hash Layers, section 3.1)."""

    def forward(self, tokens: Tokens) -> Tensor:
        return tokens.id

    def counts(self) -> Tensor:
        return self.site.token_counts


class Previous(Feature):
    """x_{t-1} (Hash Layers, section 3.1)."""

    def forward(self, tokens: Tokens) -> Tensor:
        return tokens.previous


class NextToken(Feature):
    """x_{t+1}: an oracle, which sees the future (Hash Layers, section 3.1)."""

    leaks = frozenset({"future in training", "future in evaluation"})

    def forward(self, tokens: Tokens) -> Tensor:
        return tokens.next


class Predicted(Feature):
    """A frozen baseline's argmax for x_{t+1} (Hash Layers, section 3.1)."""

    uses_prediction = True

    def forward(self, tokens: Tokens) -> Tensor:
        if tokens.predicted is None:
            raise ValueError("router.feature=predicted reads tokens.predicted, which Transformer.prepare makes")
        return tokens.predicted

    def counts(self) -> Tensor:
        return self.site.token_counts  # a good baseline predicts as the text is


class Position(Feature):
    """t, the index in the window (Hash Layers, section 3.1)."""

    is_token = False

    def __init__(self, site: Site, buckets: int):
        super().__init__(site, buckets)
        self.size = site.sequence_length

    def forward(self, tokens: Tokens) -> Tensor:
        return tokens.position

    def counts(self) -> Tensor:
        return torch.ones(self.size, dtype=torch.int64)  # every window has each once


class Bigram(Feature):
    """A seeded mix of (x_{t-1}, x_t) modulo the number of buckets (Hash Layers, section 3.1)."""

    is_token = False
    salt: Tensor

    def __init__(self, site: Site, buckets: int):
        super().__init__(site, buckets)
        self.register_buffer("salt", torch.tensor(site.draws))  # the keys go on with a checkpoint, as the table does
        self.size = buckets

    def forward(self, tokens: Tokens) -> Tensor:
        return mix(tokens.previous, tokens.id, self.salt) % self.buckets


class BigramMod(Bigram):
    """(x_t mod B + prime * (x_{t-1} mod B)) mod B, the author's recollection: tokens of one residue stay together."""

    def forward(self, tokens: Tokens) -> Tensor:
        return (tokens.id % self.buckets + BIGRAM_PRIME * (tokens.previous % self.buckets)) % self.buckets


class Split(Feature):
    """x_t, but a token too heavy for one expert, p(x_t) > 1 / (2 E), is parted into buckets by x_{t-1}.

    So the fullest expert may hold less than p1 E times the mean, which no table over tokens alone can have.
    """

    is_token = False
    size_is_fixed = False
    heavy: Tensor
    salt: Tensor

    def __init__(self, site: Site, buckets: int):
        super().__init__(site, buckets)
        self.register_buffer("salt", torch.tensor(site.draws))
        heavy = site.token_counts * 2 * site.num_experts > site.token_counts.sum()
        # (V,) where a heavy token's buckets begin, -1 for the others
        starts = torch.where(heavy, site.vocab_size + buckets * (heavy.cumsum(0) - 1), -1)
        self.register_buffer("heavy", starts)
        self.size = site.vocab_size + buckets * int(heavy.sum())

    def forward(self, tokens: Tokens) -> Tensor:
        start = self.heavy.index_select(0, tokens.id.reshape(-1)).view(tokens.id.shape)
        return torch.where(start < 0, tokens.id, start + mix(tokens.previous, self.salt) % self.buckets)


FEATURES: dict[str, type[Feature]] = {"token": Token, "previous": Previous, "next_token": NextToken}
FEATURES |= {"predicted": Predicted, "position": Position, "bigram": Bigram, "bigram_mod": BigramMod, "split": Split}
