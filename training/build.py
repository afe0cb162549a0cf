"""Settings -> router, model."""

import functools
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from data.batches import Batch
from data.prepare import Prepared, prepare
from data.tokenizer import BEGIN, END
from models.dispatch import choose_path
from models.experts import Experts
from models.transformer import Transformer
from routers.routing import Plan, Router, Site
from training.evaluation import Compute, Losses, token_losses
from training.settings import Settings
from training.targets import target


def make_router(settings: Settings, layer: int, token_counts: Tensor) -> Router:
    """The router of one layer. token_counts (V,) int64. Raises ValueError as the router does."""
    router, options = target(settings.router, skip=1)
    if not issubclass(router, Router):
        path = settings.router["_target_"]
        raise ValueError(f"router._target_ must be a class of routers.routing.Router; got {path}")
    sizes = settings.num_experts, settings.model.d_model, len(token_counts)
    site = Site(layer, *sizes, token_counts, BEGIN, END, settings.train.routing_group, settings.seed)
    return router(site, **options)


def make_model(settings: Settings, prepared: Prepared, device: torch.device) -> Transformer:
    """The model with its first values, on the CPU, for training on this device. Raises ValueError as its parts do."""
    experts, options = target(settings.experts, skip=4)
    model, routed = settings.model, settings.router["_target_"] is not None

    def make_experts(count: int) -> Experts:
        return experts(count, model.d_model, model.d_ff, model.activation, **options)

    routers = functools.partial(make_router, settings, token_counts=prepared.token_counts) if routed else None
    sizes = prepared.vocab_size, settings.data.sequence_length, settings.num_experts
    dtype = torch.bfloat16 if precision(settings, device) == "bf16" else torch.float32
    path = choose_path(model.dispatch, device, dtype)
    return Transformer(model, *sizes, routers, make_experts, settings.seed, path)


def precision(settings: Settings, device: torch.device) -> str:
    """bf16 or float32: auto is bf16 on a GPU."""
    wanted = settings.train.precision
    return wanted if wanted != "auto" else "bf16" if device.type == "cuda" else "float32"


def choose_device(settings: Settings) -> torch.device:
    """auto is the GPU if there is one."""
    wanted = settings.device
    return torch.device(wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def make_losses(settings: Settings, model: Transformer, device: torch.device) -> Compute:
    """evaluation.token_losses in the run's precision, compiled if the run asks for it."""
    # router scores stay in float32 on purpose; the compiler would advise TensorFloat32
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    compute = torch.compile(token_losses) if settings.train.compile else token_losses
    lower, mask_documents = precision(settings, device) == "bf16", settings.data.mask_documents

    def losses(batch: Batch, plans: dict[int, Plan]) -> Losses:
        with torch.autocast(device.type, torch.bfloat16, enabled=lower):
            return compute(model, batch, plans, mask_documents)

    return losses


def open_data(settings: Settings) -> Prepared:
    """The run's data, prepared if need be. Raises ValueError for unusable data."""
    return _open_data(json.dumps(settings.data.corpus), settings.data.vocab_size, settings.data.cache)


@functools.cache  # the jobs of a sweep mostly share their data
def _open_data(corpus_node: str, vocab_size: int, cache: str) -> Prepared:
    corpus, options = target(json.loads(corpus_node))
    return prepare(corpus(**options), vocab_size, Path(cache).expanduser())
