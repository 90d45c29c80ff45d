"""Checked arguments of the public loss functions, on their way to the operators.

Everything that can be checked without waiting for a device is checked here, in one line for the user.
Labels and entries on a GPU cannot: a label that is no class makes its row's loss NaN there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ki_ds.errors import UserError
from ki_ds.objective import ops
from ki_ds.objective.backend import resolve_backend
from ki_ds.objective.linear import default_chunk_rows
from ki_ds.objective.rows import TOPK_SEMANTICS, LogitForm

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class HeadArguments(NamedTuple):
    """A teacher's hidden states [..., E], weight [V, E], bias [V], row numbers [M] and form, as the user gave them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    form: LogitForm


def flat(tensor: Tensor) -> Tensor:
    """The tensor as [rows, last dimension]."""
    return tensor.reshape(-1, tensor.shape[-1])


@dataclass(frozen=True)
class Call:
    """The arguments that every loss function has, flattened; made by `Call.check`."""

    labels_N: Tensor
    row_weights_N: Tensor | None
    alpha: float
    alpha_tensor: Tensor | None
    tau: float
    ignore_index: int
    label_smoothing: float
    backend: str

    @classmethod
    def check(
        cls,
        inputs: Tensor,
        labels: Tensor,
        *,
        alpha: float | Tensor,
        tau: float,
        ignore_index: int,
        row_weights: Tensor | None,
        label_smoothing: float,
        backend: str,
    ) -> "Call":
        """`inputs` are the student's logits or hidden states, whose leading shape all rows share."""
        check_float("the student's rows", inputs)
        if inputs.dim() == 0 or inputs.shape[-1] == 0:
            raise UserError(f"the student's rows have shape {tuple(inputs.shape)}; give [..., width > 0]")
        check_rows("labels", labels.shape, inputs)
        check_device("labels", labels, inputs)
        if labels.dtype not in (torch.int64, torch.int32):
            raise UserError(f"labels have dtype {labels.dtype}; give int64 class numbers")
        if row_weights is not None:
            check_rows("row_weights", row_weights.shape, inputs)
            check_device("row_weights", row_weights, inputs)
        _check_numbers(alpha, tau, label_smoothing)
        as_tensor = isinstance(alpha, Tensor)
        if isinstance(alpha, Tensor) and alpha.is_cuda != inputs.is_cuda and alpha.is_cuda:
            raise UserError(f"alpha is on {alpha.device}, the student's rows on {inputs.device}; move alpha there")
        return cls(
            labels_N=labels.reshape(-1),
            row_weights_N=None if row_weights is None else row_weights.detach().reshape(-1).float(),
            alpha=0.0 if as_tensor else float(alpha),
            alpha_tensor=alpha if isinstance(alpha, Tensor) else None,
            tau=float(tau),
            ignore_index=ignore_index,
            label_smoothing=float(label_smoothing),
            backend=_backend(backend, inputs),
        )

    @property
    def uses_teacher(self) -> bool:
        """False if alpha is known to be 0: then no number of a teacher may be touched."""
        return self.alpha_tensor is not None or self.alpha != 0.0

    def only(self, rows: Tensor, *, label_only: bool = False) -> "Call":
        """The same call for some of its rows; with `label_only` their teacher is left out."""
        weights = None if self.row_weights_N is None else self.row_weights_N[rows]
        call = replace(self, labels_N=self.labels_N[rows], row_weights_N=weights)
        return replace(call, alpha=0.0, alpha_tensor=None) if label_only else call

    def without_teacher(self, missing: str) -> "Call":
        """The call with its labels alone, as no teacher was given: an error if alpha asks for one."""
        if self.alpha != 0.0:
            raise UserError(f"alpha={self.alpha} needs a teacher; give {missing}, or alpha=0.0")
        return replace(self, alpha_tensor=None)

    # -- checks of what only some functions have

    def check_topk(self, ids: Tensor, probs: Tensor, semantics: str, inputs: Tensor) -> list[Tensor]:
        """Teacher entries as [N, K] ids and float probabilities, or nothing where alpha is 0."""
        if semantics not in TOPK_SEMANTICS:
            raise UserError(f"semantics={semantics!r} is not one of {', '.join(TOPK_SEMANTICS)}")
        if not self.uses_teacher:
            return []
        if ids.shape != probs.shape:
            raise UserError(
                f"topk_ids {tuple(ids.shape)} and topk_probs {tuple(probs.shape)} differ; give both [..., K]"
            )
        check_rows("topk_ids", ids.shape[:-1], inputs)
        if ids.is_floating_point() or not probs.is_floating_point():
            raise UserError(f"topk_ids are {ids.dtype}, topk_probs {probs.dtype}; give integers and floats")
        for name, tensor in (("topk_ids", ids), ("topk_probs", probs)):
            check_device(name, tensor, inputs)
        return [flat(ids), flat(probs).detach()]

    def check_teachers(self, rows: Sequence[tuple[int, Tensor | None]], shares: Sequence[float] | None) -> None:
        """`rows` holds, for each of several teachers, how many rows it has and which."""
        if not self.uses_teacher:
            return
        if not rows:
            raise UserError("teachers is empty; give at least one, or alpha=0.0")
        if shares is not None and (len(shares) != len(rows) or min(shares) <= 0):
            raise UserError(f"shares={tuple(shares)} for {len(rows)} teachers; give one positive number each")
        for number, (count, index) in enumerate(rows):
            if shares is not None and (index is not None or count != self.labels_N.shape[0]):
                raise UserError(f"teachers[{number}] is averaged by shares, so it needs all rows and rows=None")
            if shares is None and (index is None or index.shape != (count,)):
                raise UserError(f"teachers[{number}] has {count} rows; say which with rows=[{count}], or give shares")
        if shares is None and not self.labels_N.is_cuda:
            self._check_routes([index for _, index in rows if index is not None])

    def _check_routes(self, indices: list[Tensor]) -> None:
        every = torch.cat([index.reshape(-1) for index in indices])
        num_rows = self.labels_N.shape[0]
        if every.numel() and (int(every.min()) < 0 or int(every.max()) >= num_rows):
            raise UserError(f"teachers' rows reach from {int(every.min())} to {int(every.max())}; there are {num_rows}")
        if every.unique().numel() != every.numel():
            raise UserError("teachers' rows name a row twice; give every row to one teacher, or average by shares")

    def check_labels(self, num_classes: int) -> None:
        """Labels on the CPU must be classes or `ignore_index`."""
        if self.labels_N.is_cuda or torch.compiler.is_compiling():
            return
        wrong = (self.labels_N < 0) | (self.labels_N >= num_classes)
        wrong &= self.labels_N != self.ignore_index
        if bool(wrong.any()):
            value = int(self.labels_N[wrong][0])
            raise UserError(
                f"label {value} is neither a class (0 to {num_classes - 1}) nor ignore_index={self.ignore_index}"
            )

    def untaught(self, indices: list[Tensor]) -> Tensor:
        """Numbers of the rows that no teacher has."""
        free_N = torch.ones_like(self.labels_N, dtype=torch.bool)
        for index in indices:
            free_N[index] = False
        count = self.labels_N.shape[0] - sum(index.shape[0] for index in indices)
        return torch.nonzero_static(free_N, size=count)[:, 0]

    # -- the two ways on

    def from_logits(
        self,
        logits: Tensor,
        num_classes: int,
        *,
        teachers: Sequence[Tensor] = (),
        shares: Sequence[float] = (),
        topk: Sequence[Tensor] = (),
        semantics: str = "renormalise",
    ) -> Sums:
        """loss_sum, ce_sum, kl_sum, num_rows and teachers of logits [N, V]."""
        self.check_labels(num_classes)
        sums = ops.logits_loss(
            logits.contiguous(),
            self.labels_N,
            self.row_weights_N,
            self.alpha_tensor,
            *(topk or (None, None)),
            [teacher if teacher.stride(-1) == 1 else teacher.contiguous() for teacher in teachers],
            [float(share) for share in shares],
            self.alpha,
            self.tau,
            self.ignore_index,
            num_classes,
            self.label_smoothing,
            semantics,
            self.backend,
            _wants_grad(logits),
        )
        return sums[0], sums[1], sums[2], sums[3], sums[4]

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        form: LogitForm,
        num_classes: int | None,
        chunk_rows: int | None,
        heads: Sequence[HeadArguments] = (),
        shares: Sequence[float] = (),
        topk: Sequence[Tensor] = (),
        semantics: str = "renormalise",
    ) -> Sums:
        """loss_sum, ce_sum, kl_sum, num_rows and teachers of hidden states [..., D] and a head."""
        hidden_ND, weight, bias = (
            _autocast(flat(hidden)),
            _autocast(weight),
            None if bias is None else _autocast(bias),
        )
        check_head("student", hidden_ND, weight, bias)
        check_form("student_form", form)
        for head in heads:
            check_form("a teacher's form", head.form)
        widths = {"student_weight": weight.shape[0]}
        widths |= {f"teacher {i}'s weight": head.weight.shape[0] for i, head in enumerate(heads)}
        classes = check_num_classes(num_classes, widths)
        self.check_labels(classes)
        if chunk_rows is not None and chunk_rows < 1:
            raise UserError(f"chunk_rows={chunk_rows} must be at least 1, or None for a choice by the sizes")
        sums = ops.linear_loss(
            hidden_ND.contiguous(),
            weight,
            bias,
            self.labels_N,
            self.row_weights_N,
            self.alpha_tensor,
            *(topk or (None, None)),
            [tensor for head in heads for tensor in _head_tensors(head)],
            [float(share) for share in shares],
            [number for each in (form, *(head.form for head in heads)) for number in each.numbers],
            self.alpha,
            self.tau,
            self.ignore_index,
            classes,
            self.label_smoothing,
            semantics,
            chunk_rows or default_chunk_rows(hidden_ND.shape[0], weight.shape[0], hidden_ND),
            self.backend,
            [_wants_grad(tensor) for tensor in (hidden_ND, weight, bias)],
        )
        return sums[0], sums[1], sums[2], sums[3], sums[4]


def _backend(backend: str, inputs: Tensor) -> str:
    """As `resolve_backend`; float64, which is for checks, is left to plain PyTorch."""
    if inputs.dtype == torch.float64 and backend == "triton":
        raise UserError('backend="triton" computes in float32, the inputs are float64; take backend="torch"')
    return resolve_backend("torch" if inputs.dtype == torch.float64 else backend, inputs.device)


def _wants_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _autocast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _head_tensors(head: HeadArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A teacher's four tensors, empty ones for what it lacks."""
    hidden, weight = _autocast(flat(head.hidden.detach())), _autocast(head.weight.detach())
    bias = weight.new_empty(0) if head.bias is None else _autocast(head.bias.detach())
    check_head("teacher", hidden, weight, bias if bias.numel() else None)
    rows = torch.empty(0, dtype=torch.int64, device=hidden.device) if head.rows is None else head.rows
    return hidden, weight, bias, rows


def _check_numbers(alpha: float | Tensor, tau: float, label_smoothing: float) -> None:
    if isinstance(alpha, Tensor):
        if alpha.dim() != 0:
            raise UserError(f"alpha has shape {tuple(alpha.shape)}; give a float or a 0-d tensor")
    elif not 0.0 <= alpha <= 1.0:
        raise UserError(f"alpha={alpha} is outside [0, 1]; it is the teacher's share of the loss")
    if not tau > 0.0:
        raise UserError(f"tau={tau} is not positive; the paper's temperature is 2.0")
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"label_smoothing={label_smoothing} is outside [0, 1)")


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise UserError(f"{name} have dtype {tensor.dtype}; give float32, bfloat16 or float16")


def check_rows(name: str, shape: torch.Size, inputs: Tensor) -> None:
    """`shape` must be the leading shape of the student's rows."""
    if shape != inputs.shape[:-1]:
        raise UserError(
            f"{name} has rows {tuple(shape)}, the student {tuple(inputs.shape[:-1])}; give one per student row"
        )


def check_device(name: str, tensor: Tensor, inputs: Tensor) -> None:
    if tensor.device != inputs.device:
        raise UserError(f"{name} is on {tensor.device}, the student's rows on {inputs.device}; move it there")


def check_head(who: str, hidden_ND: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """A head's weight must be [V, width of the hidden states], its bias [V], all of one dtype and device."""
    if weight.dim() != 2 or weight.shape[1] != hidden_ND.shape[1]:
        raise UserError(f"{who}_weight {tuple(weight.shape)} does not fit {who}_hidden [..., {hidden_ND.shape[1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"{who}_bias {tuple(bias.shape)} does not fit {who}_weight {tuple(weight.shape)}; give [V]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden_ND.dtype:
            raise UserError(f"{who}_{name} is {tensor.dtype}, {who}_hidden {hidden_ND.dtype}; cast one of them")
        if tensor is not None:
            check_device(f"{who}_{name}", tensor, hidden_ND)


def check_form(name: str, form: LogitForm) -> None:
    """The scale must be a number other than 0, a cap a positive one; both finite."""
    scale, cap = form
    if not 0.0 < abs(scale) < math.inf:
        raise UserError(f"{name} has scale={scale}; give a finite number other than 0")
    if cap is not None and not 0.0 < cap < math.inf:
        raise UserError(f"{name} has cap={cap}; give a positive finite number, or None for logits without a cap")


def check_num_classes(num_classes: int | None, widths: dict[str, int]) -> int:
    """The real vocabulary size: as given, or the one width that everything has."""
    listed = ", ".join(f"{name} {width}" for name, width in widths.items())
    if num_classes is None:
        if len(set(widths.values())) > 1:
            raise UserError(f"vocabularies differ in width ({listed}); give num_classes, the real vocabulary size")
        return next(iter(widths.values()))
    if not 1 <= num_classes <= min(widths.values()):
        raise UserError(f"num_classes={num_classes} must lie between 1 and every width ({listed})")
    return num_classes
