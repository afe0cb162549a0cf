"""StableMoE: learn to route, distil it into a table of tokens, train on with that table (Dai et al., arXiv 2204.08396).

B batch, S sequence, D width, E experts, V vocabulary, U width of the distilled router, G groups, N tokens a group
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from data.batches import Tokens
from routers.gates import choices, gate_parameter, gate_scores
from routers.routing import Router, Routing, Site, one_each
from routers.tables import check_table


class StableMoE(Router):
    """Stage 1: expert = argmax_i h . e_i, and a router u(x_t) . c that sees the token alone learns to say the same.
    Stage 2: expert = table[x_t] = argmax_i u(x_t) . c_i, u and c frozen. Weight sigmoid(h . e_a), which learns in both.

    Stage 1 lasts for stage_1_share of training; its loss is balance_coef * imbalance() plus the cross-entropy of
    softmax(u . c) against the learned expert. Evaluation uses the distilled router in both stages. distilled_width: U.
    report: agreement, the share of tokens that both routers send to one expert, and stage, 1 or 2. First values, as the
    source's were not read: Switch's for e, normal(0, 0.02) for u and c. forward_flops: stage 1's. Raises ValueError
    for values out of range, and on loading a table or stage that cannot be.
    """

    trains_differently = True
    stage: Tensor
    table: Tensor

    def __init__(self, site: Site, stage_1_share: float, balance_coef: float, distilled_width: int):
        super().__init__(site)
        if not 0 < stage_1_share <= 1:
            raise ValueError(f"router.stage_1_share must be above 0 and at most 1; got {stage_1_share}")
        if balance_coef < 0:
            raise ValueError(f"router.balance_coef must not be negative; got {balance_coef}")
        if distilled_width < 1:
            raise ValueError(f"router.distilled_width must be at least 1; got {distilled_width}")
        self.stage_1_share, self.balance_coef = stage_1_share, balance_coef
        self.gate = gate_parameter(site)  # e (E, D)
        self.words = nn.Parameter(torch.empty(site.vocab_size, distilled_width))  # u
        self.centroids = nn.Parameter(torch.empty(site.num_experts, distilled_width))  # c
        with torch.no_grad():
            for name, parameter in (("words", self.words), ("centroids", self.centroids)):
                parameter.normal_(0.0, 0.02, generator=site.generator(name))  # small: a few steps outweigh it
        self.forward_flops = 2 * site.num_experts * (site.d_model + distilled_width)
        self.register_buffer("stage", torch.tensor(1))
        self.register_buffer("table", torch.zeros(site.vocab_size, dtype=torch.int64))  # (V,), of use in stage 2
        self.tabulated = False  # stage == 2, where forward can ask without waiting for the device
        self.register_load_state_dict_post_hook(lambda module, _: module.loaded())

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        scores = gate_scores(hidden, self.gate)  # (B, S, E)
        learned, aux_loss = scores.argmax(-1), None  # the lowest expert id wins a tie
        if self.tabulated:
            distilled = self.table.index_select(0, tokens.id.reshape(-1)).view(tokens.id.shape)
        else:
            logits = gate_scores(embedding(tokens.id, self.words), self.centroids)
            distilled = logits.argmax(-1)
            choice = choices(learned[..., None], tokens, self.site)
            aux_loss = self.balance_coef * imbalance(choice, scores.sigmoid()) + distillation(choice, logits, learned)
        expert = learned if self.training and not self.tabulated else distilled
        weight = scores.gather(-1, expert[..., None]).squeeze(-1).sigmoid() * tokens.real
        agreeing = ((learned == distilled) & tokens.real).sum() / tokens.real.sum().clamp(min=1)
        return one_each(expert, weight, aux_loss, {"agreement": agreeing, "stage": self.stage.clone()})

    @torch.no_grad()
    def after_step(self, load: Tensor, progress: float) -> None:
        if not self.tabulated and progress >= self.stage_1_share:
            self.table.copy_(gate_scores(self.words[None], self.centroids)[0].argmax(-1))
            self.stage.fill_(2)
            self.enter(tabulated=True)

    def enter(self, tabulated: bool) -> None:
        """Frozen parameters keep no gradient: the optimizer passes over them, its momentum and decay included."""
        self.tabulated = tabulated  # the compiler guards on it: a new stage compiles once more
        for frozen in (self.words, self.centroids):
            frozen.requires_grad_(not tabulated)
            frozen.grad = None

    def loaded(self) -> None:
        """Go on in the stage that was loaded."""
        check_table(self.table, self.site.num_experts)
        stage = int(self.stage)
        if stage not in (1, 2):
            raise ValueError(f"the stage of a router that distils itself must be 1 or 2; got {stage}")
        self.enter(tabulated=stage == 2)


def imbalance(choice: Tensor, gate: Tensor) -> Tensor:
    """sum_i ((n_i - mean n) / mean n) * (sum over i's tokens of gate_i) / N, the mean over groups: 0 at equal loads.

    choice (G, N, E) from choices(), 0 on padding, which is in no count; gate (B, S, E). No gradient through n.
    """
    real = choice.sum((1, 2)).clamp(min=1)[:, None]  # (G, 1)
    excess = choice.sum(1) * choice.shape[-1] / real - 1  # (G, E); loads sum to real, so their mean is real / E
    of_its_own = (gate.view(choice.shape) * choice).sum(1) / real
    return (excess * of_its_own).sum(-1).mean()


def distillation(choice: Tensor, logits: Tensor, learned: Tensor) -> Tensor:
    """Cross-entropy of softmax(logits) against the learned expert: the mean over groups of that over their real tokens.

    choice (G, N, E) from choices(); logits (B, S, E); learned (B, S).
    """
    real = choice.sum(-1)  # (G, N)
    each = cross_entropy(logits.flatten(0, 1), learned.flatten(), reduction="none").view(real.shape)
    return ((each * real).sum(1) / real.sum(1).clamp(min=1)).mean()
