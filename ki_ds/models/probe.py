"""What a Hugging Face language model does, found out by a few forwards on rows like the run's, never by its name.

Shape suffixes: B sequences, L positions, N labelled rows in order, R probed rows, V padded vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ki_ds.config import Task
from ki_ds.data.batches import IGNORE_INDEX, Batch, Sample, collate
from ki_ds.errors import UserError
from ki_ds.objective.types import Head, LogitForm, LossOutput

Answer = Callable[[Head], Tensor | LossOutput]  # whatever the question asks for

_SHORT = 6  # tokens of the shorter row, fewer than a convolution reaches over
_LONG = 24


@dataclass(frozen=True)
class Rows:
    """The rows that a model will meet."""

    task: Task | None = None  # None: not known; then a token may see those behind it
    seq_len: int = 32  # tokens of the longest
    padded: bool = True  # whether they can get padding
    packing: bool = False  # whether several blocks may share one
    pad_id: int | None = None  # what padding is made of; None: what the model's configuration says


USUAL = Rows()


@dataclass
class Question:
    """What is asked of a projection during one forward, and what came of it."""

    answer: Answer
    rows_N: Tensor | None  # that the projection has to select itself; None once they are selected
    stand_in: Tensor  # the logits that the rest of the forward goes on with
    completed: Callable[[Tensor, Tensor, Tensor | None], Head] = Head  # a head, with what the model adds behind it
    leaves: bool = True  # whether the answer takes the place of the model's logits in the end
    answered: Tensor | None = None
    sums: LossOutput | None = None  # where the answer was a loss, whose loss_sum leaves


class Asked(Protocol):
    """What is probed: a `ki_ds.models.rows.RowLM`."""

    lm: PreTrainedModel
    form: LogitForm
    num_logits: int
    selects_early: bool
    _bias_name: str | None

    def forwarded(self, batch: Batch, question: Question | None = None, **arguments: Any) -> Any:
        """The model's own output for a batch."""

    def ask(self, batch: Batch, answer: Answer) -> Tensor:
        """The answer about the labelled rows."""

    def signal(self, batch: Batch) -> Head:
        """The hidden states of the labelled rows."""


def check(model: Asked, rows: Rows) -> None:
    """As `RowLM.check`."""
    with _looked_at(model.lm), torch.no_grad():
        model.lm.eval()
        batch = _batch(model, rows)
        with _in_one_line(model.lm, "its forward fails"):
            expected_NV = _logits(model, batch)[batch.rows_N]
        with _in_one_line(model.lm, "its logits cannot be taken apart"):
            model.form, model._bias_name = _find_form(model, batch)
        found = [_try(model, batch, expected_NV, early=early) for early in (True, False)]
        if not any(found):
            raise UserError(
                f"{type(model.lm).__name__} changes its logits after the output projection in a way that is not "
                "scale, soft cap or bias; take another model"
            )
        model.selects_early = found[0]
        if rows.task == "causal":
            _check_later_tokens(model, batch)
        if rows.padded:
            _check_padding(model, batch)
        if rows.packing:
            check_packing(model)


def _batch(model: Asked, rows: Rows) -> Batch:
    """A batch as a run's: a long row and a short one, with a few labelled positions each."""
    draw = torch.Generator().manual_seed(1)
    config = model.lm.config.get_text_config()
    pad = getattr(config, "pad_token_id", None) if rows.pad_id is None else rows.pad_id
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "mask", "decoder_start")]
    usual = torch.tensor([i for i in range(2, min(model.num_logits, 512)) if i not in special])
    samples = []
    for number, length in enumerate((min(_LONG, rows.seq_len), min(_SHORT, rows.seq_len))):
        ids = usual[torch.randint(len(usual), (length,), generator=draw)].numpy()
        positions = np.unique([1, length // 2, length - 1])
        samples.append(Sample(number, ids, positions, ids[positions]))
    return collate(samples, pad_id=pad if isinstance(pad, int) else 0, seq_len=rows.seq_len).to(model.lm.device)


def _logits(model: Asked, batch: Batch) -> Tensor:
    """The model's own logits, [B * L, V] in float32 or better."""
    logits_BLV = model.forwarded(batch).logits
    if logits_BLV.shape[:2] != batch.input_ids_BL.shape:
        raise ValueError(f"logits of shape {list(logits_BLV.shape)} for {list(batch.input_ids_BL.shape)} tokens")
    return logits_BLV.flatten(0, 1).float()


def _alone(model: Asked, ids_L: Tensor) -> Tensor:
    """The model's own logits of one row without padding, [L, V]."""
    rows = torch.arange(len(ids_L), device=ids_L.device)
    return _logits(model, of_one(ids_L[None], rows))


def of_one(input_ids_BL: Tensor, rows_N: Tensor) -> Batch:
    """A batch of one sequence in which the given positions are labelled (with their own ids)."""
    labels_BL = torch.full_like(input_ids_BL, IGNORE_INDEX)
    labels_BL[0, rows_N] = input_ids_BL[0, rows_N]
    zero = torch.zeros(1, dtype=torch.int64)
    return Batch(input_ids_BL, labels_BL, rows_N, input_ids_BL[0, rows_N], None, zero, zero, input_ids_BL.numel())


# --- the form of the logits -----------------------------------------------------------------------------------------


def _find_form(model: Asked, batch: Batch) -> tuple[LogitForm, str | None]:
    """What the model makes of the logits z of its projection, and the name of the tensor that it adds to them.

    The model is given logits of our own in the place of its projection's. What comes out shows the scale, the cap and
    the bias; what has a gradient from there is what the model adds.
    """
    z_RV = _probing_logits(model)
    f_RV, bias_name, bias_V = _made_of(model, batch, z_RV)
    z_RV, f_RV = z_RV.double(), f_RV.detach().double()
    tolerance = 1e-4 if _is_exact(model.lm) else 3e-3
    for cap in (None, float(f_RV[-1].abs().max())):
        inner_RV, weight_RV = (f_RV, torch.ones_like(f_RV)) if cap is None else _uncapped(f_RV, cap)
        scale = float((weight_RV * z_RV * (inner_RV - bias_V)).sum() / (weight_RV * z_RV * z_RV).sum())
        form = LogitForm(1.0 if abs(scale - 1.0) < tolerance / 10 else scale, cap)
        error_RV = (shaped(z_RV, bias_V, form) - f_RV).abs()
        if float((error_RV.amax(1) / f_RV.abs().amax(1).clamp(min=1e-3)).max()) < tolerance:
            return form, bias_name
    raise ValueError("what it does to them is no scale, soft cap or bias")


def shaped(products_NV: Tensor, bias_V: Tensor | float | None, form: LogitForm) -> Tensor:
    """The logits that a form makes of the products of hidden states and weights."""
    logits_NV = products_NV * form.scale + (0.0 if bias_V is None else bias_V)
    return logits_NV if form.cap is None else form.cap * torch.tanh(logits_NV / form.cap)


def _probing_logits(model: Asked) -> Tensor:
    """Logits [R, V] of every size up to where a cap cannot be passed, in the model's dtype."""
    draw = torch.Generator().manual_seed(2)
    random_RV = torch.randn(6, model.num_logits, generator=draw) * torch.tensor([1.0, 1, 10, 10, 100, 1000])[:, None]
    ones_V = torch.ones(1, model.num_logits)
    return torch.cat([0 * ones_V, random_RV, 3e4 * ones_V]).to(model.lm.device, model.lm.dtype)


def _uncapped(f_RV: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """What went into the cap, and 1 where that is certain, 0 where it is too near to the cap."""
    ratio_RV = f_RV / max(cap, 1e-30)
    return cap * torch.atanh(ratio_RV.clamp(-0.99, 0.99)), (ratio_RV.abs() < 0.8).double()


def _made_of(model: Asked, batch: Batch, z_RV: Tensor) -> tuple[Tensor, str | None, Tensor]:
    """(what the model makes of the logits, name and values of the bias that it adds)."""
    buffers = {name: buffer for name, buffer in model.lm.named_buffers() if buffer.numel() == model.num_logits}
    named = dict(model.lm.named_parameters()) | buffers
    tensors = {name: tensor for name, tensor in named.items() if tensor.is_floating_point() and tensor.is_leaf}
    flags = {name: tensor.requires_grad for name, tensor in tensors.items()}
    question = Question(lambda _: z_RV.new_zeros(()), batch.rows_N, z_RV[None], leaves=False)
    try:
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        with torch.enable_grad():
            f_RV = model.forwarded(batch, question).logits
            if f_RV.numel() != z_RV.numel():
                raise ValueError("they are put together from several calls of the projection")
            f_RV = f_RV.reshape(z_RV.shape)
            grads: tuple[Tensor | None, ...] = (None,) * len(tensors)
            if f_RV.requires_grad:
                grads = torch.autograd.grad(f_RV.float().sum(), list(tensors.values()), allow_unused=True)
    finally:
        for name, tensor in tensors.items():
            tensor.requires_grad_(flags[name])
    used = [name for name, grad in zip(tensors, grads, strict=True) if grad is not None]
    if not used:
        return f_RV, None, f_RV.new_zeros(()).double()
    if len(used) > 1 or tensors[used[0]].numel() != model.num_logits:
        raise ValueError(f"{' and '.join(used[:2])} change them")
    return f_RV, used[0], tensors[used[0]].detach().reshape(-1).double()


def _try(model: Asked, batch: Batch, expected_NV: Tensor, *, early: bool) -> bool:
    """Whether rows asked about, selected behind the body or only in the head, have the model's own logits."""
    model.selects_early = early
    try:
        signal = model.signal(batch)
        ones = model.ask(batch, lambda _: expected_NV.new_ones(()))
    except Exception:  # some heads take no rows of another shape: then the other way is tried
        return False
    products_NV = nn.functional.linear(signal.hidden_ND, signal.weight_VD).float()
    bias_V = None if signal.bias_V is None else signal.bias_V.float()
    logits_NV = shaped(products_NV, bias_V, signal.form)
    if logits_NV.shape != expected_NV.shape or ones.shape != () or float(ones) != 1.0:
        return False
    return not _differ(model, logits_NV, expected_NV, rounding=1e-3)


def _is_exact(lm: PreTrainedModel) -> bool:
    return lm.dtype in (torch.float32, torch.float64)


def _differ(model: Asked, found_NV: Tensor, expected_NV: Tensor, *, rounding: float) -> bool:
    """Whether logits differ by more than `rounding` of the largest one, or are no numbers.

    In 16 bits rounding may send a token to another expert: then most rows have to differ, by more than 3%.
    """
    worst_N = (found_NV - expected_NV).abs().amax(1) / expected_NV.abs().max().clamp(min=1e-30)
    same = worst_N.max() <= rounding if _is_exact(model.lm) else worst_N.median() <= 3e-2
    return not bool(same)


# --- what a row depends on ------------------------------------------------------------------------------------------


def _check_later_tokens(model: Asked, batch: Batch) -> None:
    """UserError where a token's logits depend on those behind it."""
    ids_L = batch.input_ids_BL[0, : int(batch.lengths[0])]
    changed_L = torch.cat([ids_L[: len(ids_L) // 2], ids_L[len(ids_L) // 2 :].flip(0)])
    first, second = (_alone(model, ids)[: len(ids_L) // 2] for ids in (ids_L, changed_L))
    if _differ(model, second, first, rounding=1e-5):  # of equal shapes, which hardly round
        raise UserError(
            f"{type(model.lm).__name__} sees the tokens that it is to predict; take a causal model "
            "(of an encoder's kind: is_decoder=true in its config.json)"
        )


def _check_padding(model: Asked, batch: Batch) -> None:
    """UserError where a row's logits depend on the row beside it, through the padding that it gets there."""
    length, width = int(batch.lengths[1]), batch.input_ids_BL.shape[1]
    alone_LV = _alone(model, batch.input_ids_BL[1, :length])
    beside_LV = _logits(model, batch)[width : width + length]
    if _differ(model, beside_LV, alone_LV, rounding=1e-4):
        raise _sees_padding(model)


def _check_padded_embeddings(model: Asked, batch: Batch) -> None:
    """UserError where logits depend on the embedding of padding: one that is 0 today need not be after a step."""
    length, width = int(batch.lengths[1]), batch.input_ids_BL.shape[1]
    before_LV = _logits(model, batch)[width : width + length]
    changed = model.lm.get_input_embeddings().register_forward_hook(_changing_padding(batch))
    try:
        after_LV = _logits(model, batch)[width : width + length]
    finally:
        changed.remove()
    if _differ(model, after_LV, before_LV, rounding=1e-5):
        raise _sees_padding(model)


def _changing_padding(batch: Batch) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that puts other embeddings in the place of padding's."""
    mask_BL = batch.attention_mask_BL

    def change(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        if mask_BL is None or not isinstance(out, Tensor) or out.shape[:2] != mask_BL.shape:
            return out
        return torch.where(mask_BL[..., None] == 1, out, out + out.abs().amax())

    return change


def _sees_padding(model: Asked) -> UserError:
    return UserError(
        f"{type(model.lm).__name__} sees padding: what it says of a row depends on the rows beside it; take another "
        "model, or data whose rows all have data.seq_len tokens"
    )


def check_packing(model: Asked) -> None:
    """As `RowLM.check_packing`."""
    ids = torch.arange(2, 12, device=model.lm.device)[None] % model.num_logits
    changed = torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1)
    positions = torch.cat([torch.arange(4), torch.arange(6)]).to(ids.device)[None]
    with _looked_at(model.lm), torch.no_grad():
        model.lm.eval()
        try:
            first, second = (
                model.lm(input_ids=i, position_ids=positions).logits[0, 4:].float() for i in (ids, changed)
            )
            alone = model.lm(input_ids=ids[:, 4:]).logits[0].float()
        except TypeError:  # it knows no position ids
            first, second, alone = torch.eye(3)
    largest = float(alone.abs().max())
    apart = torch.allclose(first, second, rtol=1e-5, atol=1e-6 * largest)
    if not apart or not torch.allclose(first, alone, rtol=1e-2, atol=1e-2 * largest):
        raise UserError(f"{type(model.lm).__name__} cannot keep several blocks of a row apart; take data.packing=false")


# --- losses of its own ----------------------------------------------------------------------------------------------


def check_training(model: Any, rows: Rows) -> tuple[bool, list[str]]:
    """(whether the model adds a loss of its own, notes for the user); as `InheritanceModel.check_training`."""
    lm = model.lm
    with _looked_at(lm), torch.no_grad():
        batch = _batch(model, rows)
        if rows.padded:
            lm.eval()
            _check_padded_embeddings(model, batch)
        lm.train()
        adds = _adds_loss(model, batch)
        if adds is None:
            return False, [
                f"{type(lm).__name__} fails when it is given labels; what it may add to its loss is not trained"
            ]
        if adds or getattr(lm.config, "output_router_logits", None) is not False:
            return adds, []
        lm.config.output_router_logits = True
        if not _adds_loss(model, batch):
            return False, []
    return False, [
        f"{type(lm).__name__} balances its experts only with output_router_logits=true in its config.json; it is "
        "false, so their balance is not trained"
    ]


def _adds_loss(model: Any, batch: Batch) -> bool | None:
    """Whether the model's own forward, given labels, adds something to their cross-entropy that `_ask` gives too.

    None where that forward fails, so that it cannot be told.
    """
    lm = model.lm
    labels_BL = torch.where(batch.labels_BL == IGNORE_INDEX, batch.labels_BL, batch.input_ids_BL)
    if "labels" not in inspect.signature(lm.forward).parameters:
        return False
    try:
        torch.manual_seed(0)
        theirs = model.forwarded(batch, labels=labels_BL)
    except Exception:  # what an architecture's own loss may end in, nobody knows
        return None
    if getattr(theirs, "loss", None) is None:
        return False
    total, logits_BLV = float(theirs.loss), theirs.logits.float()
    plain = [_cross_entropy(logits_BLV, labels_BL), _cross_entropy(logits_BLV[:, :-1], labels_BL[:, 1:])]
    if _explained(total, plain, 0.0, 1e-6):
        return False
    with _in_one_line(lm, "its loss is not the labels' cross-entropy"):
        torch.manual_seed(0)
        question, labels = model.question(batch, lambda _: torch.ones((), device=lm.device), own_loss=True)
        own = float(model.forwarded(batch, question, **labels).loss)
    if not _explained(total, plain, own, 1e-4):
        raise UserError(
            f"{type(lm).__name__} has a loss of its own ({total:.4f} where the labels' cross-entropy is "
            f"{plain[1]:.4f}) that cannot be added; take another model, or a config.json without it"
        )
    return own != 0.0


def _explained(total: float, plain: list[float], own: float, tolerance: float) -> bool:
    """Whether a loss is one of the two cross-entropies, of the labels as they are or moved by one, and `own`."""
    return any(abs(total - ce - own) <= tolerance * max(1.0, abs(total)) for ce in plain)


def _cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE_INDEX))


# --- looking without touching ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _looked_at(lm: PreTrainedModel) -> Iterator[None]:
    """Leave modules, buffers, configuration and all random states as they were, whatever the model's forward does."""
    owners = [*lm.modules(), *{id(m.config): m.config for m in lm.modules() if hasattr(m, "config")}.values()]
    attributes = [(owner, _copied(vars(owner))) for owner in owners]
    buffers = [(buffer, buffer.clone()) for buffer in lm.buffers()]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in buffers:
                    buffer.copy_(values)
            for owner, before in attributes:
                vars(owner).clear()
                vars(owner).update(before)
            random.setstate(python)
            np.random.set_state(numpy)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes, with copies of those that are dictionaries, lists and sets themselves."""
    return {n: copy.copy(v) if isinstance(v, dict | list | set) else v for n, v in attributes.items()}


@contextlib.contextmanager
def _in_one_line(lm: PreTrainedModel, what: str) -> Iterator[None]:
    """Turn any error of a model that was never meant for this into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or "no reason given"
        raise UserError(
            f"{type(lm).__name__} cannot be used: {what} ({type(error).__name__}: {reason}); take another"
        ) from None
