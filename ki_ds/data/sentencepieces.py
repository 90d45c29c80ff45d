"""SentencePiece models: trained, and turned into tokenizers of the tokenizers library that give the same ids."""

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import Split

from ki_ds.errors import UserError

SPACE = "▁"  # U+2581, which SentencePiece writes for a blank
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# What normalizers and byte fallback are likely to do differently; every model is tried on it before it is used.
_PROBES = (
    "The cat sat on the mat, twice.",
    "  two  blanks  ",
    "naïve café ﬁne ① Ⅳ ｆｕｌｌ　ｗｉｄｔｈ",
    "e\u0301 and \u00e9, \ufb01\u0301, \u1e9b\u0323, a\u00a0b\u2009c\u200bd\u00ade",
    "tab\there, 猫と犬, שלום, Привет, ไทย, 😀👍🏽, \U00010348",
    "x = {'a': [1, 2.5e-3]};  // <b>…</b> “quotes” — dash",
    "Supercalifragilisticexpialidocious 1234567890 AAAAaaaa ????!!!!",
    "<s> </s> <unk> <pad> <mask> <0x41>",
    "a",
    " ",
    "",
)


def train_sentencepiece(
    lines: Iterable[str], vocab_size: int, model_type: Literal["unigram", "bpe"], *, special_tokens: tuple[str, ...]
) -> bytes:
    """A SentencePiece model, trained on lines, which SentencePiece holds all in memory, several times.

    `special_tokens` (bos, pad, eos, unk, mask) are the ids 0 to 4, the 256 bytes come next: what is not in the
    vocabulary is written in bytes, blanks stay as they are, so that every text comes back (but U+2581, which
    SentencePiece takes for a blank). UserError: vocab_size does not fit the text.
    """
    bos, pad, eos, unk, mask = special_tokens
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            hard_vocab_limit=model_type == "bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 30,
            num_threads=16,  # the model depends on it
            minloglevel=2,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=mask,
            bos_piece=bos,
            pad_piece=pad,
            eos_piece=eos,
            unk_piece=unk,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise UserError(f"vocab_size={vocab_size} does not fit this text ({reason}); change it") from None
    return model.getvalue()


def backend_from_sentencepiece(model: bytes, name: str) -> tuple[Tokenizer, dict[str, str]]:
    """(tokenizer with the ids of a SentencePiece model, its special tokens by role: "bos_token", …).

    UserError that names the model: it is none, or does something that cannot be reproduced exactly. That is so for
    the NFKC rules: transformers converts them to `normalizers.Precompiled` too, which drops some combining marks.
    """
    proto, processor = _parsed(model, name)
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    trainer, norm = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"{name} is a SentencePiece model by words or characters; take unigram or BPE")
    if trainer.treat_whitespace_as_suffix or not norm.escape_whitespaces:
        raise UserError(f"{name} marks blanks in another way than before a word; train it with the default")
    unk = processor.unk_id()
    user_defined = sorted((piece for piece, _, kind in pieces if kind == _USER_DEFINED), key=len, reverse=True)
    if trainer.model_type == _UNIGRAM:
        _check_overlaps(user_defined, name)
        backend = Tokenizer(_unigram(pieces, unk, byte_fallback=trainer.byte_fallback))
        patterns = [*_word_cuts(pieces), *_name_cuts(pieces, byte_fallback=trainer.byte_fallback)]
    else:
        backend = Tokenizer(_bpe(pieces, unk, byte_fallback=trainer.byte_fallback))
        patterns = _word_cuts(pieces)
        if user_defined:  # each is cut out first, and is then a whole piece that no merge makes
            patterns = ["|".join(map(re.escape, user_defined)), *patterns, *_whole_cuts(backend.model, pieces, name)]
            backend.model.ignore_merges = True
    backend.normalizer = _normalizer(norm)
    if patterns:
        backend.pre_tokenizer = pre_tokenizers.Sequence([Split(Regex(pattern), "isolated") for pattern in patterns])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if norm.add_dummy_prefix else [])])
    backend.add_special_tokens(
        [AddedToken(p, normalized=False, special=True) for p, _, kind in pieces if kind in (_UNKNOWN, _CONTROL)]
    )
    _check_agreement(backend, processor, name, user_defined)
    return backend, _roles(processor, pieces)


def _word_cuts(pieces: list[tuple[str, float, int]]) -> list[str]:
    """Patterns of words to segment, and cache, one by one: where no piece goes on into the next word."""
    crossing = re.compile(f"[^{SPACE}]{SPACE}")
    if any(crossing.search(piece) for piece, _, kind in pieces if kind in (_NORMAL, _USER_DEFINED)):
        return []
    return [f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"]


def _name_cuts(pieces: list[tuple[str, float, int]], *, byte_fallback: bool) -> list[str]:
    """Patterns that cut the name of a control or byte piece, which is text in a text, so that it is not taken for it.

    Needed where a character of it is in no piece: the name would then be the cheapest path through a unigram model.
    A cut beside such a character changes nothing else.
    """
    characters = set("".join(piece for piece, _, kind in pieces if kind == _NORMAL))
    cuts: dict[str, list[str]] = {}  # what follows the cut, by what stands before it
    for piece in (piece for piece, _, kind in pieces if kind not in (_NORMAL, _USER_DEFINED)):
        known = [character in characters for character in piece]
        if all(known) or (not any(known) and not byte_fallback):  # without bytes, unknown neighbours are one <unk>
            continue
        cut = known.index(not known[0]) if any(known) else 1
        if cut < len(piece):
            cuts.setdefault(re.escape(piece[:cut]), []).append(re.escape(piece[cut:]))
    return [f"(?<={before})(?={'|'.join(after)})" for before, after in cuts.items()]


def _whole_cuts(model: models.BPE, pieces: list[tuple[str, float, int]], name: str) -> list[str]:
    """A pattern that cuts what is written like a piece that no merges make of it, so that it is not taken for it whole.

    Such are the names of control and byte pieces. They are cut where their first token ends, which changes no other.
    """
    cuts: dict[str, list[str]] = {}  # what follows the cut, by what stands before it
    for i, (piece, _, kind) in enumerate(pieces):
        if kind == _USER_DEFINED:
            continue
        tokens = model.tokenize(piece)
        if [token.id for token in tokens] == [i]:
            continue
        cut = len(piece.encode()[: tokens[0].offsets[1]].decode())
        if cut == len(piece):
            raise UserError(f"{name} has no piece for a character of {piece!r}, and cannot be reproduced exactly")
        cuts.setdefault(piece[:cut], []).append(re.escape(piece[cut:]))
    each = [rf"{re.escape(before)}(?=(?:{'|'.join(after)})\z)" for before, after in cuts.items()]
    return [rf"\A(?:{'|'.join(each)})"] if each else []


def _parsed(model: bytes, name: str) -> tuple[Any, Any]:
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        if processor.unk_id() < 0:
            raise ValueError("it has no pieces")
    except Exception as error:  # protobuf and sentencepiece each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} is no whole SentencePiece model ({reason}); fetch it again") from None
    return proto, processor


def _roles(processor: Any, pieces: list[tuple[str, float, int]]) -> dict[str, str]:
    ids = {role: getattr(processor, f"{role}_id")() for role in ("bos", "eos", "unk", "pad")}
    named = {f"{role}_token": pieces[i][0] for role, i in ids.items() if i >= 0}
    masks = [piece for piece, _, kind in pieces if kind == _CONTROL and piece in ("<mask>", "[MASK]")]
    return {**named, **({"mask_token": masks[0]} if masks else {})}


def _check_overlaps(user_defined: list[str], name: str) -> None:
    """UserError where one piece can begin within another: which is taken hangs on float32 sums of equal cost."""
    for one in user_defined:
        for length in range(1, len(one)):
            other = next(
                (piece for piece in user_defined if piece.startswith(one[-length:]) and len(piece) > length), ""
            )
            if other:
                raise UserError(
                    f"{name} has the user-defined pieces {one!r} and {other!r}, which can overlap, and cannot be "
                    "reproduced exactly; save it as a Hugging Face tokenizer.json first"
                )


def _unigram(pieces: list[tuple[str, float, int]], unk: int, *, byte_fallback: bool) -> models.Unigram:
    # text never becomes a control, byte or unused piece: as a path through the text they cost more than any other
    worst = min(score for _, score, kind in pieces if kind == _NORMAL) - 1000
    best = max(score for _, score, kind in pieces if kind in (_NORMAL, _USER_DEFINED))

    def cost(piece: str, score: float, kind: int) -> float:
        if kind == _USER_DEFINED:
            return len(piece.encode()) * best - 0.1  # as SentencePiece counts it
        return score if kind == _NORMAL else worst

    vocabulary = [(piece, cost(piece, score, kind)) for piece, score, kind in pieces]
    return models.Unigram(vocabulary, unk, byte_fallback)


def _bpe(pieces: list[tuple[str, float, int]], unk: int, *, byte_fallback: bool) -> models.BPE:
    """Merges in the order of the scores of what they make, which is how SentencePiece chooses among them."""
    scores = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = []
    for piece, score in scores.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = sorted((ids[a], ids[b], a, b) for a, b in halves if a in scores and b in scores)
        merges += [(-score, ids[piece], a, b) for _, _, a, b in known]
    merges.sort(key=lambda merge: merge[:2])
    return models.BPE(
        ids, [(a, b) for _, _, a, b in merges], unk_token=pieces[unk][0], fuse_unk=True, byte_fallback=byte_fallback
    )


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:  # at the end, where U+2581 of the text counts as a blank
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return normalizers.Sequence(steps)


def _check_agreement(backend: Tokenizer, processor: Any, name: str, user_defined: list[str]) -> None:
    """UserError unless both give the same ids for the probes and for the model's own pieces in a row."""
    backend.encode_special_tokens = True
    own = [processor.id_to_piece(i) for i in range(0, len(processor), max(len(processor) // 2000, 1))]
    texts = [
        *_PROBES,
        *_around(user_defined, own),
        *(" ".join(own[i : i + 20]).replace(SPACE, " ") for i in range(0, len(own), 20)),
    ]
    for text in texts:
        ours, theirs = backend.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ours != theirs:
            raise UserError(
                f"{name} cannot be reproduced exactly: {text[:60]!r} gives {ours[:8]}…, in SentencePiece "
                f"{theirs[:8]}…; save it as a Hugging Face tokenizer.json first"
            )
    backend.encode_special_tokens = False


def _around(user_defined: list[str], own: list[str]) -> Iterator[str]:
    """Texts with user-defined pieces at every kind of place."""
    for number, piece in enumerate(user_defined):
        other, beside = user_defined[number - 1], own[number * 37 % len(own)].replace(SPACE, " ")
        yield from (piece, f"{piece} {piece}", f"{piece}{other}", f" {piece}  {other} ", f"The{piece}cat {piece}.")
        yield from (f"{beside}{piece}{beside}{other}{beside}", f"{piece[:-1]}{piece}{piece[1:]}", f"{piece}<s>{piece}")
