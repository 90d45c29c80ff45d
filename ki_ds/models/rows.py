"""How the labelled rows of a batch meet the output projection of any Hugging Face language model.

A model is asked a question about the labelled rows of a batch. The question is put to the output projection,
inside the model's own forward: rows are selected before any head (15% of them for mlm), no logits are formed
that nobody wants, and ZeRO-3 has the projection's weight gathered exactly there. What the model does to its logits
behind the projection meets a stand-in instead of the answer; `ki_ds.models.probe` finds it out once, as a `LogitForm`.

Shape suffixes: B sequences, L positions, N labelled rows in order, D hidden size, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mobilebert.modeling_mobilebert import MobileBertLMPredictionHead

from ki_ds.config import LossConfig
from ki_ds.data.batches import Batch
from ki_ds.errors import UserError
from ki_ds.models import probe
from ki_ds.models.probe import USUAL, Answer, Question, Rows
from ki_ds.objective.loss import loss
from ki_ds.objective.rows import Objective
from ki_ds.objective.types import Head, LogitForm, LossOutput, Signal

_CERTAIN = 1e4  # a logit, beside its negative, of a class that any scale or cap leaves certain


class _Asked:
    """An output projection: while a question is put to it, its forward gives the answer, and its caller a stand-in."""

    question: Question | None

    def projected(self, hidden: Tensor) -> Tensor:
        """What the projection multiplies."""
        return hidden

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """(weight_VD, bias_V), differentiable."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)  # type: ignore[misc] # the hooks of ZeRO-3 see the answer
        if self.question is None:
            return out
        self.question.answered = out
        return self.question.stand_in

    def forward(self, hidden: Tensor) -> Tensor:
        question = self.question
        if question is None:
            return super().forward(hidden)  # type: ignore[misc]
        hidden_ND = self.projected(hidden)
        hidden_ND = hidden_ND.reshape(-1, hidden_ND.shape[-1])
        if question.rows_N is not None:  # an architecture whose body selects none
            hidden_ND = hidden_ND[question.rows_N]
        answer = question.answer(question.completed(hidden_ND, *self.projection()))
        if isinstance(answer, LossOutput):
            question.sums, answer = answer, answer.loss_sum
        return answer


class AskedHead(_Asked, nn.Linear):
    """A linear output projection that can be asked."""

    def projection(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class AskedMobileBertHead(_Asked, MobileBertLMPredictionHead):
    """MobileBERT's head, whose projection is put together from two weights."""

    def projected(self, hidden: Tensor) -> Tensor:
        return self.transform(hidden)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        return torch.cat([self.decoder.weight, self.dense.weight.t()], dim=1), self.decoder.bias


_ASKED = {nn.Linear: AskedHead, MobileBertLMPredictionHead: AskedMobileBertHead}


def _projection_of(lm: PreTrainedModel) -> nn.Module:
    """The module whose forward is the output projection, a class of `_ASKED` before or after it was made askable."""
    composed = [m for m in lm.modules() if isinstance(m, MobileBertLMPredictionHead)]
    head = composed[0] if composed else lm.get_output_embeddings()
    if type(head) not in (*_ASKED, *_ASKED.values()):
        raise UserError(f"{type(lm).__name__} has no linear output projection ({type(head).__name__}); take another")
    return head


def _inputs(batch: Batch) -> dict[str, Tensor]:
    masks = {"attention_mask": batch.attention_mask_BL, "position_ids": batch.position_ids_BL}
    return {"input_ids": batch.input_ids_BL} | {name: tensor for name, tensor in masks.items() if tensor is not None}


class RowLM(nn.Module):
    """A Hugging Face LM that answers questions about the labelled rows of a batch; `check` it before the first one."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        self.form = LogitForm()
        self._bias_name: str | None = None  # of the parameter or buffer that the model adds behind its projection
        head: Any = _projection_of(lm)
        head.__class__ = _ASKED.get(type(head), type(head))  # in place: names, ties and hooks stay as they are
        head.question = None
        self._found = (head,)  # in a tuple: it is the LM's module, not one more of this one's
        self.num_logits = self._head.projection()[0].shape[0]
        self.selects_early = True
        bodies = [module for module in (lm.base_model, lm.get_decoder()) if module is not lm and module is not head]
        for body in {id(m): m for m in bodies if isinstance(m, nn.Module)}.values():
            body.register_forward_hook(self._select_rows)
        lm.register_forward_hook(self._leave)

    @property
    def _head(self) -> Any:
        return self._found[0]

    def _select_rows(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        question = self._head.question
        if self.selects_early and question is not None and question.rows_N is not None:
            hidden_BLD = output.last_hidden_state
            output["last_hidden_state"] = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])[question.rows_N][None]
            question.rows_N = None
        return output

    def _leave(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Let the answer leave through the model's own outputs: ZeRO-3 hooks its backward onto them."""
        question = self._head.question
        if question is not None and question.answered is not None and question.leaves:
            output["logits"] = question.answered
        return output

    @contextmanager
    def _asking(self, question: Question | None) -> Iterator[None]:
        self._head.question = question
        try:
            yield
        finally:
            self._head.question = None

    def forwarded(self, batch: Batch, question: Question | None = None, **arguments: Any) -> Any:
        """The model's own output for a batch; with a question, its `logits` are the answer."""
        with self._asking(question):
            return self.lm(**_inputs(batch), **arguments)

    def question(self, batch: Batch, answer: Answer, *, own_loss: bool = False) -> tuple[Question, dict[str, Tensor]]:
        """A question about the labelled rows of a batch, and what the model's forward is given besides.

        With `own_loss` the output's `loss` will be what the model adds to its loss itself: it is given labels of which
        its logits, the stand-in's, leave no doubt, so that their cross-entropy is 0.
        """
        ids_BL = batch.input_ids_BL
        stand_in = torch.zeros(1, 1, self.num_logits, dtype=self.lm.dtype, device=ids_BL.device)
        question = Question(answer, batch.rows_N, stand_in, self._completed)
        if not own_loss:
            return question, {}
        question.stand_in = stand_in.expand(1, 2, -1) - _CERTAIN
        question.stand_in[..., 0] = _CERTAIN
        return question, {"labels": ids_BL.new_zeros(1, 2)}

    def ask(self, batch: Batch, answer: Answer) -> Tensor:
        """The answer to a head of the labelled rows of the batch, given from inside the model's own."""
        return self.forwarded(batch, self.question(batch, answer)[0]).logits

    def _completed(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Head:
        return Head(hidden_ND, weight_VD, self._complete_bias(bias_V), self.form)

    def _complete_bias(self, bias_V: Tensor | None) -> Tensor | None:
        """All that is added to the scaled products: the projection's own bias, and that of the model behind it."""
        if bias_V is not None and self.form.scale != 1.0:
            bias_V = bias_V * self.form.scale
        if self._bias_name is None:
            return bias_V
        owner, _, name = self._bias_name.rpartition(".")
        added_V = getattr(self.lm.get_submodule(owner), name).reshape(-1)
        return added_V if bias_V is None else bias_V + added_V

    def signal(self, batch: Batch) -> Head:
        """The hidden states of the labelled rows with the output projection, as a teacher gives them."""
        hidden_ND = self.ask(batch, lambda head: head.hidden_ND)
        return self._completed(hidden_ND.reshape(-1, hidden_ND.shape[-1]), *self._head.projection())

    def check(self, rows: Rows = USUAL) -> None:
        """Find out what the model does to its logits, and return silently if rows can be asked about; once, before all.

        It stays as it is: weights, buffers, modes, attributes and the state of random numbers.

        Raises:
            UserError: its logits are no form of the projection, it fails on such rows, or it sees what it must not:
                the tokens behind one of a causal model, padding, another block of a packed row.
        """
        probe.check(self, rows)

    def check_packing(self) -> None:
        """Return silently if several blocks of one row do not see each other; raise UserError if they do."""
        probe.check_packing(self)


class InheritanceModel(RowLM):
    """The student with its objective: what the DeepSpeed engine wraps."""

    def __init__(self, lm: PreTrainedModel, *, num_classes: int, loss: LossConfig, tau: float):
        super().__init__(lm)
        self.num_classes, self.loss, self.tau = num_classes, loss, tau
        self.adds_loss = False

    def check_training(self, rows: Rows = USUAL) -> list[str]:
        """Find out whether the model's own forward adds to its loss, as routers do to balance experts; notes on it.

        From then on `forward` gives it as well. It is what the model adds to its loss when it is given labels.

        Raises:
            UserError: it adds something that cannot be had without all logits, or would come to see padding.
        """
        self.adds_loss, notes = probe.check_training(self, rows)
        return notes

    def forward(
        self, batch: Batch, signal: Signal | None = None, alpha: float | Tensor = 0.0
    ) -> tuple[LossOutput, Tensor | None]:
        """The sums of equation 2 over the labelled rows of the batch, and what the architecture adds to its loss.

        That is None unless it trains and adds something: its own coefficients included, a mean over this micro-batch,
        no sum over rows.

        Args:
            batch: on the model's device.
            signal: the teacher's; None is self-learning, whatever alpha is.
            alpha: the inheritance rate, a number or a 0-d tensor.
        """
        config, training = self.loss, self.training
        objective = Objective.configured(
            config,
            training=training,
            alpha=0.0 if signal is None else alpha,
            tau=self.tau,
            num_classes=self.num_classes,
        )
        answer = partial(
            loss,
            labels=batch.row_labels_N,
            teacher=signal,
            objective=objective,
            backend=config.backend,
            chunk_rows=config.chunk_rows,
        )
        question, arguments = self.question(batch, answer, own_loss=self.adds_loss and training)
        with self._asking(question):
            out = self.lm(**_inputs(batch), **arguments)
        assert question.sums is not None
        return question.sums._replace(loss_sum=out.logits), out.loss.float() if arguments else None
