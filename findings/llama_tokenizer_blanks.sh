#!/usr/bin/env bash
# transformers reads a SentencePiece BPE model with LlamaTokenizer into other ids than SentencePiece gives.
# Guess before running: a folder that holds just `tokenizer.model` and names LlamaTokenizer (which adds a blank before a
# text, as the model does) gives SentencePiece's own ids for plain text with two blanks in a row.
# Exits 0 while the two differ, 1 when they agree.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf
"$work/venv/bin/pip" download -q --no-deps -d "$work" mistral-common==1.13.1
cd "$work"
venv/bin/python - <<'PY'
import glob, json, os, sys, warnings, zipfile

warnings.simplefilter("ignore")
import sentencepiece, tokenizers, transformers
from transformers import AutoTokenizer

model = zipfile.ZipFile(glob.glob("mistral_common-*.whl")[0]).read("mistral_common/data/tokenizer.model.v1")
os.mkdir("folder")
open("folder/tokenizer.model", "wb").write(model)
config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
json.dump(config, open("folder/tokenizer_config.json", "w"))
tokenizer, processor = AutoTokenizer.from_pretrained("folder"), sentencepiece.SentencePieceProcessor(model_proto=model)
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__, "sentencepiece", sentencepiece.__version__)
print("expected: equal ids")
differing = 0
for text in ("one blank", "  two  blanks  ", "a  b", " "):
    found, expected = tokenizer(text, add_special_tokens=False).input_ids, processor.encode(text)
    differing += found != expected
    print(repr(text), "transformers", tokenizer.convert_ids_to_tokens(found), "sentencepiece", processor.encode(text, out_type=str))
print(f"seen: {differing} of 4 texts have other ids")
sys.exit(0 if differing else 1)
PY
