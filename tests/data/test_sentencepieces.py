"""SentencePiece models: the same ids as the library itself, or one line that says why not."""

import functools
import io
import itertools
import lzma
import os
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ki_ds.data.sentencepieces import backend_from_sentencepiece, train_sentencepiece
from ki_ds.data.tokenize import load_tokenizer, save_tokenizer, tokenizer_hash
from ki_ds.errors import UserError

SHARED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[3] / "shared"))
shared = pytest.mark.skipif(not (SHARED / "data/tok").is_dir(), reason="vocabularies (KI_DS_SHARED) are not there")
MISTRAL = Path(os.environ.get("KI_DS_MISTRAL", SHARED / "data/tok/mistral_common"))
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


USER_DEFINED = ["[REF]", "[REF_1]", "[REF", "mn", "<x>", "猫", "é"]
# Words of texts that hold user-defined pieces, parts of them, blanks of all kinds and names that are text in a text.
PIECES_OF_TEXT = st.sampled_from(
    [
        *USER_DEFINED,
        *" []REF_1mnx<>",
        "  ",
        "▁",
        "the",
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        "e\u0301",
        "\t",
        "\n",
        "犬",
        "é",
    ]
)


@functools.cache
def with_user_defined(kind, prefix, squeeze, fallback, pieces=tuple(USER_DEFINED)):
    return trained(
        user_defined_symbols=list(pieces),
        model_type=kind,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=squeeze,
        byte_fallback=fallback,
        vocab_size=365 if fallback else 110,
    )


class TestUserDefined:
    @pytest.mark.parametrize("kind", ["unigram", "bpe"])
    @pytest.mark.parametrize("prefix", [True, False])
    @pytest.mark.parametrize("squeeze", [True, False])
    @pytest.mark.parametrize("fallback", [True, False])
    def test_every_text_has_the_ids_of_the_library(self, kind, prefix, squeeze, fallback):
        model = with_user_defined(kind, prefix, squeeze, fallback)
        backend, _ = backend_from_sentencepiece(model, "m")
        backend.encode_special_tokens = True
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        own = [processor.id_to_piece(i).replace("▁", " ") for i in range(len(processor))]

        @settings(max_examples=150, deadline=None)
        @given(st.lists(PIECES_OF_TEXT | st.sampled_from(own) | st.characters(exclude_categories=["Cs"]), max_size=9))
        def check(words):
            text = "".join(words)
            assert backend.encode(text, add_special_tokens=False).ids == processor.encode(text)

        check()

    @pytest.mark.parametrize("kind", ["unigram", "bpe"])
    def test_the_saved_folder_gives_them_with_auto_tokenizer(self, kind, tmp_path):
        model = with_user_defined(kind, True, False, True)
        (tmp_path / "tokenizer.model").write_bytes(model)
        tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
        save_tokenizer(tokenizer, tmp_path / "saved")
        texts = ["[REF] the [REF_1][REF]", "a[REFb mn", " é  猫", "[REF]", "the cat"]
        expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(texts)
        for again in (load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
            assert again(texts, add_special_tokens=False).input_ids == expected
            assert again.decode(expected[0]) == texts[0]
            assert again.convert_tokens_to_ids("[REF]") == 3
        assert tokenizer_hash(load_tokenizer(tmp_path / "saved")) == tokenizer_hash(tokenizer)

    def test_pieces_that_can_overlap_are_refused_where_ties_decide(self):
        for pieces in (["ab", "ba"], ["▁▁"]):
            with pytest.raises(UserError, match="which can overlap, and cannot be reproduced exactly"):
                backend_from_sentencepiece(trained(user_defined_symbols=pieces), "m")
        assert_same_ids(with_user_defined("bpe", True, False, True, ("ab", "ba", "kk", "▁▁", "▁the")), OVERLAPS)

    @pytest.mark.parametrize("version", ["240323.model.v3", "241114.model.v7"])
    def test_models_of_the_field(self, version):
        path = MISTRAL / f"mistral_instruct_tokenizer_{version}"
        if not path.is_file():
            pytest.skip(f"{path.name} of mistral-common (KI_DS_MISTRAL names its data folder) is not there")
        lines = made_up_lines(200, odd=True)
        pieces = ["[REFERENCE_DOC_1]", "[REFERENCE_DOC_11]", "[INST]", "[REF]", "[/REF]"]
        mixed = [line.replace(" ", random.Random(i).choice(pieces), 3) for i, line in enumerate(lines)]
        assert_same_ids(path.read_bytes(), [*lines, *mixed, *pieces])


OVERLAPS = ["abab", "aba bab", "kkk kkkk", "▁▁▁ the  the", "the▁the", "   ", "", "ab", "bab▁▁"]


def test_line_ends_are_no_ends_of_a_text():
    model = trained(remove_extra_whitespaces=True, byte_fallback=True, vocab_size=365)
    assert_same_ids(model, ["a \n b", " a\n\n b ", "a  \n", "\n a", "a ▁", "▁", " ▁ ▁ "])
