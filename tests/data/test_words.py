"""Which ids begin a word, for each kind of tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ki_ds.data.words import word_beginnings
from ki_ds.errors import UserError

TEXT = ["the teacher teaches the taught student", "the student teaches nobody", "teachable teachers taught there"] * 9


def trained(kind):
    """A tokenizer of a kind, with `<s>` as its only special token."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=266, special_tokens=["<s>"], initial_alphabet=alphabet)
    elif kind == "pieces":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=40, special_tokens=["<s>"], unk_token="<s>")
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<s>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece() if kind == "wordpiece" else None
        trainer = trainers.WordPieceTrainer(vocab_size=32, special_tokens=["<s>"])
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<s>")


@pytest.mark.parametrize("kind", ["bytes", "pieces", "wordpiece"])
def test_words_of_a_text_are_those_between_blanks(kind):
    tokenizer = trained(kind)
    begins = word_beginnings(tokenizer)
    assert begins.shape == (len(tokenizer),)
    assert begins[tokenizer.bos_token_id]
    for text in TEXT[:3]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        starts = [i for i, token in enumerate(ids) if begins[token] or i == 0]
        words = [tokenizer.decode(ids[a:b]).strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert words == text.split()
        assert len(ids) > len(words)  # some words have several tokens, else nothing was tested


def test_a_tokenizer_without_a_mark_is_refused():
    with pytest.raises(UserError, match="no mark for the beginning of a word"):
        word_beginnings(trained("none"))
