"""The shared Transformer: pre-norm, tied embeddings, decoder-only or encoder-decoder. Routed FFNs are all that changes.

B batch, S positions of the decoder, R of the source, D width, F hidden width, E experts, V vocabulary, L layers
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from data.batches import Batch, Source, Tokens
from data.randomness import generator
from data.source import divided, positions
from models.attention import document_mask, response_mask, rotary_angles, source_mask
from models.blocks import FFN, Memory, make_blocks, make_norm, run_blocks
from models.encoder import Encoder
from models.experts import ExpertLayer, Experts
from models.feedforward import FeedForward, SparseFeedForward
from models.flops import window_flops
from models.settings import ModelSettings
from routers.routing import Plan, Router, Routing


@torch.no_grad()
def draw_normal(part: Tensor, deviation: float, draws: torch.Generator) -> None:
    """Fills a matrix (N, M), or one that is cut into segments (segments, N, M): first values of the whole matrix."""
    segments = part.unsqueeze(0) if part.dim() == 2 else part
    whole = torch.empty(part.shape[-2], segments.shape[0] * part.shape[-1])
    whole.normal_(0.0, deviation, generator=draws)
    segments.copy_(whole.unflatten(1, (segments.shape[0], -1)).transpose(0, 1))


class Output(NamedTuple):
    logits: Tensor  # (B, S, V)
    routings: dict[int, Routing]  # sparse layer -> its routing
    aux_loss: Tensor  # () float32, summed over layers


class Transformer(nn.Module):
    """make_router gives the router of a layer, None for plain FFNs everywhere; make_experts(E, F) gives E experts.

    Experts are narrower by as many as a token sees, shared ones included, so that FLOPs are those of one FFN.
    seed: every first value depends on (seed, the parameter's name) alone, one expert after the other, so trunks are
    equal across routers and a plain FFN equals expert 0; on the meta device there are none. path: see models.dispatch.
    mask_documents: attention stays within a document, else it sees the whole window. baseline: a trained model, no
    part of this one, whose prediction of the next token routers may read. source_length: of an encoder's window, see
    data.source.divided; of documents in one row (None) each sees itself alone. Raises ValueError for sizes that do not
    fit.
    """

    rotation: Tensor | None
    blocks: nn.ModuleList
    inserted: nn.ModuleDict

    def __init__(
        self,
        settings: ModelSettings,
        vocab_size: int,
        sequence_length: int,
        num_experts: int,
        make_router: Callable[[int], Router] | None,
        make_experts: Callable[[int, int], ExpertLayer],
        seed: int,
        path: str,
        num_shared: int = 0,
        mask_documents: bool = False,
        baseline: "Transformer | None" = None,
        source_length: int | None = None,
    ):
        super().__init__()
        self.settings, self.num_experts, self.sequence_length, self.path = settings, num_experts, sequence_length, path
        self.mask_documents, self.unregistered = mask_documents, (baseline,)  # in a tuple: it is no part of this model
        self.source_length, encoded = source_length, settings.encoder_layers > 0
        self.lengths = positions(sequence_length, source_length, settings.encoder_layers)
        width, learned = settings.d_model, settings.positions == "learned"
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))
        rows = settings.num_positions or self.lengths.decoder
        self.positions = nn.Parameter(torch.empty(rows, width)) if learned else None
        angles = None if learned else rotary_angles(sequence_length, width // settings.num_heads)
        self.register_buffer("rotation", angles, persistent=False)

        def plain(width_ff: int = settings.d_ff) -> Experts:
            return Experts(1, width, width_ff, settings.activation, settings.biases)

        def routed(layer: int) -> FFN:
            if make_router is None:
                inserted = settings.placement == "insert"
                return FeedForward(make_experts(1, settings.d_ff) if inserted else plain())
            router = make_router(layer)
            if router.uses_prediction and settings.sparse_in == "encoder":
                rule = "must be decoder for a router that reads predictions of the next token"
                raise ValueError(f"model.sparse_in {rule}; got encoder")
            seen = router.experts_per_token // router.segments + num_shared
            if settings.d_ff % (8 * seen):
                rule = f"must split into {seen} experts of a width that is a multiple of 8"
                raise ValueError(f"model.d_ff {rule}; got {settings.d_ff}")
            each = settings.d_ff // seen
            shared = plain(num_shared * each) if num_shared else None
            return SparseFeedForward(make_experts(num_experts, each), router, shared, path)

        sparse = {layer: routed(layer) for layer in settings.sparse_layers}
        self.in_encoder = settings.sparse_in == "encoder"
        decoders, encoders = ({}, sparse) if self.in_encoder else (sparse, {})
        ffns = [FeedForward(plain()) for _ in range(settings.num_layers)]
        self.blocks, self.inserted = make_blocks(settings, ffns, decoders, encoded)
        self.norm = make_norm(settings)
        self.encoder = None
        if encoded:
            length, masked = self.lengths.encoder, mask_documents or source_length is None
            self.encoder = Encoder(settings, lambda: FeedForward(plain()), encoders, length, masked)
        self.at_sparse_layers = sparse  # the same in a dense model, where they are plain
        self.sparse = {layer: ffn for layer, ffn in sparse.items() if isinstance(ffn, SparseFeedForward)}
        if not self.embedding.is_meta:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Normal(0, 0.02), what feeds the residual stream over the root of how many do (GPT-2); norms 1, biases 0;
        routers draw their own."""
        encoded, layers = self.encoder is not None, self.settings.num_layers
        residual = 0.02 / ((3 if encoded else 2) * layers) ** 0.5
        of_encoder = 0.02 / (2 * max(self.settings.encoder_layers, 1)) ** 0.5
        draws: list[tuple[Tensor, float, torch.Generator]] = []
        for name, parameter in self.named_parameters():
            module, own = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if ".router." in name or parameter.dim() == 1 or own in getattr(module, "own_first_values", ()):
                continue
            deviation = 0.02
            if name.endswith(("attention.out", "w_out")):
                deviation = of_encoder if name.startswith("encoder.") else residual
            parts = enumerate(parameter if parameter.dim() > 2 else [parameter])
            draws += [(part, deviation, generator(seed, name, index)) for index, part in parts]
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # a core takes seconds for 100 million values
            list(threads.map(draw_normal, *zip(*draws, strict=True)))

    @property
    def routers(self) -> dict[int, Router]:
        """Sparse layer -> its router."""
        return {layer: ffn.router for layer, ffn in self.sparse.items()}

    @torch.no_grad()
    def prepare(self, batch: Batch) -> tuple[Batch, dict[int, Plan]]:
        """What tokens alone decide, made ahead on the batch's device: the encoder's part of the batch, the baseline's
        prediction, and plans."""
        batch = self.divide(batch)
        if any(router.uses_prediction for router in self.routers.values()):
            baseline = self.unregistered[0]
            assert baseline is not None, "a router reads predictions, but there is no baseline"
            predicted = baseline.infer(batch).logits.argmax(-1)
            batch = batch._replace(tokens=batch.tokens._replace(predicted=predicted))
        routed = batch.routed(self.in_encoder)
        plans = {layer: router.plan(routed) for layer, router in self.routers.items()}
        return batch, {layer: plan for layer, plan in plans.items() if plan is not None}

    def divide(self, batch: Batch) -> Batch:
        """The batch with the encoder's part apart, if there is an encoder and none has been set apart yet."""
        return batch if self.encoder is None or batch.source is not None else divided(batch, self.source_length)

    def forward(
        self,
        tokens: Tokens,
        plans: dict[int, Plan] | None = None,
        document: Tensor | None = None,
        source: Source | None = None,
    ) -> Output:
        """document (B, S): with mask_documents attention stays within equal numbers. source: what an encoder reads.

        Raises ValueError if there is an encoder and no source.
        """
        plans = plans or {}
        x = embedding(tokens.id, self.embedding)  # (B, S, D)
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]]
        masked = document if self.mask_documents else None
        mask = document_mask(masked) if masked is not None else None
        memory, routings = None, {}
        if self.encoder is not None:
            if source is None or document is None:
                raise ValueError("an encoder-decoder needs a source: Transformer.prepare makes it of a batch")
            if self.source_length is None:
                masked, mask = document, response_mask(document, tokens.real)
            hidden = embedding(source.tokens.id, self.embedding)  # (B, R, D)
            hidden, routings = self.encoder(hidden, source, plans if self.in_encoder else {}, self.rotation)
            memory = Memory(hidden, source_mask(masked, source.document, source.tokens.real))
        plans = {} if self.in_encoder else plans
        x, of_decoder = run_blocks(self.blocks, self.inserted, x, tokens, plans, self.rotation, mask, memory)
        routings = routings | of_decoder
        aux_loss = sum((r.aux_loss for r in routings.values()), torch.zeros((), device=x.device))
        return Output(self.norm(x) @ self.embedding.T, routings, aux_loss)

    @torch.no_grad()
    def infer(self, batch: Batch) -> Output:
        """A forward pass of a trained model on its own device, there in bf16 if it is a GPU."""
        device = self.embedding.device
        batch = self.divide(batch.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return self(batch.tokens, document=batch.document, source=batch.source)

    def parameter_counts(self) -> dict[str, int]:
        """active: parameters that touch one token's output; total: all of them, tables and baselines left out."""
        total = active = sum(p.numel() for p in self.parameters())
        for ffn in self.sparse.values():
            expert = sum(p.numel() for p in ffn.experts.parameters()) // self.num_experts
            active -= expert * (self.num_experts - ffn.router.experts_per_token // ffn.router.segments)
        return {"active": active, "total": total}

    def train_flops_per_token(self) -> int:
        """See models.flops; of a window's tokens, whether encoder or decoder reads them, each has its share."""
        return window_flops(self) // self.sequence_length
