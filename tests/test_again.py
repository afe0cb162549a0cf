import json
import shutil

import pytest
import torch
import yaml
from conftest import compose_config

from training.again import config_of, main
from training.job import FINISHED, open_run, run
from training.preflight import read


@pytest.fixture
def finished(tiny):
    config = compose_config(*tiny, "router=switch")
    assert run(config) == FINISHED
    return open_run(read(config)).folder


def changed(folder, name, **figures):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | figures))


def test_a_run_trained_again_has_the_same_bits_here_and_says_what_is_another(finished, tmp_path, capsys):
    words, threads = [str(finished), f"--into={tmp_path}/again"], torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert main(words) == 0 and torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "another" not in printed and printed.endswith("within the tolerance of 0.015 nats\n")
    assert printed.count(" now, +0 nats") == 2
    loss = json.loads((finished / "result.json").read_text())["test/ce"]
    changed(finished, "result.json", **{"test/ce": loss + 0.016})
    origin = json.loads((finished / "provenance.json").read_text())
    changed(finished, "provenance.json", device="another one", git=origin["git"] | {"commit": "0" * 40})
    assert main(words) == 1  # which trains nothing more
    printed = capsys.readouterr().out
    assert "another commit: 0000000000 then, " in printed and "another device: another one then, " in printed
    assert f"test: {loss + 0.016:.4f} then, {loss:.4f} now, -0.016 nats\nNOT within the tolerance" in printed
    assert main([*words, "--tolerance=0.02"]) == 0


def test_what_cannot_be_compared_is_refused_before_any_training(finished, tmp_path):
    words = [str(finished), f"--into={tmp_path}/again"]
    with pytest.raises(ValueError, match="has no key data.corpus.file$"):
        main([*words, "data.corpus.file=a.txt"])
    with pytest.raises(ValueError, match="--into must be another folder"):
        main([str(finished), f"--into={finished.parent}"])
    unfinished = shutil.copytree(finished, tmp_path / finished.name)
    (unfinished / "result.json").unlink()
    with pytest.raises(ValueError, match="is no finished run"):
        main([str(unfinished), words[1]])
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"a text of other words, number {number * number}" for number in range(3000)))
    with pytest.raises(ValueError, match="the text is another one"):
        main([*words, f"data.corpus.files={other}", "data.corpus.document_start=^a text"])
    assert not (tmp_path / "again").exists()


def test_the_files_of_a_corpus_go_with_its_folder(tmp_path):
    run = tmp_path / "dense-s0-0"
    run.mkdir()
    corpus = {"files": "wiki/train.*.txt.xz", "more": ["wiki/a.txt", "wikimedia/b.txt"], "share": 0.5, "test": None}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"folder": "wiki", "corpus": corpus}}))
    kept, gone = config_of(run, [], "again"), config_of(run, ["data.folder=/here/text"], "again")
    assert kept.data.corpus == corpus
    assert gone.data.corpus == corpus | {
        "files": "/here/text/train.*.txt.xz",
        "more": ["/here/text/a.txt", "wikimedia/b.txt"],
    }
    own = config_of(run, ["data.folder=/here", "data.corpus.files=c.txt"], "again").data.corpus
    assert (own.files, own.more[0]) == ("c.txt", "/here/a.txt")
