#!/usr/bin/env bash
# Guess before running: a file of two .xz streams with stream padding between them (four zero bytes, which the .xz
# specification allows in section 2.2 and `xz -dc` reads) holds the rows of both for pandas, or ends in an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pandas==3.0.0
cd "$folder"
printf 'text\nfirst\nsecond\n' | xz > rows.csv.xz
head -c 4 /dev/zero >> rows.csv.xz
printf 'third\nfourth\n' | xz >> rows.csv.xz
xz -t rows.csv.xz
echo "expected: 4 rows, as $(xz --version | head -1) reads them: $(xz -dc rows.csv.xz | tail -n +2 | tr '\n' ' ')"
"$folder/venv/bin/python" - <<'PY'
import lzma
import platform
import sys

import pandas

rows = pandas.read_csv("rows.csv.xz")["text"].tolist()
print(f"seen: pandas {pandas.__version__} on Python {platform.python_version()} gives {len(rows)} rows: {rows}")
data = lzma.open("rows.csv.xz").read()
print(f"seen: lzma.open().read() of the standard library, below it, gives {data!r}; neither raises an error")
sys.exit(0 if rows == ["first", "second"] else 1)
PY
