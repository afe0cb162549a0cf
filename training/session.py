"""A run in memory: what trains, how far it is, how it is measured and how it is saved."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.mixed_batches import MixedSplit
from data.tokenizer import decode, load_tokenizer
from models.transformer import Transformer
from training import checkpoint
from training.build import (
    choose_device,
    compute_deterministically,
    is_compiled,
    make_losses,
    make_model,
    precision,
)
from training.evaluation import Compute, evaluate, mean_ce, text_figures
from training.folder import require_space
from training.loop import Diverged, Progress
from training.optimizer import freeze, make_optimizer, trained
from training.provenance import provenance
from training.run import Run

SPLITS = {"val": "validation", "test": "test"}  # name of the figures -> split


@dataclass
class Session:
    """best: with early stopping, the weights of the best validation, on the CPU; assigned: by layer, how often
    the last validation sent each token id to each expert (V, E)."""

    run: Run
    device: torch.device
    model: Transformer
    optimizer: torch.optim.AdamW
    losses: Compute
    progress: Progress
    origin: dict[str, Any]  # what provenance.json holds
    best: dict[str, Tensor] = field(default_factory=dict)
    assigned: dict[str, Tensor] = field(default_factory=dict)
    evaluate_seconds: float = field(default=0.0, init=False)  # with what a GPU compiles for it at first

    def measure(
        self,
        split: str,
        as_in_training: bool = False,
        windows: int | None = None,
        watch: Callable[[float], None] = lambda share: None,
    ) -> dict[str, Tensor]:
        """evaluation.evaluate's sums over a split, or so many windows of it. Raises Diverged if they are not finite,
        and ValueError if no token of these windows counts."""
        train, counts, text = self.run.settings.train, self.run.prepared.token_counts, self.run.splits[split]
        batch, began = train.micro_batch or train.batch_size, time.perf_counter()
        graph = self.by_training_graph
        sums = evaluate(self.model, self.losses, text, batch, counts, as_in_training, windows, watch, graph)
        self.evaluate_seconds += time.perf_counter() - began
        if not sums["tokens"]:
            raise ValueError(f"no token counts in record.validation_windows={windows} windows; name more")
        if not math.isfinite(mean_ce(sums)):
            raise Diverged(self.progress.step)
        return sums

    @property
    def by_training_graph(self) -> bool:
        """What is compiled is evaluated so, where all is this repository's own: in that, routers alone may do otherwise
        in training, and say so; what comes from elsewhere may have dropout."""
        return self.origin["compiled"] and not self.run.settings.extra_packages

    def by_corpus(self, split: str, sums: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
        """The figures of each corpus of a mixture, from the sums over all of them."""
        windows, figures = self.run.splits[split], {}
        for part in self.run.prepared.parts:
            assert isinstance(windows, MixedSplit)
            own = windows.documents[part.name]
            ce_sum, tokens = (float(sums[f"document_{key}"][own].sum()) for key in ("ce_sum", "tokens"))
            ce, text = ce_sum / tokens if tokens else math.nan, part.prepared.splits[split]
            figures[part.name] = {"ce": ce, "perplexity": math.exp(ce), "tokens": int(tokens)} | text_figures(
                ce, int(tokens), text
            )
        return figures

    def validate(self, watch: Callable[[str, float], None]) -> dict[str, Any]:
        """The figures of a validation. With early stopping it is compared with the best so far, whose weights stay.
        watch: see held_out."""
        windows, progress = self.run.settings.record.validation_windows, self.progress
        sums = self.measure("validation", windows=windows, watch=partial(watch, "validation"))
        figures = {"val/ce": mean_ce(sums), "val/tokens": int(sums["tokens"])}
        figures |= {f"val/{name}/ce": each["ce"] for name, each in self.by_corpus("validation", sums).items()}
        figures |= self.settled(sums)
        if self.run.settings.train.patience is None:
            return figures
        if progress.best_ce is None or figures["val/ce"] < progress.best_ce:
            progress.best_ce, progress.best_step, progress.waited = figures["val/ce"], progress.step, 0
            # copied even on a CPU, where training goes on in place
            self.best = {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}
        else:
            progress.waited += 1
        return figures | {"best_step": progress.best_step}

    def settled(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """For each sparse layer the share of a validation's assignments, of each token id to each expert, that the
        validation before it made too; nothing at the first."""
        figures, before = {}, self.assigned
        self.assigned = {str(layer): sums[f"token_expert/{layer}"].int() for layer in self.model.routers}
        for layer, last in before.items():
            now = self.assigned[layer]
            most = max(int(now.sum()), int(last.sum()), 1)
            figures[f"route/{layer}/settled"] = int(torch.minimum(now, last).sum()) / most
        return figures

    def save(self) -> None:
        """A checkpoint of this step."""
        files = {"model": self.model.state_dict()}
        files["optimizer"] = checkpoint.optimizer_tensors(self.model, self.optimizer)
        files |= {name: kept for name, kept in (("best", self.best), ("assigned", self.assigned)) if kept}
        checkpoint.save(self.run.folder / "checkpoints", self.progress.step, files, asdict(self.progress))

    def held_out(self, watch: Callable[[str, float], None]) -> dict[str, Any]:
        """The result's figures of validation and test, of the best weights if they were kept; what they are made of
        goes into evaluation.safetensors. watch is told before each batch which split is read, and the share done."""
        if self.best:
            self.model.load_state_dict(self.best)
        result, tensors = {}, {}
        for name, split in SPLITS.items():
            sums = self.measure(split, watch=partial(watch, split))
            ce = mean_ce(sums)
            result |= {f"{name}/ce": ce, f"{name}/perplexity": math.exp(ce), f"{name}/tokens": int(sums["tokens"])}
            text = self.run.prepared.splits[split]
            result[f"{name}/unigram_entropy"] = text["unigram_entropy"]
            result |= {f"{name}/{key}": value for key, value in text_figures(ce, int(sums["tokens"]), text).items()}
            for corpus, each in self.by_corpus(split, sums).items():
                result |= {f"{name}/{corpus}/{key}": value for key, value in each.items()}
            if any(router.trains_differently for router in self.model.routers.values()):
                again = self.measure(split, as_in_training=True, watch=partial(watch, f"{split} as in training"))
                result[f"{name}/ce_as_in_training"] = mean_ce(again)
            tensors |= {f"{split}/{key}": value for key, value in sums.items()}
        names = {"frequent_tokens": json.dumps(self.frequent_tokens())}
        save_file(tensors, self.run.folder / "evaluation.safetensors", names)
        return result

    def frequent_tokens(self, most: int = 64) -> list[tuple[int, str]]:
        """Id and text of the tokens that are most frequent in training, in falling order, for who draws experts."""
        counts = self.run.prepared.token_counts
        ids = counts.argsort(descending=True, stable=True)[: min(most, int((counts > 0).sum()))].tolist()
        tokenizer = load_tokenizer(self.run.prepared.folder)
        return [(token, decode(tokenizer, [token])) for token in ids]


def open_session(run: Run) -> Session:
    """At the newest checkpoint; without one at the weights of train.init_from, or at first values.

    Raises ValueError for weights that do not fit, damaged checkpoints and a disk that has no room for new ones.
    """
    settings, folder, device = run.settings, run.folder, choose_device(run.settings)
    if settings.deterministic and device.type == "cuda":
        compute_deterministically()
    model = make_model(settings, run.prepared, device, checkpoint.load_baseline(settings, device)).to(device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    require_space(folder, 9 * weights)  # for two checkpoints: weights, two moments, the best weights
    optimizer, progress, kept = make_optimizer(model, settings.train), Progress(), {}
    last = checkpoint.latest(folder / "checkpoints")
    if last is not None:
        state, kept = checkpoint.restore(last, model, optimizer)
        progress = Progress(**state)
    elif settings.train.init_from is not None:
        checkpoint.fit(model, checkpoint.weights_of(Path(settings.train.init_from)))
    freeze(model, settings.train.update)  # after loading, upon which a router may choose what it trains
    origin = provenance(run.prepared, model, device, precision(settings, device), settings.extra_packages)
    origin["compiled"] = is_compiled(settings, model, device)
    origin["parameters"]["trained"] = sum(p.numel() for p in trained(model, settings.train.update).values())
    return Session(run, device, model, optimizer, make_losses(settings, model, device), progress, origin, **kept)
