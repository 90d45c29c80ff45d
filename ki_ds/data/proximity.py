"""How close domains are: the overlap of their most frequent words (Table 9 of the paper, after Gururangan et al. 2020).

A word is a run of two or more letters, lower-cased; stop words, by gensim's English list, are left out. The
overlap of two domains is the share of common words among the `top` most frequent words of each.
"""

import hashlib
import heapq
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ki_ds.data.corpora import Corpus
from ki_ds.errors import UserError

TOP = 10_000
WORD = re.compile(r"[^\W\d_]{2,}")
MAX_COUNTED = 1 << 20  # different words held at once; past it the rarer half is forgotten


@dataclass(frozen=True)
class DomainWords:
    """A domain's `words`, the most frequent ones, out of `num_words` running words (stop words included)."""

    name: str
    num_words: int
    words: frozenset[str]


def stop_words() -> frozenset[str]:
    """English stop words, lower-case; UserError when gensim is not installed.

    gensim is pinned already, for the text of the demo, and needs no download; its list is the one of
    scikit-learn, which was used for the method first, and a few words more.
    """
    try:
        from gensim.parsing.preprocessing import STOPWORDS
    except ImportError:
        raise UserError(
            "stop words come from the package gensim, which is missing; pip install gensim==4.4.0"
        ) from None
    return frozenset(STOPWORDS)


def domain_words(
    name: str, sources: Sequence[str | Path], *, top: int = TOP, num_words: int | None = None
) -> DomainWords:
    """The `top` most frequent words of the sources of one domain, ties in alphabetical order.

    With `num_words` lines are drawn, by a hash of their text, that have about so many running words together;
    frequencies of the tail depend on the size of a sample, so that compared domains should be equally large.
    Memory is bounded for any input: a word that is forgotten among `MAX_COUNTED` others starts again at 0,
    which changes nothing as long as it is rarer than the words asked for. Where something is left out of the sources
    a table on stderr says so. UserError: too little text.
    """
    if not 0 < top <= MAX_COUNTED // 4:
        raise UserError(f"top={top} is not between 1 and {MAX_COUNTED // 4:,}; take e.g. {TOP}")
    if num_words is not None and num_words < 1:
        raise UserError(f"num_words={num_words} is below 1; take e.g. 10000000")
    corpus = Corpus(sources)
    if corpus.found.left_out:
        print(corpus.found.table(), file=sys.stderr)
    fraction = 1.0
    if num_words is not None:
        total, _ = _count(corpus, fraction=1.0)
        if total < num_words:
            raise UserError(f"{name} has {total:,} words, fewer than num_words={num_words:,}; lower it or bring more")
        fraction = num_words / total
    num_found, counts = _count(corpus, fraction=fraction)
    for word in stop_words():
        counts.pop(word, None)
    if len(counts) < top:
        raise UserError(
            f"{name} has {len(counts):,} different words without stop words, fewer than top={top:,}; "
            "bring more text or lower it"
        )
    return DomainWords(name, num_found, frozenset(_most_frequent(counts, top)))


def _count(corpus: Corpus, *, fraction: float) -> tuple[int, Counter[str]]:
    """(running words, how often each occurs) in a fraction of the lines."""
    total, counts = 0, Counter[str]()
    for document in corpus:
        lines = document.lines()
        words = WORD.findall("\n".join(line for line in lines if fraction == 1 or _draw(line) < fraction).lower())
        total += len(words)
        counts.update(words)
        if len(counts) > MAX_COUNTED:
            counts = Counter({word: counts[word] for word in _most_frequent(counts, MAX_COUNTED // 2)})
    return total, counts


def _draw(line: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little") / 2**64


def _most_frequent(counts: Mapping[str, int], number: int) -> list[str]:
    return heapq.nsmallest(number, counts, key=lambda word: (-counts[word], word))


def overlap_matrix(domains: Sequence[DomainWords]) -> np.ndarray:
    """float64 [number of domains, same]: common words in percent of each list, symmetric, 100 on the diagonal."""
    assert len({len(domain.words) for domain in domains}) == 1
    return np.array([[100 * len(a.words & b.words) / len(a.words) for b in domains] for a in domains])


def proximity_table(domains: Sequence[DomainWords]) -> str:
    """The overlaps in % as one table, with the running words of each domain."""
    rows = [["%", *(domain.name for domain in domains), "words"]]
    for domain, overlaps in zip(domains, overlap_matrix(domains), strict=True):
        rows.append([domain.name, *(f"{overlap:.1f}" for overlap in overlaps), f"{domain.num_words:,}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def sources_of_domains(arguments: Iterable[str]) -> dict[str, list[str]]:
    """The sources of each domain out of `NAME=SOURCE` arguments; a name said again adds to its sources."""
    domains: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, source = argument.partition("=")
        if not (name and equals and source):
            raise UserError(f"{argument!r} is not NAME=SOURCE; write e.g. CS=abstracts.txt.xz")
        domains.setdefault(name, []).append(source)
    if len(domains) < 2:
        raise UserError(f"domains are compared two by two, {len(domains)} was named; add another NAME=SOURCE")
    return domains
