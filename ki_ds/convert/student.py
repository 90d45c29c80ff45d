"""A run's student as a Hugging Face folder that says and does in anyone's hands what was measured in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ki_ds.checkpoints import lineage
from ki_ds.config import Task
from ki_ds.convert.card import model_card
from ki_ds.convert.sources import Source, run_facts
from ki_ds.convert.unpadded import begin_with, cut, readable_alike, unpadded
from ki_ds.convert.vocabulary import tokenizer_lines
from ki_ds.data.datasets import Vocabulary
from ki_ds.data.tokenizer_files import Files
from ki_ds.files import write_json
from ki_ds.models.presets import count_parameters, max_positions, weights_sha256


@dataclass(frozen=True)
class StudentFolder:
    """Writes the student's weights as a folder with all that belongs beside them, which was made before the first step.

    Args:
        lm: the student without padding and weights, whose configurations are those of the folder.
        files: tokenizer and dictionary.
        notes: lines about them for the model card.
    """

    task: Task
    lm: PreTrainedModel
    files: Files
    notes: Sequence[str]

    @classmethod
    def of(cls, lm: PreTrainedModel, task: Task, vocabulary: Vocabulary, *, dtype: torch.dtype) -> StudentFolder:
        """Made before anything is trained.

        Args:
            lm: the student, its padding included.
            dtype: of the weights that will be written.

        Raises:
            UserError: the tokenizer cannot be saved as it is, or the padding cannot be left out.
        """
        made = unpadded(lm, vocabulary.size, dtype=dtype)
        made.config.use_cache = True  # of no use in training, but whoever generates wants it
        if task == "causal":
            assert vocabulary.special_ids.eos is not None
            eos = vocabulary.special_ids.eos
            begin_with(made, eos, eos=eos, pad=vocabulary.special_ids.pad)
        files = vocabulary.files(task, limit=max_positions(lm), config=made.config.to_json_string())
        notes = [f"dict.txt: fairseq's dictionary of {vocabulary.size:,} ids"] if vocabulary.dictionary else []
        if vocabulary.tokenizer is None:
            notes.append("no tokenizer: ids mean what dict.txt says")
        else:
            notes += tokenizer_lines(vocabulary.tokenizer, vocabulary.size)
        return cls(task, made, files, notes)

    @property
    def parameters(self) -> dict[str, int]:
        """`count_parameters` of what is written."""
        return count_parameters(self.lm)

    def write(
        self,
        folder: Path,
        state: dict[str, Tensor],
        describe: Callable[..., lineage.Lineage],
        *,
        what: str,
        run_dir: Path,
        manifest: dict[str, Any],
        facts: dict[str, Any],
    ) -> None:
        """Write the folder.

        Args:
            state: the student's whole weights, padding included.
            describe: (weights=SHA-256) -> the record of its lineage.
            what: one line for the model card.
            facts: of these weights, for the model card.
        """
        self.lm.save_pretrained(folder, state_dict=cut(state, self.lm))
        record = describe(weights=weights_sha256(str(folder)))
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        known = run_facts(run_dir, manifest)
        source = Source(
            what=what,
            task=self.task,
            files=tuple(sorted(folder.glob("*.safetensors"))),
            model=lambda _: self.lm,
            facts={name: value for name, value in (facts | known).items() if value is not None},
            lineage=record,
        )
        dtype = str(self.lm.dtype).removeprefix("torch.")
        card = model_card(
            manifest["name"], source, self.lm, dtype=dtype, license_name="other", vocabulary=self.notes, checks=[]
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / lineage.FILE_NAME, record)
        readable_alike(folder)
