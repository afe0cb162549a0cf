"""The encoder of an encoder-decoder: blocks that see the whole source. B batch, R positions of the source, D width"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.batches import Source
from models.attention import opened, source_mask
from models.blocks import FFN, make_blocks, make_norm, run_blocks
from models.settings import ModelSettings
from routers.routing import Plan, Routing


class Encoder(nn.Module):
    """plain: makes a plain FFN. sparse: layer -> its FFN. length: R at most. masked: a document sees itself alone."""

    def __init__(
        self, settings: ModelSettings, plain: Callable[[], FFN], sparse: dict[int, FFN], length: int, masked: bool
    ):
        super().__init__()
        self.masked = masked
        rows = settings.num_positions or length
        learned = settings.positions == "learned"
        self.positions = nn.Parameter(torch.empty(rows, settings.d_model)) if learned else None
        ffns = [plain() for _ in range(settings.encoder_layers)]
        self.blocks, self.inserted = make_blocks(settings, ffns, sparse, cross=False)
        self.norm = make_norm(settings)

    def forward(
        self, x: Tensor, source: Source, plans: dict[int, Plan], rotation: Tensor | None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """x (B, R, D), the source's embedding -> its hidden values (B, R, D), and the routings of sparse layers."""
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]]
        mask = opened(source_mask(source.document if self.masked else None, source.document, source.tokens.real))
        x, routings = run_blocks(self.blocks, self.inserted, x, source.tokens, plans, rotation, mask)
        return self.norm(x), routings
