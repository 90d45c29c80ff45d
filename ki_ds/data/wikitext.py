"""Running text out of wikitext, the markup of MediaWiki pages."""

import functools
import re
from collections.abc import Sequence
from itertools import pairwise
from operator import add
from typing import Any

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Template, Text, Wikilink

from ki_ds.data.mediawiki import ENGLISH, Language, words

# Tags whose content is no running text.
_DROPPED_TAGS = frozenset(
    {"ref", "references", "table", "gallery", "math", "chem", "timeline", "syntaxhighlight", "source", "pre"}
    | {"code", "score", "imagemap", "graph", "hiero", "templatedata", "mapframe", "maplink", "style", "script"}
    | {"includeonly"}
)
# Endings of what is a file whatever its namespace is called: a wiki may have names of its own.
_FILE = re.compile(
    r"[^:]+\.(?:jpe?g|png|gif|svgz?|webp|tiff?|xcf|pdf|djvu|og[gavx]|opus|webm|mp[34]|mpe?g|midi?|wav|flac|stl)\s*",
    re.IGNORECASE,
)
_DIRECTION_MARKS = str.maketrans("", "", "\u200e\u200f\u202a\u202b\u202c\u202d\u202e")
# Flags of -{...}- with which nothing is shown: a title, a rule hidden or removed.
_HIDDEN_FLAGS = frozenset("TH-")
_VARIANTS = re.compile(r"-\{(?:([A-Za-z;\s-]*)\|)?((?:(?!-\{|\}-).)*)\}-", re.DOTALL)
_VARIANT = re.compile(r"(?:^|;)\s*(?:[^;:]*=>\s*)?[a-z]{2,3}(?:-[a-z]+)*\s*:\s*([^;]*)")
# Not of languages, though as short: prefixes of links to other places, whose text is shown.
_LANGUAGE = re.compile(r"(?!(?:doi|hdl|irc|mw|rfc|voy)$)[a-z]{2,3}(-[a-z]+)*|simple")
_QUOTES = re.compile("(''+)")
_EMPTY_BRACKETS = re.compile(r"\s?[(（]\s*[;,:；，：、؛،]?\s*[)）]")
_OPENING_MARK = re.compile(r"([(（\[])\s*[;,:；，：、؛،]\s*")
# What tells marks of italics apart until they are counted: an apostrophe that is text, a place where something stood
# between two marks, and a break within a line of them. All are halves of surrogate pairs, which no text holds.
_APOSTROPHE, _GAP, _BREAK = "\ud827", "\ud800", "\ud80a"
_MEANT = str.maketrans({_APOSTROPHE: "'", _GAP: "", _BREAK: "\n"})
_LONE_APOSTROPHE = re.compile("(?<!')'(?!')")
_BLANKS = re.compile(r"[^\S\n]+")
_LIST_MARKS = re.compile(r"[*#:;\s]+")


def plain_wikitext(text: str, language: Language = ENGLISH) -> str:
    """The running text of wikitext, a paragraph, heading or list entry a line.

    Out go templates, tables, references, comments, formulas and other non-text tags, behaviour switches
    (`__NOTOC__`), links to files, categories and other languages, and lines without any letter; of other links the
    visible text stays, of `-{...}-` the first script.
    """
    code = mwparserfromhell.parse(text, skip_style_tags=True)
    plain = _switches().sub("", _plain(code.nodes, language.hidden))
    if language.has_variants:
        plain = _first_variants(plain)
    plain = "\n".join(map(_without_quotes, plain.split("\n"))).translate(_MEANT)
    lines = []
    for line in plain.split("\n"):
        line = _LIST_MARKS.sub("", line, count=1) if line[:1] in "*#:;" else line
        line = _OPENING_MARK.sub(r"\1", _EMPTY_BRACKETS.sub("", _BLANKS.sub(" ", line))).strip()
        # "|", "!" and "{|" begin the rows of tables that the parser could not close
        if any(map(str.isalpha, line)) and not line.startswith(("|", "!", "{|")):
            lines.append(line)
    return "\n".join(lines)


@functools.cache
def _switches() -> re.Pattern[str]:
    alternatives = "|".join(map(re.escape, words("#switch")))
    # `__index__` in small letters is no switch but Python's
    return re.compile(rf"(?-i:(?!__index__))__(?:{alternatives})__", re.IGNORECASE)


def _without_quotes(line: str) -> str:
    """The line without the marks of italics (two apostrophes), bold (three) and both (five).

    As MediaWiki counts them: of four, or more than five, the first are text; and of marks that do not pair, so is the
    first apostrophe of one of three, best behind a word of a single letter: l'''Iliade'' is l'Iliade.
    """
    if "''" not in line:
        return line
    parts = _QUOTES.split(line)  # text at even places, marks at odd ones
    for i in range(1, len(parts), 2):
        length = len(parts[i])
        mark = 3 if length == 4 else min(length, 5)
        parts[i - 1] += "'" * (length - mark)
        parts[i] = "'" * mark
    lengths = [len(mark) for mark in parts[1::2]]
    bold, italics = (sum(length in (kind, 5) for length in lengths) for kind in (3, 2))
    before = [2 * i for i, length in enumerate(lengths) if length == 3]
    if before and bold % 2 and italics % 2:
        parts[min(before, key=lambda i: 2 if parts[i].endswith(" ") else parts[i][-2:-1] != " ")] += "'"
    return "".join(parts[::2])


def _first_variants(text: str) -> str:
    """The text with each -{flags|script: text; script: text}- replaced by what is shown in the first script."""

    def shown(match: re.Match[str]) -> str:
        flags, content = set(re.split(r"[;\s]+", match[1] or "")), match[2]
        if flags & _HIDDEN_FLAGS:
            return ""
        return content if "R" in flags or not (first := _VARIANT.search(content)) else first[1].strip()

    while (replaced := _VARIANTS.sub(shown, text)) != text:  # from the innermost outwards
        text = replaced
    return text


def _plain(nodes: Sequence[Any], hidden: frozenset[str]) -> str:
    parts = []
    for node in nodes:
        match node:
            case Text():
                parts.append(node.value)
            case Wikilink():
                parts.append(_link_text(node, hidden))
            case ExternalLink() if node.title is not None:
                parts.append(_plain(node.title.nodes, hidden))
            case Heading():
                parts.append(_plain(node.title.nodes, hidden))
            case HTMLEntity():
                parts.append(_entity(node))
            case Template() if str(node.name).strip() == "'":
                parts.append(_APOSTROPHE)
            case Tag():
                parts.append(_tag_text(node, hidden))
    shown = [part for part in parts if part]
    gaps = [_GAP if one.endswith("'") and other.startswith("'") else "" for one, other in pairwise(shown)]
    return "".join(map(add, shown, [*gaps, ""]))


def _link_text(link: Wikilink, hidden: frozenset[str]) -> str:
    prefix, colon, name = str(link.title).translate(_DIRECTION_MARKS).partition(":")
    if colon and prefix.strip().replace("_", " ").casefold() in hidden:
        return ""
    if prefix.strip() and _FILE.fullmatch(name):
        return ""
    if colon and _LANGUAGE.fullmatch(prefix):  # small letters only: [[CSI: Miami]] is an article
        return ""
    visible = link.text if link.text is not None else link.title
    return _plain(visible.nodes, hidden).removeprefix(":")


def _entity(node: HTMLEntity) -> str:
    try:
        character = str(node.normalize())
        character.encode()
        return _LONE_APOSTROPHE.sub(_APOSTROPHE, character)
    except (ValueError, KeyError, OverflowError):  # &#0;, &#xD800; and the like name no character
        return ""


def _tag_text(node: Tag, hidden: frozenset[str]) -> str:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return ""
    if name == "br":
        return _BREAK
    if node.wiki_markup in ("*", "#", ":", ";", "----"):
        return "" if node.wiki_markup != "----" else "\n"
    text = _plain(node.contents.nodes, hidden) if node.contents is not None else ""
    return _LONE_APOSTROPHE.sub(_APOSTROPHE, text) if name == "nowiki" else text
