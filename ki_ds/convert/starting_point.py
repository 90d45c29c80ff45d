"""Hugging Face folders need no conversion: what one can be in a run, and the lines that say so."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from ki_ds.convert.card import sizes
from ki_ds.convert.sources import TOKENIZER_FILES, task_of
from ki_ds.data.tokenize import load_tokenizer, tokenizer_hash
from ki_ds.errors import UserError
from ki_ds.models.presets import RowLM, Rows, check_vocabulary, load_lm, model_folder, quieten, read_config


def describe(path: Path) -> list[str]:
    """Lines about a folder that loads as a student or a teacher: what it is, and what to put into a configuration.

    Raises:
        UserError: it is missing, no masked or causal language model, or its logits are not a linear projection.
    """
    quieten()
    if not path.is_dir():
        raise UserError(f"--from_hf={path} is no folder; name a Hugging Face folder, a run or a checkpoint of ours")
    folder = model_folder(str(path))
    task = task_of(read_config(folder, what="--from_hf"))
    lm = load_lm(folder, task, torch.float32, what="--from_hf")
    lines = [f"{name}: {value}" for name, value in sizes(lm).items()]
    if any(Path(folder, name).exists() for name in TOKENIZER_FILES):
        tokenizer = load_tokenizer(folder)
        has_dictionary = Path(folder, "dict.txt").is_file()  # then a GPT's tokenizer has a <mask> beyond its ids
        num_ids = len(tokenizer) - (has_dictionary and task == "causal")
        check_vocabulary(lm, num_ids, what=f"--from_hf={path}")
        lines.append(f"tokenizer: {len(tokenizer):,} ids, SHA-256 {tokenizer_hash(tokenizer)[:12]}")
    elif Path(folder, "dict.txt").is_file():
        lines.append("tokenizer: none, but fairseq's dict.txt")
    else:
        lines.append("tokenizer: none; of its vocabulary only the size will be checked")
    RowLM(lm).check(Rows(task, padded=False))  # what the rows of a run will be is not known yet
    start = {"task": task, "model": {"name": str(path), "init": "pretrained"}}
    lines += ["", "# as the student's starting point", *yaml.safe_dump(start, sort_keys=False).splitlines()]
    teach = {"task": task, "teacher": {"path": str(path)}}
    return [*lines, "", "# as a teacher", *yaml.safe_dump(teach, sort_keys=False).splitlines()]
