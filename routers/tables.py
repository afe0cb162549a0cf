"""Tables: keys -> experts. Drawn once from a named generator, before training.

E experts, V keys. p1 is the most frequent key's share: no table can load its fullest expert with less than
max(1, p1 E) times the mean.
"""

import heapq

import torch
from torch import Tensor


def random_table(counts: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Each key gets a uniformly random expert (Hash Layers, section 3.1). counts (V,) -> (V,) int64."""
    return torch.randint(num_experts, counts.shape, generator=generator)


def balanced_table(counts: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Keys in falling order of frequency go one by one to the expert with the least load so far (Hash Layers, 3.1).

    Done plainly this has no draw: two tables would be one partition under other names. So keys are visited in order
    of count * exp(0.1 z), z standard normal; loads add the true counts; ties go to a random least-loaded expert.
    Keys that training never shows carry no load, and would all meet in one expert: theirs is uniformly random.
    counts (V,) -> (V,) int64.
    """
    noise = torch.randn(counts.shape, generator=generator, dtype=torch.float64)
    order = torch.argsort(counts * torch.exp(0.1 * noise), descending=True, stable=True).tolist()
    ties = torch.randint(2**31, counts.shape, generator=generator).tolist()
    frequency = counts.tolist()
    groups: dict[int, list[int]] = {0: list(range(num_experts))}  # load -> experts that have it
    loads = [0]  # a heap of the loads in groups
    table = torch.randint(num_experts, counts.shape, generator=generator).tolist()
    for key in order[: int((counts > 0).sum())]:
        experts = groups[loads[0]]
        choice = ties[key] % len(experts)
        experts[choice], experts[-1] = experts[-1], experts[choice]
        table[key] = experts.pop()
        load = loads[0] + frequency[key]
        if not experts:
            del groups[heapq.heappop(loads)]
        if load not in groups:
            groups[load] = []
            heapq.heappush(loads, load)
        groups[load].append(table[key])
    return torch.tensor(table)


TABLES = {"random": random_table, "balanced": balanced_table}


def balance_bound(counts: Tensor, num_experts: int) -> float:
    """The least possible load of the fullest expert over the mean load: max(1, p1 E, (p_E + p_{E+1}) E)."""
    share = (counts.double() / counts.sum()).sort(descending=True).values
    pair = share[num_experts - 1 : num_experts + 1].sum() if len(share) > num_experts else share.new_zeros(())
    return max(1.0, float(share[0]) * num_experts, float(pair) * num_experts)
