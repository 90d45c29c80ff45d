"""Running text out of wikitext."""

import pytest

from ki_ds.data.wikitext import plain_wikitext


@pytest.mark.parametrize(
    ("wikitext", "plain"),
    [
        ("'''''bold''''' and ''it''", "bold and it"),
        ("a<!-- no --> b{{cite|x}}c", "a bc"),
        (
            "see [[Category:X]][[de:Tee]][[File:a.png|b [[c]]]] [[:Category:Y]], [[CSI: Miami]]",
            "see Category:Y, CSI: Miami",
        ),
        ("[http://x.org a site] [http://x.org] http://y.org z", "a site z"),
        ("x\n{|\n| cell\n|}\ny", "x\ny"),
        ("Tea ({{IPA|x}}) or (; Greek) &amp; &nbsp;co", "Tea or (Greek) & co"),
        ("H<sub>2</sub>O <math>x^2</math><br/>next <nowiki>''</nowiki>", "H2O\nnext"),
        ("# one\n## two\n: three\n----\n----", "one\ntwo\nthree"),
        ("{| unclosed\n| cell\nprose", "prose"),
        ("1914 | 1918\n12 %", ""),
    ],
)
def test_markup(wikitext, plain):
    assert plain_wikitext(wikitext) == plain
