"""Running text out of wikitext, the markup of MediaWiki pages."""

import re
from collections.abc import Sequence
from typing import Any

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Text, Wikilink

# Tags whose content is no running text.
_DROPPED_TAGS = frozenset(
    {"ref", "references", "table", "gallery", "math", "chem", "timeline", "syntaxhighlight", "source", "pre"}
    | {"code", "score", "imagemap", "graph", "hiero", "templatedata", "mapframe", "maplink", "style", "script"}
)
# English names work in every wiki, beside those of its own language.
_DROPPED_NAMESPACES = frozenset({"file", "image", "media", "category"})
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple")
_QUOTES = re.compile(r"'{2,5}")
_EMPTY_BRACKETS = re.compile(r"\s?\(\s*[;,:]?\s*\)")
_OPENING_MARK = re.compile(r"([(\[])\s*[;,:]\s*")
_BLANKS = re.compile(r"[^\S\n]+")
_LIST_MARKS = re.compile(r"[*#:;\s]+")


def plain_wikitext(text: str, namespaces: frozenset[str] = frozenset()) -> str:
    """The running text of wikitext, a paragraph, heading or list entry a line.

    Out go templates, tables, references, comments, formulas and other non-text tags, links to files,
    categories and other languages, and lines without any letter; of other links the visible text stays.
    """
    code = mwparserfromhell.parse(text, skip_style_tags=True)
    plain = _QUOTES.sub("", _plain(code.nodes, namespaces | _DROPPED_NAMESPACES))
    lines = []
    for line in plain.split("\n"):
        line = _LIST_MARKS.sub("", line, count=1) if line[:1] in "*#:;" else line
        line = _OPENING_MARK.sub(r"\1", _EMPTY_BRACKETS.sub("", _BLANKS.sub(" ", line))).strip()
        # "|", "!" and "{|" begin the rows of tables that the parser could not close
        if any(map(str.isalpha, line)) and not line.startswith(("|", "!", "{|")):
            lines.append(line)
    return "\n".join(lines)


def _plain(nodes: Sequence[Any], namespaces: frozenset[str]) -> str:
    parts = []
    for node in nodes:
        match node:
            case Text():
                parts.append(node.value)
            case Wikilink():
                parts.append(_link_text(node, namespaces))
            case ExternalLink() if node.title is not None:
                parts.append(_plain(node.title.nodes, namespaces))
            case Heading():
                parts.append(_plain(node.title.nodes, namespaces))
            case HTMLEntity():
                parts.append(_entity(node))
            case Tag():
                parts.append(_tag_text(node, namespaces))
    return "".join(parts)


def _link_text(link: Wikilink, namespaces: frozenset[str]) -> str:
    prefix, colon, _ = str(link.title).partition(":")
    if colon and prefix.strip().replace("_", " ").casefold() in namespaces:
        return ""
    if colon and _LANGUAGE.fullmatch(prefix):  # small letters only: [[CSI: Miami]] is an article
        return ""
    visible = link.text if link.text is not None else link.title
    return _plain(visible.nodes, namespaces).removeprefix(":")


def _entity(node: HTMLEntity) -> str:
    try:
        return str(node.normalize())
    except (ValueError, KeyError, OverflowError):  # &#0; and the like name no character
        return ""


def _tag_text(node: Tag, namespaces: frozenset[str]) -> str:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return ""
    if name == "br":
        return "\n"
    if node.wiki_markup in ("*", "#", ":", ";", "----"):
        return "" if node.wiki_markup != "----" else "\n"
    return _plain(node.contents.nodes, namespaces) if node.contents is not None else ""
