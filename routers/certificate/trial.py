"""What the certificate tries a router in: tiny models around it, made from seeds, and inputs for them.

B batch, S sequence, T = B*S tokens, D width, E experts, N segments
"""

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import Batch, Tokens, make_batch
from data.randomness import generator, mix
from data.tokenizer import BEGIN, END
from models.experts import ExpertLayer, Experts
from models.settings import ModelSettings
from models.transformer import Transformer
from routers.gates import gate_parameter, gate_scores
from routers.routing import Router, Routing, Site, count, one_each

LENGTH, GROUP, WIDTH = 16, 2, 16
MakeExperts = Callable[[int, int, int, str], ExpertLayer]  # E, D, F, activation


class StandIn(Router):
    """A learned router, for the trained model that some routers start from."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.gate = gate_parameter(site)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        return one_each(gate_scores(hidden, self.gate).argmax(-1), tokens.real)


@dataclass(frozen=True, eq=False)
class Case:
    """A router under test, as a factory of tiny models around it, as small as they may be, in sparse_layers of them."""

    make_router: Callable[[Site], Router]
    make_experts: MakeExperts = Experts
    num_experts: int = 4
    vocab_size: int = 64
    num_shared: int = 0
    activation: str = "relu"
    placement: str = "replace"
    routing_group: int = GROUP
    sparse_layers: tuple[int, ...] = (0, 1, 2, 3)

    @functools.cached_property
    def settings(self) -> ModelSettings:
        """Sizes that suit the router's segments and experts a token. Raises ValueError as the router does."""
        router = self.make_router(self.site(0, self.sparse_layers[0], self.num_experts, WIDTH))
        segments, width = router.segments, max(WIDTH, 8 * router.segments)
        d_ff = 16 * segments * (router.experts_per_token // segments + self.num_shared)
        return self.sizes(width, d_ff, self.activation, self.placement)

    def sizes(self, width: int, d_ff: int, activation: str, placement: str) -> ModelSettings:
        options: dict[str, Any] = {"norm": "layernorm", "positions": "rotary", "dispatch": "auto", "num_heads": 2}
        return ModelSettings(
            num_layers=max(self.sparse_layers) + 1,
            d_model=width,
            d_ff=d_ff,
            activation=activation,
            sparse_layers=list(self.sparse_layers),
            placement=placement,
            **options,
        )

    def site(self, seed: int, layer: int, num_experts: int, width: int) -> Site:
        return Site(
            layer=layer,
            num_experts=num_experts,
            d_model=width,
            vocab_size=self.vocab_size,
            token_counts=self.token_counts,
            begin=BEGIN,
            end=END,
            routing_group=self.routing_group,
            seed=seed,
            sequence_length=LENGTH,
            sparse_layers=self.sparse_layers,
            training_text=lambda: self.training_text,
            baseline=self.baseline(num_experts, width),
        )

    @functools.cached_property
    def training_text(self) -> list[Batch]:
        """Some thousand tokens, the low ids the more frequent."""
        letters = self.vocab_size - BEGIN - 1
        draws = [torch.rand(64, LENGTH + 1, generator=generator("certificate", "text", i)) for i in range(4)]
        windows = [torch.where(draw < 0.9, BEGIN + 1 + (letters * (draw / 0.9) ** 3).long(), END) for draw in draws]
        everyone = torch.ones(64, LENGTH, dtype=torch.bool)
        return [batch_of(window, everyone, torch.arange(64)) for window in windows]

    @functools.cached_property
    def token_counts(self) -> Tensor:
        """(V,) int64, of the training text."""
        return torch.stack([count(batch.tokens.id.flatten(), self.vocab_size) for batch in self.training_text]).sum(0)

    @functools.cache  # noqa: B019  (a case lives as long as its checks)
    def baseline(self, num_experts: int, width: int) -> Transformer:
        """A model with first values as large as trained ones, and a learned router in every layer."""

        def stand_in(layer: int) -> Router:
            site = Site(layer, num_experts, width, self.vocab_size, torch.ones(1), BEGIN, END, GROUP, 0, LENGTH, ())
            return StandIn(site)

        def experts(number: int, d_ff: int) -> Experts:
            return Experts(number, width, d_ff, "relu")

        sizes = self.vocab_size, LENGTH, num_experts
        settings = self.sizes(width, 16, "relu", "replace")
        return shaken(Transformer(settings, *sizes, stand_in, experts, seed=0, path="loop"), 0).eval()

    def model(
        self,
        seed: int,
        training: bool = True,
        dtype: torch.dtype = torch.float64,
        path: str = "loop",
        num_experts: int | None = None,
        small: bool = False,
    ) -> Transformer:
        """A model with its routers' parameters of size O(1), so that they decide and errors show; of odd seeds the
        routers have seen all of training, uneven loads in it. small: first values as in training instead."""
        first = self.first_model(seed, num_experts or self.num_experts, small)
        kept = [first.unregistered, *(router.site for router in first.routers.values())]
        model = copy.deepcopy(first, {id(thing): thing for thing in kept}).to(dtype).train(training)
        for ffn in model.sparse.values():
            ffn.path = path
        if seed % 2:
            for router in model.routers.values():
                see_training(router)
        return model

    @functools.cache  # noqa: B019
    def first_model(self, seed: int, num_experts: int, small: bool) -> Transformer:
        return self.new_model(seed, num_experts, small)

    def new_model(self, seed: int, num_experts: int, small: bool = False) -> Transformer:
        """Never a copy: what construction does can be watched."""
        settings = self.settings

        def make_router(layer: int) -> Router:
            return self.make_router(self.site(seed, layer, num_experts, settings.d_model))

        def make_experts(count: int, d_ff: int) -> ExpertLayer:
            return self.make_experts(count, settings.d_model, d_ff, settings.activation)

        sizes, baseline = (self.vocab_size, LENGTH, num_experts), self.baseline(num_experts, settings.d_model)
        more = {"seed": seed, "path": "loop", "num_shared": self.num_shared, "baseline": baseline}
        model = Transformer(settings, *sizes, make_router, make_experts, **more)
        return model if small else shaken(model, seed)

    def batch(self, seed: object, rows: int = 2 * GROUP, padding: int = 0, keys: int = 0, same: float = 0.0) -> Batch:
        """Random windows with short documents; the text ends with some padding, and if it is less than a row, so does
        the first row. keys: another source of noise. same: the share of tokens that are one and the same."""
        window, draws = torch.empty(rows, LENGTH + 1).long(), generator("certificate", seed)
        window.random_(BEGIN + 1, self.vocab_size, generator=draws)
        window[torch.rand(window.shape, generator=draws) < 0.1] = END
        window[torch.rand(window.shape, generator=draws) < same] = self.vocab_size - 1
        real = torch.ones(rows, LENGTH, dtype=torch.bool)
        if padding:
            real.view(-1)[-padding:] = False
            real[0, max(LENGTH - padding, 1) :] = padding >= LENGTH
        return batch_of(window, real, mix(generator("key", seed, keys).initial_seed(), torch.arange(rows)))

    def hidden(self, seed: object, rows: int = 2 * GROUP, alike: float = 0.0) -> Tensor:
        """(B, S, D) float64, normal; alike: the size of what all rows have in common, so that experts overflow."""
        draws = generator("hidden", seed)
        shape = (self.settings.d_model,)
        common = torch.randn(shape, generator=draws, dtype=torch.float64)
        return torch.randn(rows, LENGTH, *shape, generator=draws, dtype=torch.float64) + alike * common


def batch_of(window: Tensor, real: Tensor, key: Tensor) -> Batch:
    document = torch.cumsum(window == END, 1) - (window == END).long()
    return make_batch(window, document, real, key)


def window_of(batch: Batch) -> Tensor:
    """(B, S+1) the window that a batch was made of."""
    return torch.cat([batch.tokens.id, batch.target[:, -1:]], 1)


def shaken(module: Any, seed: int) -> Any:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.5, generator=generator(seed, "shaken", name))
    return module


def see_training(router: Router, steps: int = 10) -> None:
    """All of training, in a few steps in which expert 0 has most of the load."""
    load = torch.ones(router.site.num_experts, dtype=torch.int64)
    load[0] = 100
    for step in range(steps):
        router.after_step(load, (step + 1) / steps)


def gates(routing: Routing, tokens: int, router: Router) -> Tensor:
    """(T, N, E) the summed weights: what a routing does, however it is written down."""
    experts, segments = router.site.num_experts, router.segments
    place = torch.arange(len(routing.expert)) % segments
    index = (routing.token * segments + place) * experts + routing.expert
    total = torch.zeros(tokens * segments * experts, dtype=routing.weight.dtype)
    return total.index_add(0, index, routing.weight).view(tokens, segments, experts)


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    return batch.apply(lambda tensor: tensor.index_select(0, rows))


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that could follow training: parameters, buffers, and plain values that modules hold."""
    state: dict[str, Any] = {name: t.detach().clone() for name, t in module.named_parameters()}
    state |= {name: t.detach().clone() for name, t in module.named_buffers()}
    for place, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                state[f"{place}.{name}"] = value.detach().clone()
            elif isinstance(value, bool | int | float | str | list | dict) and name != "training" and name[0] != "_":
                state[f"{place}.{name}"] = repr(value)
    return state


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs."""

    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other

    names = before.keys() | after.keys()
    texts = {name for name in names if isinstance(before.get(name), str) and before[name] == after.get(name)}
    return sorted(name for name in names - texts if not same(before.get(name), after.get(name)))


@contextmanager
def watched() -> Iterator[list[str]]:
    """Names the global generators that the block touches; they are put back."""
    touched: list[str] = []
    numpy_state, python_state = np.random.get_state(), random.getstate()

    def states() -> dict[str, object]:
        name, keys, *rest = np.random.get_state()
        return {
            "torch": torch.get_rng_state().numpy().tobytes(),
            "numpy": (name, np.asarray(keys).tobytes(), rest),
            "random": random.getstate(),
        }

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240607)  # a state that no reset to a usual seed gives
        np.random.seed(20240607)
        random.seed(20240607)
        before = states()
        try:
            yield touched
        finally:
            touched += [name for name, state in states().items() if state != before[name]]
            np.random.set_state(numpy_state)
            random.setstate(python_state)
