"""What a downstream data set is, the eight tasks of GLUE, and the settings of the paper (Table 8).

Nothing here needs more than the standard library: the command line reads it for its defaults.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from ki_ds.evaluation.scores import GRADED


@dataclass(frozen=True)
class Example:
    """A text, or a pair of texts, and its class index or grade."""

    text: str
    pair: str | None
    label: float


@dataclass(frozen=True)
class TaskData:
    """A data set that models are fine-tuned on.

    Args:
        name: of the task or folder.
        labels: names of the classes by index; None for grades.
        metrics: names of its scores; the first chooses epochs and settings and stands for the task.
        parts: "train", "valid" (on which everything is chosen), and "test" and others where they are labelled.
        seeds: fine-tunings that the paper repeats.
        notes: what was left out in reading, one line each.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    parts: dict[str, list[Example]]
    seeds: int
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The usual name of a task of GLUE; another set's own."""
        return GLUE[self.name].title if self.name in GLUE else self.name

    @property
    def is_graded(self) -> bool:
        """Whether labels are grades, for a regression."""
        return self.labels is None

    @property
    def scored_part(self) -> str:
        """The part whose score is reported: "test" where it is labelled, else "valid", as the paper does for GLUE."""
        return "test" if "test" in self.parts else "valid"

    def sha256(self) -> str:
        """Hash of everything that a result depends on."""
        digest = hashlib.sha256(json.dumps([self.labels, self.metrics]).encode())
        for name, examples in self.parts.items():
            digest.update(json.dumps([name, [[e.text, e.pair, e.label] for e in examples]]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE in its files.

    Args:
        title: its usual name.
        labels: as the files write them, by class index; None for grades.
        metrics: those of Liu et al. (2019), whose settings the paper follows; GLUE's further ones behind them.
        columns: headings of text, second text and label; "" for none.
        folders: under `--data`, that of GLUE's download first.
        positions: of the columns in files without a heading, -1 for none.
        seeds: how often Figure 6 repeats it (of MRPC and QQP it says nothing).
        skips_short_rows: rows with too few columns are in GLUE's own file and left out by everyone.
        hub_columns: the data set's columns in `datasets`, where they differ.
    """

    title: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    columns: tuple[str, str, str]
    folders: tuple[str, ...]
    positions: tuple[int, int, int] | None = None
    seeds: int = 5
    skips_short_rows: bool = False
    hub_columns: tuple[str, str] | None = None


_YES_NO, _ENTAILS = ("0", "1"), ("not_entailment", "entailment")
_MNLI, _PAIR = ("entailment", "neutral", "contradiction"), ("sentence1", "sentence2")
_SENTENCE = ("sentence", "", "label")
GLUE: dict[str, GlueTask] = {
    "cola": GlueTask("CoLA", _YES_NO, ("matthews",), _SENTENCE, ("CoLA", "cola"), positions=(3, -1, 1)),
    "sst2": GlueTask("SST-2", _YES_NO, ("accuracy",), _SENTENCE, ("SST-2", "sst2", "sst2_glue", "sst-2")),
    "mrpc": GlueTask(
        "MRPC", _YES_NO, ("accuracy", "f1"), ("#1 String", "#2 String", "Quality"), ("MRPC", "mrpc"), hub_columns=_PAIR
    ),
    "stsb": GlueTask(
        "STS-B",
        None,
        ("pearson", "spearman"),
        (*_PAIR, "score"),
        ("STS-B", "stsb", "sts", "sts-b"),
        positions=(1, 2, 0),
    ),
    "qqp": GlueTask(
        "QQP",
        _YES_NO,
        ("accuracy", "f1"),
        ("question1", "question2", "is_duplicate"),
        ("QQP", "qqp"),
        seeds=3,
        skips_short_rows=True,
    ),
    "mnli": GlueTask(
        "MNLI",
        _MNLI,
        ("accuracy",),
        (*_PAIR, "gold_label"),
        ("MNLI", "mnli"),
        seeds=3,
        hub_columns=("premise", "hypothesis"),
    ),
    "qnli": GlueTask(
        "QNLI", _ENTAILS, ("accuracy",), ("question", "sentence", "label"), ("QNLI", "qnli", "QNLIv2"), seeds=3
    ),
    "rte": GlueTask("RTE", _ENTAILS, ("accuracy",), (*_PAIR, "label"), ("RTE", "rte", "rte_glue")),
}

# What Gururangan et al. (2020) score, whom the paper follows: micro F1 for ChemProt, macro F1 elsewhere.
SET_METRICS = {"chemprot": "micro_f1"}
SET_SEEDS = 10  # Table 2


def set_metrics(name: str, chosen: str | None = None) -> tuple[str, ...]:
    """The scores of a classification set: the chosen one, or that of its name, and two more beside it."""
    first = chosen or SET_METRICS.get(name.lower(), "macro_f1")
    assert first not in GRADED
    rest = ("macro_f1", "micro_f1") if first == "micro_f1" else ("macro_f1", "accuracy")
    return (first, *(metric for metric in rest if metric != first))


@dataclass(frozen=True)
class Settings:
    """One way to fine-tune; the defaults are those of Table 8 that it has one value for.

    Args:
        lr: peak learning rate, reached after `warmup_ratio` of the updates and then falling linearly to 0.
        batch_size: examples of an update.
        epochs: at most; the one with the best score on the validation part counts (Liu et al., 2019).
        max_length: tokens of an example; longer ones are cut (the longer text of a pair first).
        max_train_samples: a fixed random part of the training examples; None takes all.
        micro_batch_size: examples of a forward pass; the loss is the mean over the whole batch.
        precision: of the computation: fp32, or autocast to bf16 or fp16.
    """

    lr: float
    batch_size: int
    epochs: int = 10
    warmup_ratio: float = 0.06
    weight_decay: float = 0.1
    max_length: int = 512
    max_train_samples: int | None = None
    micro_batch_size: int = 32
    precision: str = "fp32"


@dataclass(frozen=True)
class Grid:
    """The settings that are tried: each learning rate with each batch size."""

    lrs: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    common: dict[str, object] = field(default_factory=dict)

    def settings(self) -> list[Settings]:
        """All of them."""
        return [Settings(lr, size, **self.common) for lr in self.lrs for size in self.batch_sizes]  # type: ignore[arg-type]


PAPER_GRIDS = {"glue": Grid((1e-5, 2e-5, 3e-5), (16, 32)), "classify": Grid((2e-5,), (256,))}
