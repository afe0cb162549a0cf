"""Why a router wins: what `python -m analysis.report NAME --explain` writes beside the table."""

from pathlib import Path

import pandas as pd

from analysis.arms import described, references
from analysis.explain_figures import save_figures
from analysis.inside import KINDS, Evaluation, inside
from analysis.runs import Study
from analysis.tables import of_columns

FIGURES = {
    "frequency": "test loss minus the reference's by about a tenth of the text, frequent targets to the left",
    "load": "load of each expert over the mean, the fullest to the left; dotted, the bound of token tables",
    "settling": "share of a validation's assignments, counted by token id, that the one before it made too",
    "map": "of the most frequent tokens, which share went to which expert; experts by the token that they serve most",
}

BY_DECILE = """\
Difference to {} in cross-entropy (nats per token), by how frequent the target is: tenths of the text
(about: no token id is cut in two), 1 the most frequent tokens. Mean over seeds; below 0 is better. A reference's row
is its own cross-entropy."""
BY_COMPANY = """\
The same after tokens by what is in their expert: heavy, the most frequent that make up a tenth of the
text; shared, others whose expert a heavy token has too; apart, the rest. In brackets their share of the text."""
BY_LAYER = """\
In evaluation, which may choose otherwise than training does: load of the fullest expert over the mean, beside
the least that a table of tokens could have on this text; idle: experts with less than a tenth of the mean;
explained: I(expert; token) / H(expert), how much of the choice the token id explains, and by chance the same if
experts were dealt to tokens at random; settled: share of assignments at a validation that the one before it
made too, counted by token id and so at most, at the first that has one before it, halfway and at the last; of a
router of random draws it says nothing, for evaluation repeats its draws."""


def explain(study: Study, style: dict, asked: dict, runs: Path, folder: Path) -> str:
    """Write explain.md, explain.csv and the figures to folder; return what to print.

    style, asked: style.yaml, and what declared.yaml says of the sweep. ValueError if a run was evaluated without what
    this needs, or if no arm has experts.
    """
    arms = described(study.runs["arm"], style)
    pairs, labels = references(arms, asked), {name: arm.label for name, arm in arms.items()}
    figures = inside(study, runs, pairs)
    if figures.loc[figures["quantity"] == "load"].empty:
        raise ValueError(f"no run of {study.name!r} has experts: nothing to explain")
    folder.mkdir(parents=True, exist_ok=True)
    figures.to_csv(folder / "explain.csv", index=False, float_format="%.12g", lineterminator="\n")
    evaluations = {run["arm"]: Evaluation(runs / run["id"]) for run in reversed(study.counted.to_dict("records"))}
    drawn = save_figures(figures, evaluations, arms, pairs, style, folder)
    parts = {"simple": _text(figures, labels, pairs, "simple"), "pipe": _text(figures, labels, pairs, "pipe")}
    pictures = [f"![{name}](explain_{name}.png)\n\n*{FIGURES[name]}*" for name in drawn]
    title = f"# Why a router wins: {study.name} at scale {study.scale}"
    (folder / "explain.md").write_text("\n\n".join([title, parts["pipe"], *pictures]) + "\n")
    where = (
        f"explained  {folder}/explain.md, explain.csv, {', '.join(f'explain_{name}.png' for name in drawn)} (and .pdf)"
    )
    return f"{parts['simple']}\n\n{where}"


def _text(figures: pd.DataFrame, labels: dict[str, str], pairs: dict[str, str], form: str) -> str:
    tables = {
        BY_DECILE.format(" or ".join(labels[each] for each in dict.fromkeys(pairs.values()))): by_decile(
            figures, pairs
        ),
        BY_COMPANY: by_company(figures),
        BY_LAYER: by_layer(figures),
    }
    return "\n\n".join(f"{text}\n\n{_table(rows, labels, form)}" for text, rows in tables.items() if len(rows))


def _table(rows: pd.DataFrame, labels: dict[str, str], form: str) -> str:
    shown = rows.assign(method=[labels[arm] for arm in rows["arm"]]).drop(columns="arm")
    shown = shown.loc[:, ["method", *(column for column in shown.columns if column != "method")]]
    cells = [[str(cell) for cell in row] for row in shown.to_dict("split")["data"]]
    return of_columns(cells, [*map(str, shown)], form)


def by_decile(figures: pd.DataFrame, pairs: dict[str, str]) -> pd.DataFrame:
    """A row an arm, in the order of figures; cells are text. pairs: arm -> its reference."""
    losses = figures.loc[figures["quantity"] == "decile_ce"].pivot_table("value", ["arm", "seed"], "place", sort=False)
    losses, rows = losses.sort_index(axis=1), []
    arms = list(losses.index.get_level_values("arm").unique())
    for arm in arms:
        if arm in pairs and pairs[arm] not in arms:
            continue
        values = losses.loc[arm] - losses.loc[pairs[arm]] if arm in pairs else losses.loc[arm]
        form = "{:+.3f}" if arm in pairs else "{:.2f}"
        rows.append({"arm": arm} | {str(place + 1): _mean(values[place], form, False) for place in losses.columns})
    return pd.DataFrame(rows)


def by_company(figures: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (arm, layer), own in _layers(figures, "difference_heavy"):
        cells = {kind: _of(own, f"difference_{kind}", "{:+.3f}") for kind in KINDS}
        shares = {kind: _of(own, f"share_{kind}", "{:.0%}", False) for kind in KINDS}
        cells = {kind: f"{cell} ({shares[kind]})" if cell else "none" for kind, cell in cells.items()}
        rows.append({"arm": arm, "layer": layer} | cells)
    return pd.DataFrame(rows)


def by_layer(figures: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (arm, layer), own in _layers(figures, "load"):
        load, settled = own.loc[own["quantity"] == "load"], own.loc[own["quantity"] == "settled"]
        idle = load.assign(value=load["value"] < 0.1).groupby("seed")["value"].sum()
        cells = {
            "fullest": _mean(load.loc[load["place"] == 0, "value"], "{:.2f}"),
            "bound": _of(own, "bound", "{:.2f}", False),
        }
        cells |= {"idle": _mean(idle, "{:.1f}", False)}
        cells |= {"explained": _of(own, "explained", "{:.3f}"), "by chance": _of(own, "by_chance", "{:.3f}", False)}
        places = sorted(settled["place"].unique())
        if len(places) > 1:
            halfway = min(places, key=lambda place: abs(place - places[-1] / 2))
            when = {"settled: first": places[0], "halfway": halfway, "last": places[-1]}
        else:
            when = dict.fromkeys(["settled"] * len(places), *places)
        cells |= {
            name: _mean(settled.loc[settled["place"] == place, "value"], "{:.3f}", False)
            for name, place in when.items()
        }
        rows.append({"arm": arm, "layer": layer} | cells)
    return pd.DataFrame(rows).fillna("")


def _layers(figures: pd.DataFrame, quantity: str):
    """((arm, layer), their rows) of those that have the quantity, arms in the order of figures."""
    have = figures.loc[figures["quantity"] == quantity, ["arm", "layer"]].drop_duplicates()
    for arm, layer in have.itertuples(index=False):
        yield (arm, layer), figures.loc[(figures["arm"] == arm) & (figures["layer"] == layer)]


def _of(rows: pd.DataFrame, quantity: str, form: str, spread: bool = True) -> str:
    return _mean(rows.loc[rows["quantity"] == quantity, "value"], form, spread)


def _mean(values: pd.Series, form: str, spread: bool = True) -> str:
    """Mean over seeds, and ± standard deviation of several; "" without any."""
    values = values.dropna()
    if values.empty:
        return ""
    mean = form.format(values.mean())
    return f"{mean} ± {form.replace('+', '').format(values.std())}" if spread and len(values) > 1 else mean
