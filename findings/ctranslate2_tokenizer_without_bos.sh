#!/usr/bin/env bash
# ctranslate2 4.8.5, TransformersConverter on a GPT-2 whose tokenizer has an end token and no bos token (valid: bos is
# optional in transformers, and config.json names the id that a text begins with).
# Expected before running: the converter refuses in a line, or what it wrote loads and generates from any prompt.
# Seen: it converts without a word; the folder cannot be loaded, "[json.exception.type_error.302] type must be string,
# but is null" (config.json of the converted model has "bos_token": null).
# Exits non-zero where that is no longer seen.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 2>/dev/null
"$place/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 ctranslate2==4.8.5 2>/dev/null
cd "$place"
venv/bin/python - 2>/dev/null <<'PY'
import sys
from pathlib import Path

import ctranslate2
import transformers as hf
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models, pre_tokenizers

backend = Tokenizer(models.BPE({"<|end|>": 0, "a": 1, "b": 2}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token="<|end|>").save_pretrained("gpt")
config = hf.GPT2Config(vocab_size=3, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
hf.GPT2LMHeadModel(config).save_pretrained("gpt")
print("ctranslate2", ctranslate2.__version__, "transformers", hf.__version__)
TransformersConverter("gpt").convert("converted")
print("converted; its config.json:", " ".join(Path("converted/config.json").read_text().split()))
try:
    print(ctranslate2.Generator("converted").generate_batch([["a", "b"]], max_length=4)[0].sequences_ids)
except RuntimeError as error:
    print("loading it:", error)
    sys.exit("null" not in str(error))
print("it loads: no longer seen")
sys.exit(1)
PY
