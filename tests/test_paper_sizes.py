"""Parameter counts of the configurations of Hash Layers' tables, on the meta device: nothing is allocated."""

from pathlib import Path

import pytest
import torch
from conftest import compose_config

from data.prepare import Prepared
from training.build import make_model
from training.preflight import read

FIVE = ["num_experts=16", "model.sparse_layers=[1,3,5,7,9]"]
# words, the published count in millions, tolerance; the last two of d 2,048 and 1,536 are recalled
PUBLISHED = {
    "baseline": (["router=dense"], 222, 0.01),
    "1x64": (["router=hash_balanced"], 751, 0.01),
    "1x64, Switch": (["router=switch"], 751, 0.01),
    "1x128": (["router=hash_balanced", "num_experts=128"], 1280, 0.01),
    "5x16": (["router=hash_balanced", *FIVE], 852, 0.01),
    "wider": (["router=dense_wider"], 755, 0.02),
    "deeper": (["router=dense_deeper"], 755, 0.02),
    "baseline, dictionary of 51,200": (["router=dense", "data.vocab_size=51200"], 266, 0.01),
    "1x64, dictionary of 51,200": (["router=hash_balanced", "data.vocab_size=51200"], 794, 0.01),
}


def counted(*words: str) -> dict[str, int]:
    settings = read(compose_config("scale=paper", *words))
    counts = torch.ones(settings.data.vocab_size, dtype=torch.int64)
    prepared = Prepared(Path(), "", len(counts), counts, {}, {})
    with torch.device("meta"):
        model = make_model(settings, prepared, torch.device("cpu"))
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if ".router." not in name)
    return model.parameter_counts()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_configurations_have_its_parameter_counts(name):
    words, millions, tolerance = PUBLISHED[name]
    assert counted(*words)["total"] == pytest.approx(millions * 1e6, rel=tolerance)


def test_the_baselines_count_by_hand():
    """Two encoder blocks, 11 decoder blocks that attend to the encoder, two final norms, an embedding, two tables."""
    d, f = 1024, 4096
    attention, ffn, norm = 4 * (d * d + d), 2 * d * f + f + d, 2 * d
    encoder, decoder = attention + ffn + 2 * norm, 2 * attention + ffn + 3 * norm
    by_hand = 2 * encoder + 11 * decoder + 2 * norm + 8008 * d + 2 * 2048 * d
    assert by_hand == 222_354_432
    assert counted("router=dense") == {"active": by_hand, "total": by_hand}
    assert counted("router=hash_balanced") == {"active": by_hand, "total": by_hand + 63 * ffn}
