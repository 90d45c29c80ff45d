"""Exported tokenizers give real text the ids that the model was trained on: 1,000 lines, there and back."""

import itertools
import lzma
import os
from pathlib import Path

import pytest
import transformers as hf

from ki_ds.convert.export import Options, convert
from ki_ds.convert.folder import beside_model
from ki_ds.convert.sources import Source
from ki_ds.data.corpora import Corpus, gensim_dump_path
from ki_ds.data.prepare import TokenizerSpec, build_store, open_corpus
from ki_ds.data.store import open_store
from ki_ds.data.tokenize import load_tokenizer
from ki_ds.errors import UserError
from tests.tiny import ROOT, run

SHARED = Path(os.environ.get("KI_DS_SHARED", ROOT.parent / "shared"))
shared = pytest.mark.skipif(not (SHARED / "data/tok").is_dir(), reason="vocabularies (KI_DS_SHARED) are not there")
NUM_LINES = 1000


@pytest.fixture(scope="module")
def lines():
    """Lines of a country encyclopedia and of abstracts, or else of Wikipedia articles."""
    files = [SHARED / "data" / f"{name}.txt.xz" for name in ("wb_factbook", "cs_arxiv_third")]
    found: list[str] = []
    if all(file.is_file() for file in files):
        for file in files:
            with lzma.open(file, "rt", encoding="utf-8") as text:
                kept = (line.strip() for line in text if line.strip())
                found += itertools.islice(kept, NUM_LINES // 2)
        return found
    try:
        dump = gensim_dump_path()
    except UserError:
        pytest.skip("neither real text (KI_DS_SHARED) nor the package gensim is there")
    for document in Corpus([dump]):
        found += [line.strip() for line in document.cleaned().lines if line.strip()]
        if len(found) >= NUM_LINES:
            return found[:NUM_LINES]
    raise AssertionError(f"only {len(found)} lines")


@pytest.fixture(scope="module")
def corpus(lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    text = folder / "text.txt"
    blocks = ["\n".join(lines[start : start + 50]) for start in range(0, len(lines), 50)]
    text.write_text("\n\n".join(blocks), encoding="utf-8")
    spec = TokenizerSpec(vocab_size=600)
    build_store([text], spec, folder / "corpus", num_workers=0, valid_fraction=0.1, show_progress=False)
    return folder / "corpus"


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_a_run_of_ours(lines, corpus, tmp_path, task):
    found = open_corpus(corpus)
    stores = [open_store(found.train_prefix), open_store(found.valid_prefix)]
    items = [store.item(i).tolist() for store in stores for i in range(store.num_items)]
    bos, eos = 0, 2
    trained = [[bos, *ids] if task == "mlm" else [eos, *ids[:-1]] for ids in items if len(ids) > 1]
    folder = run(tmp_path / "run", corpus, task=task, train={"num_steps": 2})
    convert(folder, tmp_path / "out", Options(), say=lambda _: None)
    for place in (folder / "best", tmp_path / "out"):
        for tokenizer in (hf.AutoTokenizer.from_pretrained(place), load_tokenizer(place)):
            ids = tokenizer(lines).input_ids
            assert len(ids) == NUM_LINES
            assert sorted(ids) == sorted(trained)
            assert tokenizer.batch_decode(ids, skip_special_tokens=True) == lines
    exported = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.model_max_length == 32
    assert max(map(len, exported(lines, truncation=True).input_ids)) == 32


@shared
@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_robertas_dictionary_numbers_gpt2s_pieces(lines, tmp_path, task):
    """The released dict.txt with GPT-2's vocabulary is RoBERTa's own tokenizer."""
    theirs = load_tokenizer(SHARED / "data/tok/roberta")
    size = len(theirs) - (task == "causal")
    config = hf.GPT2Config(vocab_size=size, n_embd=2, n_layer=1, n_head=1, n_positions=16)
    dictionary = SHARED / "data/tok/roberta/dict.txt"
    source = Source("x", task, (), lambda dtype: None, pads_vocabulary=False, dictionary=dictionary)
    beside = beside_model(source, hf.GPT2LMHeadModel(config), tokenizer=SHARED / "data/tok/gpt2")
    for name, content in beside.files.items():
        (tmp_path / name).write_bytes(content)
    expected = theirs(lines).input_ids
    if task == "causal":
        expected = [[2, *ids[1:-1]] for ids in expected]
    for tokenizer in (hf.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert tokenizer(lines).input_ids == expected
        decoded = tokenizer.batch_decode(expected, skip_special_tokens=True)
        assert decoded == lines
    assert len({i for ids in expected for i in ids}) > 5000


@shared
@pytest.mark.parametrize(
    ("file", "begins", "ends"), [("roberta_student", [0], [2]), ("gpt_learned_unscaled_tied", [2], [])]
)
def test_released_models_and_the_data_that_they_were_trained_on(tmp_path, file, begins, ends):
    folder = SHARED / "fairseq"
    options = Options(tokenizer=SHARED / "data/tok/gpt2", dictionary=folder / "data-bin/dict.txt")
    convert(folder / f"{file}.pt", tmp_path / "out", options, say=lambda _: None)
    tokenizer = load_tokenizer(tmp_path / "out")
    store = open_store(folder / "data-bin/train")
    items = (store.item(i).tolist() for i in range(store.num_items))
    items = [ids for ids in items if 3 not in ids and len(ids) > 1][:NUM_LINES]  # 3: not in this small dictionary
    texts = [tokenizer.decode(ids[:-1]) for ids in items]
    differing = [
        ids
        for ids, found in zip(items, tokenizer(texts).input_ids, strict=True)
        if found != [*begins, *ids[:-1], *ends]
    ]
    assert len(items) > 100
    assert len(differing) <= len(items) // 100, differing  # halves of a character: the text itself has lost them
    known = [text for ids, text in zip(items, texts, strict=True) if ids not in differing]
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out")(known).input_ids == tokenizer(known).input_ids
