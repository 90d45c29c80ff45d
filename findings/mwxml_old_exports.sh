#!/usr/bin/env bash
# mwxml 0.3.8 and MediaWiki's older export formats (0.4 and 0.5; dumps of 2010 to 2012, and of wikis that still run them).
#
# Guess, before it was run: a page with <redirect /> is known as a redirect, and a page with the <upload> that the
# schema of export 0.5 allows behind its revisions is read, or refused where the page stands.
# Seen: `redirect` is None for the tag without a title, as for an article, so that code which drops redirects by
# `page.redirect is not None` keeps every one; and <upload> raises MalformedXML only when revisions are iterated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mwxml==0.3.8
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import io

import mwxml

REVISION = "<revision><id>2</id><timestamp>2011-01-01T00:00:00Z</timestamp><text xml:space='preserve'>{}</text></revision>"
DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.5/" version="0.5" xml:lang="en"><siteinfo>
<namespaces><namespace key="0" case="first-letter" /><namespace key="6" case="first-letter">File</namespace></namespaces>
</siteinfo>{}</mediawiki>"""


def pages(text):
    return list(map(lambda page: (page.title, page.redirect, [r.text for r in page]), mwxml.Dump.from_file(io.StringIO(DUMP.format(text)))))


print("mwxml", importlib.metadata.version("mwxml"))
redirect = f"<page><title>Chai</title><id>1</id><redirect />{REVISION.format('#REDIRECT [[Tea]]')}</page>"
article = f"<page><title>Tea</title><id>3</id>{REVISION.format('Tea is a drink.')}</page>"
found = pages(redirect + article)
print("expected: Chai is told from Tea; seen:", found)
assert [redirect for _, redirect, _ in found] == [None, None], "redirects are told apart now"

upload = "<upload><timestamp>2011-01-01T00:00:00Z</timestamp><contributor><ip>192.0.2.1</ip></contributor><filename>a.png</filename><src>a.png</src><size>3</size></upload>"
try:
    pages(f"<page><title>File:A.png</title><id>4</id>{REVISION.format('A file.')}{upload}</page>")
except mwxml.errors.MalformedXML as error:
    print("expected: the page; seen:", error)
else:
    raise SystemExit("uploads are read now")
PY
