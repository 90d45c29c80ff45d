"""Perplexity from sums of plain cross-entropy over fixed masks: a run's validation, and any models domain by domain."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from rich.progress import Progress
from rich.table import Table

from ki_ds import config as configuration
from ki_ds.config import DataConfig, LossConfig, Task
from ki_ds.data.batches import Batch, ValidBatches
from ki_ds.data.datasets import Vocabulary, check_tokenizer, open_validation
from ki_ds.errors import UserError
from ki_ds.files import write_atomically
from ki_ds.models.presets import (
    DTYPES,
    InheritanceModel,
    Rows,
    check_vocabulary,
    load_lm,
    max_positions,
    model_folder,
    quieten,
)
from ki_ds.objective.types import LossOutput
from ki_ds.ranks.world import all_sum
from ki_ds.reports.metrics import perplexity


@dataclass(frozen=True)
class Perplexity:
    """Cross-entropy in nats summed over `num_rows` labelled rows of all ranks."""

    ce_sum: float
    num_rows: int

    @property
    def ce(self) -> float:
        """Mean cross-entropy in nats."""
        return self.ce_sum / max(self.num_rows, 1)

    @property
    def ppl(self) -> float:
        """exp(ce)."""
        return perplexity(self.ce_sum, self.num_rows)

    @property
    def figures(self) -> dict[str, float]:
        """Sums, and what is made of them, by name."""
        return {"ce_sum": self.ce_sum, "num_rows": self.num_rows, "ce": self.ce, "ppl": self.ppl}

    @classmethod
    def together(cls, parts: Iterable[Self]) -> Self:
        """That of all rows of some parts."""
        parts = list(parts)
        return cls(sum(part.ce_sum for part in parts), sum(part.num_rows for part in parts))


def validate(batches: Iterable[Batch], evaluate: Callable[[Batch], LossOutput], *, device: torch.device) -> Perplexity:
    """The perplexity over all ranks' batches; the same whatever the number of ranks (up to float64 rounding).

    Args:
        batches: this rank's share; every rank must have equally many.
        evaluate: the cross-entropy sums of one batch on the device, without gradient.

    Raises:
        UserError: no row of any batch is labelled.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        out = evaluate(batch.to(device, non_blocking=True))
        sums += torch.stack([out.ce_sum.double(), out.num_rows.double()])
    ce_sum, num_rows = all_sum(sums).tolist()
    if not num_rows:
        raise UserError("the validation set has no labelled row; give it more text, or raise data.mask_probability")
    return Perplexity(ce_sum, int(num_rows))


# --- any models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A model's perplexity in each domain; `tokenizer_checked` is False where its folder has none to compare."""

    model: str
    domains: dict[str, Perplexity]
    tokenizer_checked: bool

    @property
    def together(self) -> Perplexity:
        """That of all domains' rows."""
        return Perplexity.together(self.domains.values())


def measure(
    models: Sequence[str],
    data: DataConfig,
    task: Task,
    *,
    index_dir: Path,
    micro_batch_size: int = 16,
    dtype: str = "fp32",
    device: torch.device | None = None,
    show_progress: bool = True,
) -> list[Measured]:
    """The perplexities of models on the validation sets of `data`, one model in memory at a time.

    Args:
        models: run or checkpoint folders of ours, Hugging Face folders or hub names.
        data: sources or `valid` with the blocks, masks and limits of validation (`valid_mask_variants`,
            `max_valid_samples`); training parts are not read.
        index_dir: where the index goes when it cannot be written beside the token files.
        micro_batch_size: sequences of a forward pass; the figures do not depend on it.

    Raises:
        UserError: the data or a model cannot be used, or a model has another tokenizer or too few positions.
    """
    quieten()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    valid, vocabulary = open_validation(data, task, other_index_dir=index_dir)
    batches = {
        domain: ValidBatches(
            samples,
            micro_batch_size=micro_batch_size,
            max_samples=data.max_valid_samples,
            num_variants=data.valid_mask_variants,
        )
        for domain, samples in valid.items()
    }
    padded = any(samples.padded for samples in valid.values())
    pad_id = next(iter(valid.values())).pad_id
    rows = Rows(task, data.seq_len, padded=padded, packing=data.packing, pad_id=pad_id)
    measured = []
    with Progress(disable=not show_progress, transient=True) as progress:
        for name in models:
            bar = progress.add_task(name, total=sum(map(len, batches.values())))
            model, checked = _load(name, task, rows, vocabulary, DTYPES[dtype], device)

            @torch.no_grad()
            def evaluate(batch: Batch, model: InheritanceModel = model, bar: object = bar) -> LossOutput:
                progress.advance(bar)  # type: ignore[arg-type]
                return model(batch)[0]

            domains = {domain: validate(part, evaluate, device=device) for domain, part in batches.items()}
            measured.append(Measured(name, domains, checked))
    return measured


def _load(
    name: str, task: Task, rows: Rows, vocabulary: Vocabulary, dtype: torch.dtype, device: torch.device
) -> tuple[InheritanceModel, bool]:
    folder = model_folder(name)
    checked = check_tokenizer(folder, vocabulary.sha256, task, what="model")
    lm = load_lm(folder, task, dtype, what="model")
    check_vocabulary(lm, vocabulary.size, what=f"model {name}")
    limit = max_positions(lm)
    if limit is not None and rows.seq_len > limit:
        raise UserError(f"data.seq_len={rows.seq_len} exceeds the {limit} positions of {name}; lower it")
    model = InheritanceModel(lm, num_classes=vocabulary.size, loss=LossConfig(), tau=1.0).to(device).eval()
    model.check(rows)
    return model, checked


def data_of_run(name: str) -> tuple[DataConfig, Task]:
    """What a run of ours was validated on. UserError: it is no run."""
    path = Path(name) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{name} is no run of ours, whose data would be known; give --data and --task")
    config = configuration.load(path, saved=True)
    return config.data, config.task


def given_data(
    corpora: Sequence[str],
    task: Task | None,
    *,
    tokenizer: str | None,
    seq_len: int,
    mask_variants: int,
    max_samples: int | None,
) -> tuple[DataConfig, Task]:
    """The validation sets of corpora named as [DOMAIN=]CORPUS. UserError: the task is missing, or a value is wrong."""
    if task is None:
        raise UserError("--data needs --task mlm or --task causal")
    named: dict[str, str] = {}
    for given in corpora:
        name, equals, path = given.partition("=")
        named.update({name: path} if equals else {Path(given).name: given})
    data = DataConfig(
        corpus=next(iter(named.values())),
        valid=named,
        tokenizer=tokenizer,
        seq_len=seq_len,
        valid_mask_variants=mask_variants,
        max_valid_samples=max_samples,
    )
    configuration.validate(configuration.RunConfig(run_dir="unused", task=task, data=data))
    return data, task


def write_figures(measured: Sequence[Measured], path: Path) -> None:
    """Write sums, rows and perplexities of each model and domain as JSON."""
    rows = [{"model": row.model, **{name: part.figures for name, part in row.domains.items()}} for row in measured]
    write_atomically(path, json.dumps(rows, indent=2) + "\n")


def table(measured: Sequence[Measured]) -> Table:
    """A row a model; with several, each domain's change against the first (Table 4: what adaptation forgets)."""
    shown = Table("model", *measured[0].domains, *(["together"] if len(measured[0].domains) > 1 else []), box=None)
    for row in measured:
        parts = {**row.domains, **({"together": row.together} if len(row.domains) > 1 else {})}
        cells = [f"{part.ppl:.2f}" for part in parts.values()]
        if row is not measured[0]:
            first = {**measured[0].domains, "together": measured[0].together}
            cells = [
                f"{cell} ({part.ppl / first[domain].ppl - 1:+.1%})"
                for cell, (domain, part) in zip(cells, parts.items(), strict=True)
            ]
        shown.add_row(row.model, *cells)
    return shown
