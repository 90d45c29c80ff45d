"""The overlap of domains: its words, its matrix, samples of equal size, bounded memory, the command."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from ki_ds.data import proximity
from ki_ds.data.corpora import Corpus
from ki_ds.data.proximity import (
    DomainWords,
    domain_words,
    overlap_matrix,
    proximity_table,
    sources_of_domains,
    stop_words,
)
from ki_ds.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return write


def spelled(number):
    """A word of letters for a number."""
    return "q" + "".join(chr(ord("a") + int(digit)) for digit in str(number))


class TestWords:
    def test_the_most_frequent_without_stop_words(self, text):
        path = text("a.txt", "The cell, the CELL and the cell's gene.\nGene x 12 b2b naïve naïve\n\nUNDER_score")
        found = domain_words("BIO", [path], top=3)
        # "cell's" is cell and a single letter; x, 12 and the letters beside digits are no words
        assert found.words == {"cell", "gene", "naïve"}
        assert found.num_words == 13
        assert domain_words("BIO", [path], top=4).words == {"cell", "gene", "naïve", "score"}  # "under" stops

    def test_ties_go_by_the_alphabet(self, text):
        path = text("a.txt", "pear fig apple plum fig")
        assert domain_words("A", [path], top=2).words == {"fig", "apple"}

    def test_sources_of_a_domain_add_up(self, text):
        paths = [text("a.txt", "fig plum plum"), text("b.txt", "fig fig")]
        assert domain_words("A", paths, top=1).words == {"fig"}

    def test_what_is_left_out_of_a_folder_is_told(self, text, tmp_path, capsys):
        text("a.txt", "fig plum plum")
        assert domain_words("A", [tmp_path], top=1).words == {"plum"}
        assert capsys.readouterr().err == ""
        text("README.txt", "apple apple apple")
        assert domain_words("A", [tmp_path], top=1).words == {"plum"}
        assert "README.txt" in capsys.readouterr().err

    def test_stop_words_are_words(self):
        assert {"the", "and", "with"} <= stop_words()
        assert not {"gene", "theorem"} & stop_words()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"top": 9}, "A has 3 different words without stop words, fewer than top=9"),
            ({"top": 0}, "top=0 is not between"),
            ({"top": 1 << 19}, "top=524288 is not between"),
            ({"num_words": 0}, "num_words=0 is below 1"),
            ({"num_words": 5, "top": 1}, "A has 4 words, fewer than num_words=5"),
        ],
    )
    def test_too_little(self, text, options, message):
        with pytest.raises(UserError, match=message):
            domain_words("A", [text("a.txt", "fig the plum apple")], **options)

    def test_without_gensim(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gensim.parsing.preprocessing", None)
        with pytest.raises(UserError, match="pip install gensim"):
            stop_words()


class TestSamples:
    def test_lines_are_drawn_from_the_whole_text(self, text):
        path = text("a.txt", "\n".join(f"{spelled(i)} tree" for i in range(2000)))
        total, counts = proximity._count(Corpus([path]), fraction=0.3)
        numbers = [i for i in range(2000) if spelled(i) in counts]
        assert total == 2 * len(numbers) == 2 * counts["tree"]
        assert len(numbers) == pytest.approx(600, rel=0.1)
        assert np.mean(numbers) == pytest.approx(1000, rel=0.1)

    def test_the_same_sample_each_time(self, text):
        path = text("a.txt", "\n".join(f"{spelled(i)} tree" for i in range(500)))
        once, again = (domain_words("A", [path], top=99, num_words=300) for _ in range(2))
        assert once == again

    def test_all_of_it(self, text):
        path = text("a.txt", "fig plum\napple")
        assert domain_words("A", [path], top=2, num_words=3).num_words == 3


def test_rare_words_are_forgotten_and_frequent_ones_are_not(text, monkeypatch):
    monkeypatch.setattr(proximity, "MAX_COUNTED", 100)
    seen = []
    most_frequent = proximity._most_frequent
    monkeypatch.setattr(
        proximity, "_most_frequent", lambda counts, n: seen.append(len(counts)) or most_frequent(counts, n)
    )
    documents = [f"{spelled(3 * i)} {spelled(3 * i + 1)} {spelled(3 * i + 2)} tree bush tree" for i in range(1000)]
    path = text("a.txt", "\n\n".join(documents))
    assert domain_words("A", [path], top=2).words == {"tree", "bush"}
    assert len(seen) > 50
    assert max(seen) <= 103


class TestMatrix:
    DOMAINS = (
        DomainWords("WB", 1234, frozenset("abcd")),
        DomainWords("CS", 5, frozenset("cdef")),
        DomainWords("BIO", 77, frozenset("defg")),
    )

    def test_by_hand(self):
        expected = [[100, 50, 25], [50, 100, 75], [25, 75, 100]]
        assert overlap_matrix(self.DOMAINS).tolist() == expected

    def test_table(self):
        assert proximity_table(self.DOMAINS).split("\n") == [
            "  %     WB     CS    BIO  words",
            " WB  100.0   50.0   25.0  1,234",
            " CS   50.0  100.0   75.0      5",
            "BIO   25.0   75.0  100.0     77",
        ]


class TestArguments:
    def test_a_name_again_adds(self):
        assert sources_of_domains(["A=x", "B=y=z", "A=w"]) == {"A": ["x", "w"], "B": ["y=z"]}

    @pytest.mark.parametrize("wrong", ["A", "=x", "A="])
    def test_not_a_pair(self, wrong):
        with pytest.raises(UserError, match="is not NAME=SOURCE"):
            sources_of_domains(["B=x", wrong])

    def test_one_domain(self):
        with pytest.raises(UserError, match="1 was named; add another"):
            sources_of_domains(["A=x", "A=y"])


class TestCommand:
    @pytest.fixture
    def command(self, monkeypatch, capsys):
        def run(*args):
            monkeypatch.setattr(sys, "argv", ["domain_proximity.py", *map(str, args)])
            code = runpy.run_path(str(ROOT / "tools/domain_proximity.py"))["main"]()
            return code, *capsys.readouterr()

        return run

    def test_one_table(self, text, command):
        one, other = text("a.txt", "fig plum apple"), text("b.txt", "fig plum pear")
        code, out, _ = command(f"A={one}", f"B={other}", "--top", "3")
        assert code == 0
        assert out.splitlines() == ["%      A      B  words", "A  100.0   66.7      3", "B   66.7  100.0      3"]

    @pytest.mark.parametrize("bad", ["B=/nowhere/at/all.txt", "B"])
    def test_bad_input_is_one_line(self, text, command, bad):
        code, out, err = command(f"A={text('a.txt', 'fig')}", bad, "--top", "1")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
