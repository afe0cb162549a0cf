"""A control: a random expert at every step. Sparsity alone, without consistency and without content."""

import torch
from torch import Tensor

from data.batches import Tokens
from data.randomness import mix
from routers.routing import Router, Routing, Site, one_each


class RandomEachStep(Router):
    """expert = mix(salt, key, t, x_t) mod E, salt drawn from (seed, layer); weight 1. No parameters, no loss.

    The key is new with every step and row, so in training a token's expert is a fresh draw. In evaluation it is 0:
    there the same formula is a fixed table over position and token, which training never saw. So evaluation repeats
    to the bit and knows nothing of batch mates, and is as random as training.
    """

    trains_differently = True
    salt: Tensor

    def __init__(self, site: Site):
        super().__init__(site)
        self.register_buffer("salt", torch.randint(2**62, (), generator=site.generator("salt")))

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        key = tokens.key if self.training else torch.zeros_like(tokens.key)
        draw = mix(self.salt, key[:, None], tokens.position, tokens.id)  # (B, S)
        return one_each(draw % self.site.num_experts, tokens.real)
