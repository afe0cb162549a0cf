"""Tables: keys -> experts, fixed before training (Hash Layers, section 3.1; facts and choices in each docstring).

python -m routers.tables build | audit | export: see routers.workbench.

E experts, K keys, k experts a key. p1 is the most frequent key's share: no table can load its fullest expert with less
than max(1, p1 E / k) times the mean.
"""

import heapq
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from routers.routing import Site, count

UNCOUNTED = ("random", "modulo", "distilled", "file")  # tables that ask how many keys there are, not how frequent
TEACHER_TOKENS = 1 << 20  # of the training split, from which a learned router's table is read


class Keys(NamedTuple):
    """What a table is drawn from."""

    counts: Tensor  # (K,) int64, how often each key stands in the training split; all 1 for UNCOUNTED tables
    site: Site
    generator: torch.Generator
    k: int = 1  # different experts of one key
    file: str | None = None  # a safetensors file with one table


def random_table(keys: Keys) -> Tensor:
    """Each key gets a uniformly random expert, or k different ones."""
    if keys.k == 1:
        return torch.randint(keys.site.num_experts, (len(keys.counts), 1), generator=keys.generator)
    return torch.rand(len(keys.counts), keys.site.num_experts, generator=keys.generator).argsort(1)[:, : keys.k]


def modulo_table(keys: Keys) -> Tensor:
    """id mod E, and the experts after it."""
    return (torch.arange(len(keys.counts))[:, None] + torch.arange(keys.k)) % keys.site.num_experts


def balanced_table(keys: Keys) -> Tensor:
    """Keys in falling order of frequency go one by one to the expert (the k experts) with the least load so far.

    Done plainly this has no draw: two tables would be one partition under other names. So keys are visited in order
    of count * exp(0.1 z), z standard normal; loads add the true counts; ties go to a random least-loaded expert.
    Keys that training never shows carry no load, and would all meet in one expert: theirs are random.
    """
    noise = torch.randn(keys.counts.shape, generator=keys.generator, dtype=torch.float64)
    order = torch.argsort(keys.counts * torch.exp(0.1 * noise), descending=True, stable=True).tolist()
    table, frequency = random_table(keys).tolist(), keys.counts.tolist()
    experts = torch.randperm(keys.site.num_experts, generator=keys.generator).tolist()
    ties = torch.randint(2**31, (len(frequency), keys.k), generator=keys.generator).tolist()
    least = [(0, turn, expert) for turn, expert in enumerate(experts)]  # a heap of (load, random, expert)
    for key in order[: int((keys.counts > 0).sum())]:
        chosen = [heapq.heappop(least) for _ in range(keys.k)]
        table[key] = [expert for _, _, expert in chosen]
        for (load, _, expert), tie in zip(chosen, ties[key]):
            heapq.heappush(least, (load + frequency[key], tie, expert))
    return torch.tensor(table)


def distilled_table(keys: Keys) -> Tensor:
    """The expert that a trained learned router of this layer gave each token most often; unseen tokens: random.

    Tabulated over the first TEACHER_TOKENS of the training split. Raises ValueError if the run has no such router.
    """
    teacher, site = keys.site.baseline, keys.site
    seen, experts = 0, torch.zeros(len(keys.counts) * site.num_experts, dtype=torch.int64)
    assert teacher is not None and site.training_text is not None
    for batch in site.training_text():
        tokens = batch.routed(site.in_encoder)
        routing = teacher.infer(batch).routings.get(site.layer)  # type: ignore[operator]
        if routing is None or teacher.num_experts != site.num_experts:
            wanted = f"a routed layer {site.layer} with {site.num_experts} experts"
            raise ValueError(f"router.baseline must be a run with {wanted} for router.table=distilled")
        token, expert, weight = routing.token.cpu(), routing.expert.cpu(), routing.weight.cpu()
        pair = tokens.id.reshape(-1).index_select(0, token) * site.num_experts + expert
        experts += count(pair, len(experts), (weight > 0).long())
        seen += tokens.id.numel()
        if seen >= TEACHER_TOKENS:
            break
    votes = experts.view(-1, site.num_experts)
    return torch.where(votes.sum(1) > 0, votes.argmax(1), random_table(keys)[:, 0])[:, None]


def file_table(keys: Keys) -> Tensor:
    """The tensor tid2eid (K, k) of a safetensors file, or this layer's layers.<layer>.tid2eid, as export writes them.

    Raises ValueError if there is none of that shape.
    """
    own = f"layers.{keys.site.layer}.tid2eid"
    try:
        tensors = load_file(keys.file or "")
        table = tensors[own if own in tensors else "tid2eid"]
    except (OSError, KeyError, SafetensorError) as error:
        rule = f"is no safetensors file with a tensor tid2eid, or {own}"
        raise ValueError(f"router.file={keys.file} {rule}: {error}") from error
    if table.is_floating_point():
        raise ValueError(f"router.file={keys.file}: tid2eid must hold whole numbers; got {table.dtype}")
    if table.shape != (len(keys.counts), keys.k):
        raise ValueError(
            f"router.file={keys.file}: tid2eid must be (keys, experts of a key) = {(len(keys.counts), keys.k)}; "
            f"got {tuple(table.shape)}"
        )
    return table.long()


def check_table(table: Tensor, num_experts: int) -> None:
    """Raises ValueError if an entry is no expert."""
    if bool(((table < 0) | (table >= num_experts)).any()):
        raise ValueError(f"a table must hold experts 0..{num_experts - 1}; got {int(table.min())}..{int(table.max())}")


def balance_bound(counts: Tensor, num_experts: int, k: int = 1) -> float:
    """The least possible load of the fullest expert over the mean load: max(1, p1 E / k), and for k = 1 also
    (p_E + p_{E+1}) E. counts (K,)."""
    share = (counts.double() / counts.sum()).sort(descending=True).values
    pair = share[num_experts - 1 : num_experts + 1].sum() if len(share) > num_experts and k == 1 else 0.0
    return max(1.0, float(share[0]) * num_experts / k, float(pair) * num_experts)


if __name__ == "__main__":
    from routers.workbench import main

    main()
