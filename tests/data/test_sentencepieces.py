"""SentencePiece models: the same ids as the library itself, or one line that says why not."""

import io
import itertools
import lzma
import os
import random
from pathlib import Path

import pytest
import sentencepiece

from ki_ds.data.sentencepieces import backend_from_sentencepiece, train_sentencepiece
from ki_ds.errors import UserError

SHARED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[3] / "shared"))
shared = pytest.mark.skipif(not (SHARED / "data/tok").is_dir(), reason="vocabularies (KI_DS_SHARED) are not there")
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def made_up_lines(count, *, seed=0, odd=False):
    """Lines of invented words, with characters from everywhere among them when `odd`."""
    choose = random.Random(seed)
    words = ["".join(choose.choices("abcdefghijklmnoprstuvw", k=choose.randint(1, 9))) for _ in range(300)]
    words += ["naïve", "–", "“so”", "don't", "1,234.5"]
    odd_words = [
        "",
        "",
        "\t",
        "猫",
        "😀👍🏽",
        "שלום",
        "e\u0301",
        "<s>",
        "</s><mask>",
        "<0x41>",
        "\u00a0",
        "<",
        "{[(x)]}",
    ]
    return [" ".join(choose.choices(words + odd_words * 8 if odd else words, k=12)) for _ in range(count)]


def trained(**settings):
    """A model of the library's own trainer with its defaults, but for `settings`."""
    model = io.BytesIO()
    defaults = {"vocab_size": 300, "normalization_rule_name": "identity", "minloglevel": 2}
    lines = iter(made_up_lines(500))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**defaults, **settings})
    return model.getvalue()


def assert_same_ids(model, lines):
    backend, _ = backend_from_sentencepiece(model, "m")
    backend.encode_special_tokens = True  # as in preparing data
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = [encoding.ids for encoding in backend.encode_batch_fast(lines, add_special_tokens=False)]
    for line, ids, theirs in zip(lines, ours, processor.encode(lines), strict=True):
        assert ids == theirs, line
    return backend, ours


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_our_own_models_give_the_same_ids_and_lose_nothing(kind):
    model = train_sentencepiece(made_up_lines(500), 450, kind, special_tokens=SPECIALS)
    lines = made_up_lines(1000, seed=1, odd=True)
    backend, ids = assert_same_ids(model, lines)
    assert [backend.id_to_token(i) for i in range(6)] == [*SPECIALS, "<0x00>"]
    assert [backend.decode(i, skip_special_tokens=False) for i in ids] == lines
    assert max(map(max, ids)) < 450
    assert not {0, 1, 2, 3, 4} & {i for line in ids for i in line}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"byte_fallback": True, "vocab_size": 500},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"split_by_whitespace": False},
        {"control_symbols": "<mask>", "pad_id": 3},
    ],
)
def test_models_of_other_settings_give_the_same_ids(kind, settings):
    lines = [*made_up_lines(300, seed=1), "  two  blanks ", "", " ", "x 猫 y", "猫</s>", "<s>", "a<mask>b"]
    assert_same_ids(trained(model_type=kind, **settings), lines)


@shared
def test_a_released_model_gives_the_same_ids_on_real_lines():
    lines = []
    for name in ("wb_novels", "cs_arxiv_third", "bio_medquad"):
        with lzma.open(SHARED / f"data/{name}.txt.xz", "rt") as file:
            lines += [line.rstrip("\n") for line in itertools.islice(file, 700) if line.strip()]
    assert len(lines) >= 1000
    backend, ids = assert_same_ids((SHARED / "data/tok/sentencepiece/mistral_v1_32k.model").read_bytes(), lines)
    assert [backend.decode(i) for i in ids] == lines


def test_roles():
    _, roles = backend_from_sentencepiece(trained(control_symbols="<mask>", pad_id=3, eos_id=-1), "m")
    assert roles == {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "cannot be reproduced exactly: '"),
        ({"model_type": "word", "vocab_size": 200}, "by words or characters"),
        ({"model_type": "char", "vocab_size": 30}, "by words or characters"),
        ({"treat_whitespace_as_suffix": True}, "marks blanks in another way"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_with_what_does_not_agree(settings, message):
    with pytest.raises(UserError, match=f"^m .*{message}") as caught:
        backend_from_sentencepiece(trained(**settings), "m")
    assert "\n" not in str(caught.value)


def test_something_else_is_no_model():
    for content in (b"", b"text", trained()[:-9]):
        with pytest.raises(UserError, match="m is no whole SentencePiece model"):
            backend_from_sentencepiece(content, "m")
