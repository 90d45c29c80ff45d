"""Articles out of MediaWiki's XML dumps, export formats 0.3 to 0.11.

What a dump says beside a page's text decides: its namespace, whether it redirects, which revision is the latest,
whether that one was deleted, and its content model. The table `mediawiki_names.tsv` has the names that a wiki's
language gives to files and categories (a dump's own list lacks older ones) and the words of redirects.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from typing import IO, NamedTuple
from xml.etree.ElementTree import Element, iterparse

ARTICLES, FILES, CATEGORIES = 0, 6, 14  # namespaces
# English names work in every wiki, beside those of its own language.
_ENGLISH = frozenset({"file", "image", "media", "category"})
_CONVERTED = frozenset(
    {"ban", "crh", "gan", "iu", "kk", "ku", "mni", "sh", "shi", "sr", "tg", "tly", "uz", "wuu", "zh"}
)


class Language(NamedTuple):
    """What the words of a wiki's text depend on."""

    hidden: frozenset[str]  # casefolded namespaces whose links show nothing: files and categories
    has_variants: bool  # -{...}- chooses between scripts


ENGLISH = Language(_ENGLISH, has_variants=False)


class Article(NamedTuple):
    """A page of namespace 0 in its latest revision."""

    id: str
    title: str
    text: str
    language: Language


class NotADumpError(ValueError):
    """The XML is another kind, or a dump without what is wanted."""


def articles(file: IO[bytes], left_out: Counter[str]) -> Iterator[Article]:
    """The articles of a dump that are no redirects and not blank; `left_out` counts other pages by reason.

    Raises:
        NotADumpError: another kind of XML; a dump of logs, or one without texts.
        xml.etree.ElementTree.ParseError: it is cut, or no XML.
    """
    events = iterparse(file, ("start", "end"))
    _, root = next(events)
    if _name(root) != "mediawiki":
        raise NotADumpError(f"<{_name(root)}> is another kind of XML")
    code, namespaces = _attribute(root, "lang"), dict[str, int]()
    language = _language(code, namespaces)
    latest: Element | None = None
    for _, element in (each for each in events if each[0] == "end"):
        match _name(element):
            case "siteinfo":
                namespaces = {(n.text or "").casefold(): int(n.get("key") or 0) for n in _all(element, "namespace")}
                language = _language(code or _of_database(element), namespaces)
            case "revision":  # a history may be long: only one text is kept
                older = element if latest is not None and _when(element) < _when(latest) else latest
                latest = latest if older is element else element
                if older is not None:
                    older.clear()
            case "page":
                reason, text = _judge(element, latest, namespaces)
                if reason:
                    left_out[reason] += 1
                else:
                    title = _text(element, "title").replace("_", " ")
                    yield Article(_text(element, "id"), title, text, language)
                latest = None
                root.clear()
            case "logitem":
                raise NotADumpError("it is a dump of logs, without pages")


def _judge(page: Element, revision: Element | None, namespaces: dict[str, int]) -> tuple[str, str]:
    """(why a page is no article, "") or ("", its text)."""
    if _namespace(page, namespaces) != ARTICLES:
        return "in other namespaces", ""
    content = None if revision is None else _child(revision, "text")
    text = (content.text if content is not None else None) or ""
    if _child(page, "redirect") is not None or _redirects().match(text):
        return "redirects", ""
    model = "wikitext" if revision is None else _text(revision, "model") or "wikitext"
    if model != "wikitext":
        return f"of the content model {model}", ""
    if content is not None and content.get("deleted") is not None:
        return "whose text is deleted", ""
    # stubs of old formats give no size of a text, but the number it has elsewhere
    if content is not None and not text and int(content.get("bytes", content.get("id") or 0)):
        raise NotADumpError("it is a dump of stubs, without texts; take pages-articles")
    return ("", text) if text.strip() else ("blank", "")


def _namespace(page: Element, namespaces: dict[str, int]) -> int:
    """Its <ns>, or, before format 0.6, that of its title."""
    if number := _text(page, "ns"):
        return int(number)
    prefix, colon, _ = _text(page, "title").partition(":")
    return namespaces.get(prefix.casefold(), ARTICLES) if colon else ARTICLES


def _when(revision: Element) -> tuple[str, int]:
    """Revisions stand in any order; imported ones have younger numbers than times."""
    return _text(revision, "timestamp"), int(_text(revision, "id") or 0)


# --- names ------------------------------------------------------------------------------------------------------


def _language(code: str, namespaces: dict[str, int]) -> Language:
    code = code.casefold().replace("_", "-")
    own = {name for name, number in namespaces.items() if name and number in (FILES, CATEGORIES)}
    return Language(_ENGLISH | own | _names_of(code), code.partition("-")[0] in _CONVERTED)


def _of_database(siteinfo: Element) -> str:
    """The language in the name of a wiki's database: dewiki, zh_yuewiktionary."""
    return re.sub(r"wik[a-z]*$", "", _text(siteinfo, "dbname"))


@functools.cache
def _names_of(code: str) -> frozenset[str]:
    """Names of files and categories in a language, those it falls back to, and its variants; nothing if unknown."""
    table, names, seen = _table(), set[str](), set[str]()
    primary = code.partition("-")[0]
    known = code if code in table else primary
    waiting = [known, *(other for other in table if other.startswith(f"{known}-"))]
    while waiting:
        if (language := waiting.pop()) not in seen and language in table:
            seen.add(language)
            fallbacks, own = table[language]
            waiting += fallbacks.split()
            names |= {name.casefold() for name in own.split("|")}
    return frozenset(names - {""})


@functools.cache
def _table() -> dict[str, tuple[str, str]]:
    """{language: (fallbacks, names of files and categories)}."""
    return {row[0]: (row[1], row[2]) for row in _rows() if not row[0].startswith("#")}


@functools.cache
def words(key: str) -> tuple[str, ...]:
    """The words of "#redirect" or "#switch" in every language."""
    return tuple(word for row in _rows() if row[0] == key for word in row[2].split("|"))


@functools.cache
def _rows() -> list[list[str]]:
    text = resources.files("ki_ds.data").joinpath("mediawiki_names.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines() if not line.startswith("# ")]


@functools.cache
def _redirects() -> re.Pattern[str]:
    """What a redirect begins with, where a dump has no tag for it."""
    alternatives = "|".join(map(re.escape, sorted(words("#redirect"), key=len, reverse=True)))
    return re.compile(rf"\s*(?:{alternatives})\s*:?\s*\[\[", re.IGNORECASE)


# --- XML --------------------------------------------------------------------------------------------------------


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _all(element: Element, name: str) -> list[Element]:
    return [child for child in element.iter() if _name(child) == name]


def _child(element: Element, name: str) -> Element | None:
    return next((child for child in element if _name(child) == name), None)


def _text(element: Element, name: str) -> str:
    child = _child(element, name)
    return (child.text or "").strip() if child is not None else ""


def _attribute(element: Element, name: str) -> str:
    return next((value for key, value in element.items() if key.rpartition("}")[2] == name), "")
