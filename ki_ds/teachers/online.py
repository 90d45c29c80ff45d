"""A teacher in the student's own process: a plain frozen module, whose pages the ranks of a host share."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ki_ds.data.batches import Batch
from ki_ds.engine.memory import give_freed_memory_back
from ki_ds.models.presets import RowLM
from ki_ds.models.probe import USUAL, Rows
from ki_ds.objective.types import Head
from ki_ds.teachers.teacher import Teacher


class OnlineTeacher(Teacher):
    """Runs the teacher's forward on the student's batch, in eval mode, without gradient.

    It is never a submodule of the student, so no optimizer, checkpoint or ZeRO stage ever sees it.
    """

    def __init__(self, lm: PreTrainedModel, *, device: torch.device, rows: Rows = USUAL):
        self._model: RowLM | None = RowLM(lm.eval().requires_grad_(False).to(device))
        self._model.eval().check(rows)

    @torch.no_grad()
    def signal(self, batch: Batch) -> Head:
        """The last hidden states of the labelled rows (N, D) and the output projection, in the teacher's dtype."""
        assert self._model is not None, "a freed teacher was asked"
        return self._model.signal(batch)

    def free(self) -> None:
        """Give the weights' memory back to the device, whoever else still holds the module."""
        assert self._model is not None
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        give_freed_memory_back()
