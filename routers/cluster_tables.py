"""Tables from the token embeddings of a trained baseline: alike tokens together, or apart (Hash Layers, section 3.1).

E experts, V vocabulary
"""

import torch
from torch import Tensor

from routers.tables import Keys


def clusters(keys: Keys) -> tuple[Tensor, Tensor]:
    """k-means of the baseline's token embeddings, E clusters, over types: cluster (V,) and distances (V, E)."""
    from sklearn.cluster import KMeans  # takes seconds to import, and other tables do not need it
    from threadpoolctl import threadpool_limits

    assert keys.site.baseline is not None
    embedding = keys.site.baseline.get_parameter("embedding").detach().double().cpu().numpy()
    seed = int(torch.randint(2**31, (), generator=keys.generator))
    with threadpool_limits(1):  # the order of threads would be in the sums
        means = KMeans(keys.site.num_experts, n_init=3, random_state=seed).fit(embedding)  # type: ignore[arg-type]
        return torch.from_numpy(means.labels_).long(), torch.from_numpy(means.transform(embedding))


def clustered_table(keys: Keys) -> Tensor:
    """The token's cluster."""
    return clusters(keys)[0][:, None]


def clustered_balanced_table(keys: Keys) -> Tensor:
    """In falling frequency, each token goes to the nearest cluster with room for it: mean load, or its own if empty."""
    distance, mean = clusters(keys)[1], float(keys.counts.sum()) / keys.site.num_experts
    load, table = torch.zeros(keys.site.num_experts, dtype=torch.float64), torch.zeros(len(distance), 1).long()
    for key in keys.counts.argsort(descending=True, stable=True).tolist():
        room = (load + keys.counts[key] <= mean) | (load == 0)
        room |= load == load.min()  # the last ones may fit nowhere
        table[key] = distance[key].masked_fill(~room, torch.inf).argmin()
        load[table[key]] += keys.counts[key]
    return table


def dispersed_table(keys: Keys) -> Tensor:
    """Within a cluster, in falling frequency, each token goes to the expert with fewest of it, then the least load."""
    cluster, load = clusters(keys)[0], torch.zeros(keys.site.num_experts, dtype=torch.int64)
    members = torch.zeros(keys.site.num_experts, keys.site.num_experts, dtype=torch.int64)  # of cluster and expert
    table = torch.zeros(len(cluster), 1, dtype=torch.int64)
    for key in keys.counts.argsort(descending=True, stable=True).tolist():
        fewest = members[cluster[key]] == members[cluster[key]].min()
        expert = int(torch.where(fewest, load, torch.iinfo(torch.int64).max).argmin())
        members[cluster[key], expert] += 1
        load[expert] += keys.counts[key]
        table[key] = expert
    return table


def dispersed_unbalanced_table(keys: Keys) -> Tensor:
    """Each cluster's tokens are dealt out evenly over the experts, in random order and whatever they weigh."""
    cluster, table = clusters(keys)[0], torch.zeros(len(keys.counts), 1).long()
    for number in range(keys.site.num_experts):
        members = torch.nonzero(cluster == number)[:, 0]
        members = members[torch.randperm(len(members), generator=keys.generator)]
        first = int(torch.randint(keys.site.num_experts, (), generator=keys.generator))
        table[members, 0] = (first + torch.arange(len(members))) % keys.site.num_experts
    return table
