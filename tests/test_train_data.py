"""Training on what users bring: mixtures, domains, documents kept apart, released folders, data that changed."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from ki_ds.errors import UserError
from tests.tiny import inherit, records, run, tiny_corpus

RELEASED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[2] / "shared")) / "fairseq/data-bin"


def mixed(base):
    """A second domain of the base's tokenizer, and sources of both."""
    other = base / "other_domain"
    if not other.exists():
        tiny_corpus(other, seed=9, num_documents=60, tokenizer=base / "corpus" / "tokenizer")
    return [
        {"path": str(base / "corpus"), "domain": "A", "weight": 1},
        {"path": str(other), "domain": "B", "weight": 2},
    ]


def test_a_mixture_is_trained_on_and_measured_by_domain(base):
    data = {"corpus": "", "sources": mixed(base), "whole_words": True, "mask_variants": 2}
    whole = run(base / "mixture", base / "corpus", data=data)
    run(base / "mixture_parts", base / "corpus", data=data, train={"stop_at_step": 4})
    parts = run(base / "mixture_parts", base / "corpus", data=data)
    after_stop = {record["step"]: record for record in records(parts, "valid")}
    for record in records(whole, "valid"):
        again = after_stop[record["step"]]
        domains = record["domains"]
        assert list(domains) == ["A", "B"]
        assert record["ce_sum"] == pytest.approx(sum(d["ce_sum"] for d in domains.values()))
        assert record["num_rows"] == sum(d["num_rows"] for d in domains.values())
        assert domains["A"]["ppl"] == math.exp(domains["A"]["ce_sum"] / domains["A"]["num_rows"])
        assert (record["ppl"], domains) == (again["ppl"], again["domains"])  # a resume changes nothing
    assert json.loads((whole / "run.json").read_text())["domains"] == ["A", "B"]


def test_a_domain_that_is_only_measured_does_not_choose_the_best_weights(base):
    corpora = {"A": str(base / "corpus"), "far": mixed(base)[1]["path"]}
    sources = [{"path": corpora["A"], "domain": "A"}]
    folder = run(base / "measured", base / "corpus", data={"corpus": "", "sources": sources, "valid": corpora})
    alone = run(base / "alone", base / "corpus", data={"corpus": "", "sources": sources})
    for record, expected in zip(records(folder, "valid"), records(alone, "valid"), strict=True):
        assert record["ppl"] == record["domains"]["A"]["ppl"] == expected["ppl"]
        assert record["domains"]["far"]["ppl"] != record["ppl"]


@pytest.mark.parametrize("packing", [False, True])
def test_a_student_inherits_on_documents_kept_apart(base, packing):
    data = {"break_mode": "none_doc", "packing": packing, "seq_len": 32}
    folder = inherit(base, f"documents_{packing}", task="causal", data=data)
    assert records(folder, "train")[0]["kl"] > 0
    assert all(math.isfinite(record["loss"]) for record in records(folder, "train"))


@pytest.mark.skipif(not RELEASED.is_dir(), reason="released fairseq files (KI_DS_SHARED) are not there")
@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_the_released_folder_is_trained_on_as_it_is(base, task):
    data = {"corpus": str(RELEASED), "index_dir": str(base / "index")}
    teacher = run(base / f"released_{task}", base / "corpus", task=task, data=data)
    assert (teacher / "best" / "dict.txt").read_bytes() == (RELEASED / "dict.txt").read_bytes()
    student = inherit(base, f"released_{task}_student", task=task, data=data, teacher={"path": str(teacher)})
    assert json.loads((student / "run.json").read_text())["teachers"][0]["tokenizer_checked"]
    assert records(student, "train")[0]["kl"] > 0


def test_a_change_of_the_data_under_a_run_is_refused(base, tmp_path):
    """Each part that a resume reads: tokens, index, tokenizer, another corpus, another order of the sources."""
    corpus = tmp_path / "corpus"
    shutil.copytree(base / "corpus", corpus)
    run(tmp_path / "run", corpus, train={"stop_at_step": 2})
    for name in ("train.bin", "valid.bin", "train.idx"):
        whole = (corpus / name).read_bytes()
        changed = bytearray(whole)
        changed[-40] ^= 1
        (corpus / name).write_bytes(changed)
        with pytest.raises(UserError, match=r"changed|damaged|points item"):
            run(tmp_path / "run", corpus)
        (corpus / name).write_bytes(whole)
    with pytest.raises(UserError, match="train_sha256 was"):
        run(tmp_path / "run", Path(mixed(base)[1]["path"]))
    run(tmp_path / "run", corpus)
