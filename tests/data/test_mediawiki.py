"""Articles out of dumps: what a dump says beside a page's text, in every export format."""

import io
from collections import Counter

import pytest

from ki_ds.data import mediawiki
from ki_ds.data.mediawiki import NotADumpError, articles

VERSIONS = ["0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "0.10", "0.11"]


def number(version: str) -> int:
    return int(version.removeprefix("0."))


def revision(
    text, *, version="0.10", identity=1, time="2020-01-01T00:00:00Z", model="wikitext", attributes="", more=""
):
    told = "<origin>1</origin>" if number(version) >= 11 else ""
    told += f"<model>{model}</model><format>text/x-wiki</format>" if number(version) >= 8 else ""
    text = f"<text xml:space='preserve' {attributes}>{text}</text>{more}"
    user = "<contributor><username>A</username><id>77</id></contributor><minor/><comment>c</comment>"
    return f"<revision><id>{identity}</id><timestamp>{time}</timestamp>{user}{told}{text}</revision>"


def page(title, *revisions, version="0.10", namespace=0, redirect="", identity=1, more=""):
    ns = f"<ns>{namespace}</ns>" if number(version) >= 6 else ""
    return f"<page><title>{title}</title>{ns}<id>{identity}</id>{redirect}{''.join(revisions)}{more}</page>"


def dump(*pages, version="0.10", language="en", database="enwiki", names={6: "File", 14: "Category", 1: "Talk"}):  # noqa: B006
    spaces = "".join(f'<namespace key="{key}">{name}</namespace>' for key, name in {0: "", **names}.items())
    about = f"<sitename>W</sitename><dbname>{database}</dbname><case>first-letter</case>"
    head = f'xmlns="http://www.mediawiki.org/xml/export-{version}/" version="{version}"'
    head += f' xml:lang="{language}"' if language else ""
    return (
        f"<mediawiki {head}><siteinfo>{about}<namespaces>{spaces}</namespaces></siteinfo>{''.join(pages)}</mediawiki>"
    )


def read(*pages, **settings):
    left_out = Counter()
    found = list(articles(io.BytesIO(dump(*pages, **settings).encode()), left_out))
    return {article.title: article.text for article in found}, left_out


@pytest.mark.parametrize("version", VERSIONS)
def test_every_export_format(version):
    def one(title, text, **settings):
        return page(title, revision(text, version=version), version=version, **settings)

    tag = "<redirect title='A' />" if number(version) >= 8 else "<redirect />" if number(version) >= 4 else ""
    found, left_out = read(
        one("A_b", "Text of A.", more="<discussionthreadinginfo><ThreadID>1</ThreadID></discussionthreadinginfo>"),
        one("B", "#REDIRECT [[A]]", redirect=tag),
        one("Talk:A", "Talk.", namespace=1),
        one("CSI: Miami", "Not of a namespace.", more="<upload><timestamp>x</timestamp><size>3</size></upload>"),
        version=version,
    )
    assert found == {"A b": "Text of A.", "CSI: Miami": "Not of a namespace."}
    assert left_out == {"redirects": 1, "in other namespaces": 1}


@pytest.mark.parametrize("language", ["de", "ru", "zh-Hant", "ar", "sr"])
def test_redirects_without_a_tag_in_the_wikis_language(language):
    word = {
        "de": "#WEITERLEITUNG",
        "ru": "#Перенаправление",
        "zh-Hant": "#重新導向",
        "ar": "#تحويل",
        "sr": "#Преусмери",
    }
    found, left_out = read(
        page("B", revision(f" {word[language]}: [[A]]", version="0.3"), version="0.3"), version="0.3"
    )
    assert (found, left_out) == ({}, {"redirects": 1})


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_latest_revision_in_any_order(order):
    history = [
        revision("first", identity=5, time="2019-01-01T00:00:00Z"),
        revision("imported later", identity=9, time="2018-06-01T00:00:00Z"),
        revision("latest", identity=7, time="2020-01-01T00:00:00Z"),
    ]
    assert read(page("A", *(history[i] for i in order))) == ({"A": "latest"}, {})


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"text": ""}, "blank"),
        ({"text": " \n "}, "blank"),
        ({"text": "", "attributes": 'bytes="0" id="3"'}, "blank"),
        ({"text": "", "attributes": 'deleted="deleted"'}, "whose text is deleted"),
        ({"text": "[1]", "model": "json"}, "of the content model json"),
        ({"text": "return 1", "model": "Scribunto"}, "of the content model Scribunto"),
    ],
)
def test_what_the_last_revision_is_decides(last, reason):
    text = last.pop("text")
    before = revision("What stood there before.", time="2019-01-01T00:00:00Z")
    found, left_out = read(page("A", before, revision(text, **last)), page("B", revision("stays")))
    assert (found, left_out) == ({"B": "stays"}, {reason: 1})


def test_other_slots_are_not_the_text():
    slot = "<content><role>mediainfo</role><model>wikibase-mediainfo</model><text>{}</text></content>"
    found, _ = read(page("A", revision("main", version="0.11", more=slot), version="0.11"), version="0.11")
    assert found == {"A": "main"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html><a>x</a></html>", "<html> is another kind"),
        (dump("<logitem><id>1</id></logitem>"), "dump of logs"),
        (dump(page("A", revision("", attributes='id="3" bytes="1200"'))), "stubs"),
        (dump(page("A", revision("", attributes='id="3"', version="0.3"), version="0.3"), version="0.3"), "stubs"),
    ],
)
def test_dumps_without_pages_or_texts(content, message):
    with pytest.raises(NotADumpError, match=message):
        list(articles(io.BytesIO(content.encode()), Counter()))


@pytest.mark.parametrize(
    ("language", "database", "hidden", "shown"),
    [
        ("de", "dewiki", {"bild", "datei", "kategorie", "image", "file"}, {"imagen", "benutzer"}),
        ("", "eswiki", {"imagen", "archivo", "categoría"}, {"bild"}),
        ("uk", "ukwiki", {"изображение", "категорія", "категория", "файл"}, set()),
        ("zh", "zhwiki", {"文件", "圖像", "分类", "分類", "category"}, set()),
        ("sr", "srwiki", {"датотека", "слика", "kategorija"}, set()),
        ("pt-BR", "ptwiki", {"arquivo", "ficheiro", "imagem"}, set()),
        ("xx", "xxwiki", {"file", "category", "akt"}, {"bild"}),
    ],
)
def test_names_of_files_and_categories(language, database, hidden, shown):
    names = {6: "Akt", 14: "Category", 2: "Benutzer"}
    content = dump(page("A", revision("x")), language=language, database=database, names=names)
    (article,) = articles(io.BytesIO(content.encode()), Counter())
    assert hidden <= article.language.hidden
    assert not (shown | {"benutzer"}) & article.language.hidden


def test_the_table_is_whole():
    assert len(mediawiki.words("#redirect")) > 150
    assert len(mediawiki.words("#switch")) > 1000
    assert sorted(mediawiki.ENGLISH.hidden) == ["category", "file", "image", "media"]
