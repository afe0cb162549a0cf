"""The audit of a corpus's tables as text for a reader: loads, collisions, and what tables have in common."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations

from tabulate import tabulate

from data.batches import Batch
from routers.features import Token
from routers.hash import Lookup
from routers.table_figures import (
    FREQUENT,
    RARE,
    Part,
    Seen,
    chance,
    entropy,
    frequent_collisions,
    mutual_information,
    parts_of,
    rare_and_heavy,
    rare_beside_heavy,
    route,
)
from routers.tables import Keys, balance_bound, random_table

SPLITS = {"training": "train", "validation": "validation"}


def card(
    name: str,
    fingerprint: str,
    lookups: dict[int, Lookup],
    every_expert: bool,
    batches_of: Callable[[str, int], Iterable[Batch]],
) -> str:
    """name: of the arm; fingerprint: of the data; lookups: sparse layer -> its router; batches_of: (split, windows in a
    batch) -> the whole split. Routes the training and the validation text."""
    parts, router = parts_of(lookups), next(iter(lookups.values()))
    seen = {text: route(parts, partial(batches_of, split)) for text, split in SPLITS.items()}
    texts = [f"{int(counted.tokens.sum()):,} {text} tokens" for text, counted in seen.items()]
    site, layers = router.site, ", ".join(map(str, lookups))
    which = f"table={router.name}" + (f" of {router.file}" if router.name == "file" else "")
    keys = f"{router.feature.size:,} keys" + (", the token ids" if isinstance(router.feature, Token) else "")
    head = [
        f"{name}: feature={router.feature_name} ({keys}), {which}, {site.num_experts} experts, seed {site.draws}",
        f"layers with a table: {layers} (sparse layers: {', '.join(map(str, site.sparse_layers))})",
        f"text: {' and '.join(texts)} (data {fingerprint[:12]})",
    ]
    blocks = ["\n".join(head), loads(parts, seen)]
    if every_expert:
        blocks.append(all_loads(parts, seen))
    return "\n\n".join([*blocks, collisions(parts, seen["training"]), common(parts, seen["training"])])


def loads(parts: dict[str, Part], seen: dict[str, Seen]) -> str:
    """Load of the experts, in a few figures, beside the bounds on the split's own frequencies."""
    headers = ["layer", "text", "fullest\nexpert", "emptiest\nexpert", "without\na token", "entropy\nof loads"]
    headers += ["fullest\nover mean", "no table of these\nkeys is below", "no table of token\nids is below"]
    rows, below = [], []
    by_token = all(isinstance(part.lookup.feature, Token) for part in parts.values())
    for name, part in parts.items():
        for text, counted in seen.items():
            load, (experts, k) = counted.loads[name], part.sizes
            share = load.double() / load.sum()
            fullest = float(share.max() * experts)
            bounds = [balance_bound(counts, experts, k) for counts in (counted.keys, counted.tokens)]
            extremes = [f"{percent(float(share[at]))} (#{int(at)})" for at in (share.argmax(), share.argmin())]
            even = f"{entropy(load) / math.log(experts) if experts > 1 else 1:.3f}"
            row = [name, text, *extremes, str(int((load == 0).sum())), even, f"{fullest:.2f}"]
            rows.append(row + [f"{bound:.2f}" for bound in bounds])
            if fullest < 0.99 * bounds[1]:  # less is but the windows' and documents' edges
                below.append(
                    f"Layer {name}, {text} text: the fullest expert has {fullest:.2f} times the mean load, "
                    f"below {bounds[1]:.2f}, which no table of token ids can beat."
                )
    if by_token:  # the two bounds are one
        headers, rows = [*headers[:-2], headers[-1]], [row[:-1] for row in rows]
    notes = [
        "Loads are shares of the assignments of real tokens. Entropy is over its maximum, log E: 1 is even.",
        "The bound: max(1, p1 E / k), for k = 1 also (p_E + p_E+1) E; p1: the most frequent key's share of that text.",
    ]
    return "\n".join([show("LOAD", headers, rows, left=2), *notes, *below])


def all_loads(parts: dict[str, Part], seen: dict[str, Seen]) -> str:
    columns = {f"layer {name}\n{text}": counted.loads[name] for name in parts for text, counted in seen.items()}
    shares = [(load.double() / load.sum()).tolist() for load in columns.values()]
    rows = [[f"#{expert}", *map(percent, row)] for expert, row in enumerate(zip(*shares))]
    return show("LOAD OF EVERY EXPERT", ["expert", *columns], rows)


def collisions(parts: dict[str, Part], text: Seen) -> str:
    """Who shares an expert with whom, by the training text's frequencies."""
    headers = [
        "layer",
        "frequent pairs that\nshare an expert",
        "by\nchance",
        "rare keys beside\na heavy one",
        "by\nchance",
    ]
    rows = []
    for name, part in parts.items():
        experts, k = part.sizes
        shared, pairs = frequent_collisions(part.table, text.keys, experts)
        beside, random = rare_beside_heavy(part.table, text.keys, experts)
        rows.append([name, percent(shared), percent(chance(experts, k, k)), percent(beside), percent(random)])
    rare, heavy = (int(which.sum()) for which in rare_and_heavy(text.keys, experts))
    size, unseen = len(text.keys), int((text.keys == 0).sum())
    notes = [
        f"Frequent pairs: the {pairs:,} pairs of the {FREQUENT} most frequent keys. Chance: keys with random experts.",
        f"Rare: below {RARE} of the mean frequency, or unseen ({unseen:,}): {rare:,} of {size:,} keys. "
        f"Heavy: more than 1 / (2 E) of the text: {heavy:,} keys.",
    ]
    return "\n".join([show("COLLISIONS ON TRAINING TEXT", headers, rows), *notes])


def common(parts: dict[str, Part], text: Seen) -> str:
    """Mutual information between every two tables."""
    if len(parts) < 2:
        return "MUTUAL INFORMATION BETWEEN TABLES needs two of them; model.sparse_layers=[...] names more layers."
    first = next(iter(parts.values()))
    (experts, k), site = first.sizes, first.lookup.site
    random = [random_table(Keys(text.keys, site, site.generator("audit", side), k)) for side in (0, 1)]
    pairs = {f"{one} and {other}": (parts[one].table, parts[other].table) for one, other in combinations(parts, 2)}
    rows = []
    for name, (one, other) in (pairs | {"two random tables": random}).items():
        nats, share = mutual_information(one, other, text.keys, experts)
        rows.append([name, f"{nats:.4f}", f"{share:.3f}"])
    notes = [
        f"Nats a token. 0: independent, log E = {math.log(experts):.4f} at most. Share: of the smaller of the two",
        "entropies; 1: one table tells the other. Frequent keys alone give random tables something in common.",
    ]
    if k > 1:
        notes.append(f"Of one of a token's {k} experts in each table, drawn at random.")
    table = show("MUTUAL INFORMATION BETWEEN TABLES, TRAINING TEXT", ["layers", "nats", "share"], rows)
    return "\n".join([table, *notes])


def show(title: str, headers: list[str], rows: list[list[str]], left: int = 1) -> str:
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return f"{title}\n" + tabulate(rows, headers, "simple", colalign=align, disable_numparse=True)


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f} %"
