"""Running text out of wikitext."""

import pytest

from ki_ds.data.mediawiki import Language
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


@pytest.mark.parametrize(
    ("wikitext", "plain"),
    [
        ("__NOTOC__\nThe place. __NOEDITSECTION__\n__forcetoc__", "The place."),
        ("__KEIN_INHALTSVERZEICHNIS__ Der Ort.\n__БЕЗ_ОГЛАВЛЕНИЯ__\n__目次非表示__", "Der Ort."),
        ("Call <nowiki>__init__</nowiki> and __DIR__ in code.", "Call __init__ and __DIR__ in code."),
        ("a [[Unbekannt:Turm.JPG|miniatur|Der [[Turm]]]] b [[Beispiel:Turm|c]] [[c:File:x.png|d]]", "a b c d"),
        ("[[\u200eFile:a.png|thumb]]x [[ image : a b ]]y", "x y"),
        ("see [[User:A|her]], [[Portal:Tea]], [[:File:a.png]]", "see her, Portal:Tea, File:a.png"),
        ("''Ilias'', soit l'''Iliade''. '''Homère''' est l'auteur.", "Ilias, soit l'Iliade. Homère est l'auteur."),
        ("dell'''Aida'' di '''Verdi'''\nun '''opera'' nuova", "dell'Aida di Verdi\nun 'opera nuova"),
        ("''''''both''''' and ''''quoted'''", "'both and 'quoted"),
        ("l<nowiki>'</nowiki>''Iliade'', l{{'}}''Aida'' &#39;''x''", "l'Iliade, l'Aida 'x"),
        ("a&#xD83D;b &#x41;&eacute;&#55357;", "ab Aé"),
        ("'''Iliad ''a<br/>b''''' c\n'''one\ntwo''", "Iliad a\nb c\none\ntwo"),
        ("the ''{{lang|fr|x}}'' of l'{{x}}''Aida'' [[A|'''a''']]'''b'''", "the of l'Aida ab"),
        ("See [[voy:Paris|the guide]] and [[doi:10.1|it]].[[en:Tea]][[be-x-old:Чай]]", "See the guide and it."),
        ("call __index__ in Python __INDEX__ now", "call __index__ in Python now"),
        ("北京（{{lang|en|Beijing}}，旧称燕京）（{{IPA|x}}）在", "北京（旧称燕京）在"),
        ("shown <noinclude>here</noinclude><includeonly>elsewhere</includeonly>", "shown here"),
    ],
)
def test_what_a_page_shows(wikitext, plain):
    assert plain_wikitext(wikitext) == plain


@pytest.mark.parametrize(
    ("wikitext", "plain"),
    [
        ("-{zh-hans:[[计算机|电脑]]; zh-hant:電腦;}-很好", "电脑很好"),
        ("-{A|zh-cn:博客; zh-tw:網誌}-和-{R|原文: x}-", "博客和原文: x"),
        ("-{T|zh:题; zh-hant:題}-文-{H|zh:a; zh-tw:b}-字-{-|zh:c}-", "文字"),
        ("-{简}- -{zh-cn:甲-{乙}-;zh-tw:丙}-", "简 甲乙"),
        ("a -{b => zh-cn:丁; }- c", "a 丁 c"),
    ],
)
def test_scripts(wikitext, plain):
    assert plain_wikitext(wikitext, Language(frozenset({"file"}), has_variants=True)) == plain
    assert "-{" in plain_wikitext(wikitext)
