"""Settings -> router, model."""

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batches import Batch, evaluation_batches
from data.mixed_batches import open_split
from data.mixture import Mixture, prepare_mixture
from data.prepare import Prepared, prepare
from data.source import divided, length_of_source, positions
from data.tokenizer import BEGIN, END, Dictionary
from models.dispatch import choose_path
from models.experts import ExpertLayer
from models.transformer import Transformer
from routers.routing import Plan, Router, Site
from training.evaluation import Compute, Losses, token_losses
from training.settings import Settings
from training.targets import target


def make_router(
    settings: Settings,
    layer: int,
    token_counts: Tensor,
    training_text: Callable[[], Iterable[Batch]] | None = None,
    baseline: nn.Module | None = None,
    length: int | None = None,
) -> Router:
    """The router of one layer. token_counts (V,) int64. Raises ValueError as the router does.

    training_text: None only to check options; baseline: see Site; length: of the sequences it sees, None as the data's.
    """
    router, options = target({key: value for key, value in settings.router.items() if key != "baseline"}, 1, "router")
    if not issubclass(router, Router):
        path = settings.router["_target_"]
        raise ValueError(f"router._target_ must be a class of routers.routing.Router; got {path}")
    site = Site(
        layer=layer,
        num_experts=settings.num_experts,
        d_model=settings.model.scaled().d_model,
        vocab_size=len(token_counts),
        token_counts=token_counts,
        begin=BEGIN,
        end=END,
        routing_group=settings.train.routing_group,
        seed=settings.seed,
        table_seed=settings.table_seed,
        sequence_length=length or settings.data.sequence_length,
        sparse_layers=tuple(sorted(settings.model.sparse_layers)),
        training_text=training_text,
        baseline=baseline,
        in_encoder=settings.model.sparse_in == "encoder",
    )
    return router(site, **options)


def router_maker(
    settings: Settings, prepared: Prepared, baseline: Transformer | None = None
) -> Callable[[int], Router]:
    """Gives the router of a layer as it is trained, knowing the training text. baseline: see make_model."""
    length = routed_length(settings, source_length(settings, prepared))

    def training_text() -> Iterable[Batch]:
        return whole_split(settings, prepared, "train", 64)

    def router(layer: int) -> Router:
        with torch.device("cpu"):  # tables are drawn also for a model that is only counted, on the meta device
            return make_router(settings, layer, prepared.token_counts, training_text, baseline, length)

    return router


def routed_length(settings: Settings, source_length: int | None) -> int:
    """Of the sequences that routers see. source_length: as data.source.divided takes it."""
    lengths = positions(settings.data.sequence_length, source_length, settings.model.encoder_layers)
    return lengths.encoder if settings.model.sparse_in == "encoder" else lengths.decoder


def whole_split(settings: Settings, prepared: Prepared, split: str, batch_size: int) -> Iterable[Batch]:
    """A split as the model reads it, in order: of an encoder-decoder divided between both sides."""
    windows = open_split(prepared, split, settings.data.sequence_length, settings.data.packing)
    batches = evaluation_batches(windows, batch_size)
    if settings.model.encoder_layers == 0:
        return batches
    read = source_length(settings, prepared)
    return (divided(batch, read) for batch in batches)


def source_length(settings: Settings, prepared: Prepared) -> int | None:
    """What an encoder reads, as data.source.divided takes it. Raises ValueError for a length of dialogues."""
    given = settings.data.source_length
    of_dialogues = any(each.counted for each in (prepared, *(part.prepared for part in prepared.parts)))
    if of_dialogues and given is not None:
        rule = "must be null for dialogues, of which the encoder reads each one's context"
        raise ValueError(f"data.source_length {rule}; got {given}")
    return length_of_source(given, settings.data.sequence_length, of_dialogues)


def make_model(
    settings: Settings, prepared: Prepared, device: torch.device, baseline: Transformer | None = None
) -> Transformer:
    """The model with its first values, on the CPU, for training on this device. Raises ValueError as its parts do.

    baseline: the trained model that settings.router["baseline"] names.
    """
    dtype = torch.bfloat16 if precision(settings, device) == "bf16" else torch.float32
    model, train = settings.model.scaled(), settings.train
    tokens = (train.micro_batch or train.batch_size) * settings.data.sequence_length
    path = choose_path(settings.model.dispatch, device, dtype, tokens * model.d_model * model.d_ff)
    router, read = router_maker(settings, prepared, baseline), source_length(settings, prepared)
    return _assembled(settings, prepared.vocab_size, router, path, baseline, read)


def outline(settings: Settings, vocab_size: int, source_length: int | None = None) -> Transformer:
    """The model on the meta device, which counts and has no values: its tables are zeros, a baseline is a dense model
    of its size. Raises ValueError as make_model does, but for what the text decides."""
    counts, baseline = torch.ones(vocab_size, dtype=torch.int64), None
    with torch.device("meta"):
        if settings.router.get("baseline"):
            baseline = outline(replace(settings, router={"_target_": None}), vocab_size, source_length)

        def router(layer: int) -> Router:
            with torch.device("cpu"):
                length = routed_length(settings, source_length)
                return make_router(settings, layer, counts, baseline=baseline, length=length)

        return _assembled(settings, vocab_size, router, "loop", baseline, source_length)


def _assembled(
    settings: Settings,
    vocab_size: int,
    router: Callable[[int], Router],
    path: str,
    baseline: Transformer | None,
    source_length: int | None,
) -> Transformer:
    options = {key: value for key, value in settings.experts.items() if key != "num_shared"}
    experts, options = target(options | ({"biases": True} if settings.model.biases else {}), skip=4)
    model, routed = settings.model.scaled(), settings.router["_target_"] is not None

    def make_experts(count: int, d_ff: int) -> ExpertLayer:
        return experts(count, model.d_model, d_ff, model.activation, **options)

    return Transformer(
        model,
        vocab_size,
        settings.data.sequence_length,
        settings.num_experts,
        router if routed else None,
        make_experts,
        settings.seed,
        path,
        settings.experts["num_shared"],
        settings.data.mask_documents,
        baseline,
        source_length,
    )


def precision(settings: Settings, device: torch.device) -> str:
    """bf16 or float32: auto is bf16 on a GPU."""
    wanted = settings.train.precision
    return wanted if wanted != "auto" else "bf16" if device.type == "cuda" else "float32"


def choose_device(settings: Settings) -> torch.device:
    """auto is the GPU if there is one."""
    wanted = settings.device
    return torch.device(wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def compute_deterministically() -> None:
    """From here on this process computes with the same bits each time on a GPU, compiled or not; an operation of which
    torch has no such kernel is a RuntimeError that names it. To be called before the first product on the GPU."""
    from torch._inductor import config as inductor  # takes seconds to import

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses to go without
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    inductor.deterministic = True  # does not choose kernels by their time


def is_compiled(settings: Settings, model: Transformer, device: torch.device) -> bool:
    """Whether the run asks for it, and neither runs a loop over experts, which waits for the device, nor F.grouped_mm
    in float32, which the compiler refuses."""
    refused = {"loop", *({"grouped_mm"} if precision(settings, device) == "float32" else ())}
    return settings.train.compile and not (model.routers and model.path in refused)


def make_losses(settings: Settings, model: Transformer, device: torch.device) -> Compute:
    """evaluation.token_losses in the run's precision, compiled as is_compiled says."""
    # router scores stay in float32 on purpose; the compiler would advise TensorFloat32
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    compute = token_losses
    if is_compiled(settings, model, device):
        from torch._functorch import config

        # what our autograd functions do is in the graph: the next process may take it from the cache
        config.autograd_cache_allow_custom_autograd_functions = True
        compute = torch.compile(token_losses)
    lower = precision(settings, device) == "bf16"

    def losses(batch: Batch, plans: dict[int, Plan]) -> Losses:
        with torch.autocast(device.type, torch.bfloat16, enabled=lower):
            return compute(model, batch, plans)

    return losses


def open_data(settings: Settings) -> Prepared:
    """The run's data, prepared if need be. Raises ValueError for unusable data."""
    return _open_data(json.dumps(settings.data.corpus), json.dumps(settings.tokenizer), settings.data.cache, True)


def find_data(settings: Settings) -> Prepared:
    """The run's data, without writing anything. Raises NotPrepared if it is not prepared, ValueError as open_data."""
    found = _found_data(json.dumps(settings.data.corpus), json.dumps(settings.tokenizer), settings.data.cache)
    if isinstance(found, ValueError):
        raise found
    return found


@functools.cache
def _found_data(corpus_node: str, tokenizer_node: str, cache: str) -> Prepared | ValueError:
    try:
        return _open_data(corpus_node, tokenizer_node, cache, False)
    except ValueError as error:
        return error


@functools.cache  # the jobs of a sweep mostly share their data
def _open_data(corpus_node: str, tokenizer_node: str, cache: str, build: bool) -> Prepared:
    kind, options = target(json.loads(corpus_node))
    dictionary, corpus = make_dictionary(json.loads(tokenizer_node)), kind(**options)
    make = prepare_mixture if isinstance(corpus, Mixture) else prepare
    return make(corpus, dictionary, Path(cache).expanduser(), build=build)


def make_dictionary(node: dict[str, Any]) -> Dictionary:
    """What the group `tokenizer` describes. Raises ValueError for options or a file that cannot be."""
    dictionary, options = target(node, place="tokenizer")
    if not all(hasattr(dictionary, method) for method in ("digest", "size", "make")):
        raise ValueError(f"tokenizer._target_ must be a class with digest, size and make; got {node['_target_']}")
    return dictionary(**options)
