"""Features: what of the text a hash looks at. Each maps Tokens to keys (B, S) in [0, size)."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from data.batches import Tokens


class Feature(NamedTuple):
    """keys(tokens) gives one key a token; counts says how often each key stands in the training split."""

    keys: Callable[[Tokens], Tensor]
    counts: Callable[[Tensor], Tensor]  # token counts (V,) -> key counts (number of keys,)


FEATURES = {
    "token": Feature(lambda tokens: tokens.id, lambda token_counts: token_counts),
}
