"""The inheritance loss: what a student learns from its labels and from a teacher.

Paper, eq. 2. With student logits z_s, teacher logits z_t, a label y and a temperature tau, for each row r

    CE_r = logsumexp(z_s) - z_s[y]
    KL_r = sum_v q_v (log q_v - log p_v),    q = softmax(z_t / tau),    p = softmax(z_s / tau)
    loss_sum = sum_r w_r [(1 - alpha) CE_r + alpha tau^2 KL_r]

and the gradient of it with respect to z_s is w_r [(1 - alpha) (softmax(z_s) - onehot(y)) + alpha tau (p - q)].
Rows whose label is `ignore_index` count nowhere. Sums are returned, never means: divide once, by the rows of
the global batch. All of it is computed in float32 whatever the inputs' dtype (float64 stays float64), and
gradients come back in the inputs' dtype, for the student alone.

`Objective` says what its other numbers put into the bracket.

`loss` is the one door: `ki_ds.loss` has faces with keywords, the trainer calls it itself. Both gradients and loss are
computed in the forward, and kept until backward, which only multiplies them by the incoming gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ki_ds.objective.autograd import Loss, traced
from ki_ds.objective.checks import checked
from ki_ds.objective.rows import Objective
from ki_ds.objective.types import LossOutput, Signal, Student


def loss(
    student: Student,
    labels: Tensor,
    teacher: Signal | None,
    objective: Objective,
    *,
    row_weights: Tensor | None = None,
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> LossOutput:
    """The loss of a student's rows against their labels and, where alpha is not 0, what a teacher says of them.

    A `Head` never has the logits of more than one chunk of rows. Call it inside the forward of the module that owns
    the weight: backward does not read it again, so ZeRO may free it. Under autocast heads are cast to its dtype, as a
    linear layer would.

    Args:
        student: its tensors may have any leading shape; float32, bfloat16 or float16; left as they are.
        labels: [...] class numbers.
        teacher: never differentiated; its vocabulary and hidden size need not be the student's. None: the labels count
            alone; a float alpha other than 0.0 is then an error.
        row_weights: [...] float weights w_r of the rows in `loss_sum`.
        backend: "auto", "triton" or "torch"; `resolve_backend` says what "auto" means.
        chunk_rows: rows of a head whose logits exist at once; None: by the sizes.

    Raises:
        UserError: shapes, dtypes or values that do not fit together.
    """
    problem = checked(
        student, labels, teacher, objective, row_weights=row_weights, backend=backend, chunk_rows=chunk_rows
    )
    sums = traced(problem) if torch.compiler.is_compiling() else Loss.apply(problem, *problem.student.tensors)
    loss_sum, ce_sum, kl_sum, num_rows, teachers_T4 = sums[:5]
    return LossOutput(loss_sum, ce_sum, kl_sum, num_rows, *teachers_T4.unbind(1))
