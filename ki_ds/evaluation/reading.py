"""Downstream data sets from files as they are, and from the package datasets.

GLUE's own TSV files with those of the tasks' first releases; JSON lines; PubMedQA's two JSON files.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ki_ds.data.sources import required
from ki_ds.errors import UserError
from ki_ds.evaluation.tasks import GLUE, SET_SEEDS, Example, GlueTask, TaskData, set_metrics

HUB = "hub"
_HUB_SET = "nyu-mll/glue"
# Names of a part's files: of GLUE's download, then of first releases; several that stand together are one part.
_GLUE_FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "train": (("train.tsv",), ("in_domain_train.tsv",), ("msr-para-train.tsv",), ("20??.train.tsv",)),
    "valid": (
        *(("dev.tsv",), ("dev_matched.tsv",), ("in_domain_dev.tsv", "out_of_domain_dev.tsv")),
        *(("msr-para-val.tsv",), ("20??.val.tsv",)),
    ),
    "test": (("test.tsv",), ("msr-para-test.tsv",), ("20??.test.tsv",)),
    "mismatched": (("dev_mismatched.tsv",),),
}
_SET_FILES = {
    "train": ("train.jsonl",),
    "valid": ("dev.jsonl", "valid.jsonl", "validation.jsonl", "val.jsonl"),
    "test": ("test.jsonl",),
}
_PUBMEDQA = ("ori_pqal.json", "test_ground_truth.json")


def read_glue(name: str, data: str) -> TaskData:
    """A task of GLUE.

    Args:
        name: one of `tasks.GLUE`.
        data: the task's folder, or one that has it under its usual name; "hub" asks the package datasets.

    Raises:
        UserError: files or rows are missing or broken, or no part has examples.
    """
    task = GLUE[name]
    if data == HUB:
        return _from_hub(name, task)
    folder = _glue_folder(name, task, Path(data))
    parts: dict[str, list[Example]] = {}
    notes: list[str] = []
    for part in _GLUE_FILES:
        files = _files_of(folder, _GLUE_FILES[part])
        if not files and part in ("train", "valid"):
            wanted = ", ".join(" and ".join(names) for names in _GLUE_FILES[part])
            raise UserError(f"{folder} has no {part} part of {task.title} ({wanted}); complete it")
        parts[part] = []
        for file in files:
            examples, note = _read_tsv(file, task, may_lack_labels=part == "test")
            parts[part] += examples
            notes += [note] if note else []
    return _checked(TaskData(name, task.labels, task.metrics, parts, task.seeds, tuple(notes)), str(folder))


def _glue_folder(name: str, task: GlueTask, root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"--data={root} does not exist; name GLUE's folder, or take --data hub")
    inside = next((root / folder for folder in task.folders if (root / folder).is_dir()), None)
    if inside is not None:
        return inside
    if _files_of(root, _GLUE_FILES["train"]):
        return root
    have = [other for other, glue in GLUE.items() if any((root / folder).is_dir() for folder in glue.folders)]
    raise UserError(f"{root} has no {task.title} ({task.folders[0]}/train.tsv); it has {', '.join(have) or 'no task'}")


def _files_of(folder: Path, choices: Sequence[Sequence[str]]) -> list[Path]:
    for names in choices:
        found = [sorted(folder.glob(name)) for name in names]
        if all(found):
            return [files[0] for files in found]
    return []


def _read_tsv(path: Path, task: GlueTask, *, may_lack_labels: bool) -> tuple[list[Example], str | None]:
    """The examples of a file and a note on what was left out. Rows have no quoting: a quote is a letter."""
    lines = _text(path).removesuffix("\n").split("\n")
    heading = [cell.strip() for cell in lines[0].split("\t")]
    wanted = [column for column in task.columns[:2] if column]
    has_heading = all(column in heading for column in wanted)
    if has_heading and task.columns[2] not in heading and may_lack_labels:
        return [], f"{path.name} has no labels and is not used"
    if has_heading:
        missing = [column for column in task.columns if column and column not in heading]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r} (it has {', '.join(heading)}); fetch it again")
        places = tuple(heading.index(column) if column else -1 for column in task.columns)
    elif task.positions is not None and max(task.positions) < len(heading):
        places = task.positions
    else:
        raise UserError(f"{path} has no heading with {', '.join(wanted)}; fetch {task.title} again")
    examples, num_short, num_unlabelled = [], 0, 0
    for number, line in enumerate(lines[has_heading:], 1 + has_heading):
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) <= max(places):
            if not task.skips_short_rows:
                raise UserError(
                    f"{path} line {number} has {len(cells)} columns, at least {max(places) + 1} are needed; mend it"
                )
            num_short += 1
        elif task.labels is None and not cells[places[2]]:
            num_unlabelled += 1
        else:
            label = _label(cells[places[2]], task.labels, f"{path} line {number}")
            examples.append(Example(cells[places[0]], cells[places[1]] if places[1] >= 0 else None, label))
    left_out = [f"{num_short:,} rows with too few columns"] if num_short else []
    left_out += [f"{num_unlabelled:,} pairs without a grade"] if num_unlabelled else []
    return examples, f"{path.name}: left out {' and '.join(left_out)}" if left_out else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); fetch it again") from None


def _label(value: str, labels: tuple[str, ...] | None, where: str) -> float:
    if labels is not None:
        if value not in labels:
            raise UserError(f"{where}: label {value!r} is none of {', '.join(labels)}; mend the line")
        return labels.index(value)
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{where}: grade {value!r} is no number; mend the line") from None


def _from_hub(name: str, task: GlueTask) -> TaskData:
    library = required("datasets", f"--data {HUB}")
    try:
        loaded = library.load_dataset(_HUB_SET, name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{_HUB_SET} {name} cannot be loaded ({reason}); name a folder with --data") from None
    names = {"train": "train", "validation": "valid", "validation_matched": "valid"}
    names |= {"validation_mismatched": "mismatched", "test": "test"}
    first, second = task.hub_columns or (task.columns[0], task.columns[1])
    parts, notes = {}, []
    for split, part in names.items():
        if split not in loaded:
            continue
        rows = loaded[split]
        if part == "test" and all(label == -1 for label in rows["label"]):
            notes.append("the hub's test part has no labels and is not used")
            continue
        classes = getattr(rows.features["label"], "names", None)
        parts[part] = [
            Example(row[first], row[second] if second else None, _hub_label(row["label"], classes, task))
            for row in rows
        ]
    return _checked(TaskData(name, task.labels, task.metrics, parts, task.seeds, tuple(notes)), f"{_HUB_SET} {name}")


_HUB_NAMES = {"unacceptable": "0", "acceptable": "1", "negative": "0", "positive": "1"}
_HUB_NAMES |= {"not_equivalent": "0", "equivalent": "1", "not_duplicate": "0", "duplicate": "1"}


def _hub_label(value: float, classes: list[str] | None, task: GlueTask) -> float:
    """The hub numbers classes in an order of its own (QNLI's and RTE's entailment is 0), so they go by name."""
    if task.labels is None or classes is None or value < 0:
        return _label(str(value), task.labels, _HUB_SET)
    name = classes[int(value)]
    return _label(_HUB_NAMES.get(name, name), task.labels, _HUB_SET)


# --- classification sets ----------------------------------------------------------------------------------------


def read_set(data: str, metric: str | None = None) -> TaskData:
    """A set of classes in JSON lines (`text`, `label`, optionally `text_pair`), or PubMedQA's two files.

    Args:
        data: folder with train.jsonl, dev.jsonl (or valid, validation, val) and, optionally, test.jsonl.
        metric: the deciding score (default: see `tasks.set_metrics`).

    Raises:
        UserError: a file is missing, a line is no such object, or a label is not among the training part's.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"--data={folder} does not exist; name a folder with train.jsonl, dev.jsonl and test.jsonl")
    name = folder.resolve().name
    if all((folder / file).is_file() for file in _PUBMEDQA):
        named = _read_pubmedqa(folder)
        metrics = set_metrics(name, metric or "accuracy")
    else:
        named = {}
        for part, names in _SET_FILES.items():
            path = next((folder / file for file in names if (folder / file).is_file()), None)
            if path is not None:
                named[part] = list(_read_jsonl(path))
            elif part != "test":
                raise UserError(
                    f"{folder} has no {names[0]}; a set needs train.jsonl and dev.jsonl, and may have test.jsonl"
                )
        metrics = set_metrics(name, metric)
    labels = tuple(sorted({label for _, _, _, label in named["train"]}))
    if len(labels) == 1:
        raise UserError(f"{folder}: the training part has the one label {labels[0]!r}; there is nothing to learn")
    parts = {
        part: [Example(text, pair, _label(label, labels, where)) for where, text, pair, label in rows]
        for part, rows in named.items()
    }
    return _checked(TaskData(name, labels, metrics, parts, SET_SEEDS), str(folder))


_Row = tuple[str, str, str | None, str]  # where it stands, text, second text, label


def _read_jsonl(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        row = _parsed(line, where)
        if isinstance(row.get("label"), int):
            row["label"] = str(row["label"])
        fields: Any = [row.get(name) for name in ("text", "text_pair", "label")]
        for name, value in zip(("text", "text_pair", "label"), fields, strict=True):
            if value is not None and not isinstance(value, str):
                raise UserError(f"{where}: {name}={str(value)[:40]!r} is a {type(value).__name__}, not text; mend it")
            if value is None and name != "text_pair":
                raise UserError(f"{where} has no {name!r}; mend it")
        yield where, *fields


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); mend it") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}, not an object with text and label; mend it")
    return value


def _read_pubmedqa(folder: Path) -> dict[str, list[_Row]]:
    """Questions with their abstracts: the 500 of the ground truth as test, of the other 500 a fixed tenth as valid."""
    path, truth_path = (folder / file for file in _PUBMEDQA)
    questions, truth = (_parsed(_text(file), str(file)) for file in (path, truth_path))
    parts: dict[str, list[_Row]] = {"train": [], "valid": [], "test": []}
    others = sorted(questions.keys() - truth.keys())
    chosen = set(random.Random(0).sample(others, len(others) // 10))
    for key, question in questions.items():
        try:
            text, contexts, answer = question["QUESTION"], question["CONTEXTS"], question["final_decision"]
            row = (f"{path} question {key}", text, " ".join(contexts), truth.get(key, answer))
        except (KeyError, TypeError):
            raise UserError(f"{path} question {key} lacks QUESTION, CONTEXTS or final_decision; mend it") from None
        parts["test" if key in truth else "valid" if key in chosen else "train"].append(row)
    return parts


def _checked(data: TaskData, where: str) -> TaskData:
    """The set without its empty parts. UserError: it has nothing to learn from or to choose on, or an empty text."""
    for part in ("train", "valid"):
        if not data.parts.get(part):
            raise UserError(f"{where}: the {part} part of {data.name} is empty; give it examples")
    parts = {part: examples for part, examples in data.parts.items() if examples}
    for part, examples in parts.items():
        if any(not (example.text or example.pair) for example in examples):
            raise UserError(f"{where}: the {part} part of {data.name} has an example without text; mend it")
    return dataclasses.replace(data, parts=parts)
