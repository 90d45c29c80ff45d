"""What a step costs in communication: bytes that a student's rank hands to collectives, and their time on links.

The collectives are those that DeepSpeed runs with this project's settings, counted on two ranks by the test of this
module. Of P parameters, whose gradients and weights travel in the training precision (gradients in that of the JSON's
`communication_data_type`, where it has one):

| ZeRO | gradients | weights |
|---|---|---|
| 0 | all-reduce, once a step | |
| 1 | all-reduce, once a step | all-gather, once a step |
| 2 | all-reduce, every micro-step | all-gather, once a step |
| 3 | reduce-scatter, every micro-step | all-gather, every micro-step; twice beyond `stage3_max_reuse_distance` |

DeepSpeed all-reduces in stages 1 and 2 although each rank keeps but a part; with `use_multi_rank_bucket_allreduce:
false` it reduces each part to its rank, half the bytes. Scalars (the loss, norms, counts of rows) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ki_ds.engine.student import zero_stage

GPUS_A_NODE = 8
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s of a GPU in one direction: NVLink 4 in a node, 400 Gb/s between nodes
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Traffic:
    """Bytes of the whole tensors of one step, by what is done to them."""

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0  # or a reduction of every part to the rank that keeps it
    all_gather: float = 0.0

    @property
    def passes(self) -> float:
        """Bytes in units of one pass around a ring; an all-reduce is two."""
        return 2 * self.all_reduce + self.reduce_scatter + self.all_gather

    def sent(self, num_ranks: int) -> float:
        """Bytes that a rank sends, and as many that it receives: (n - 1) / n of every pass."""
        return self.passes * (num_ranks - 1) / num_ranks

    def sent_over(self, num_ranks: int, *, per_node: int = GPUS_A_NODE) -> tuple[float, float]:
        """(bytes a rank sends within its node, and to other nodes) where each node first does its own part.

        A pass over B bytes moves B (g - 1) / g inside a node of g ranks, then B / g around the rings that join the
        ranks of equal place in m nodes: B (m - 1) / (g m). Together `sent`.

        Raises:
            AssertionError: more than one node, and the last one is not full.
        """
        local = min(num_ranks, per_node)
        nodes, rest = divmod(num_ranks, local)
        assert not rest, f"{num_ranks} ranks do not fill nodes of {local}"
        return self.passes * (local - 1) / local, self.passes * (nodes - 1) / (local * nodes)

    def seconds(self, num_ranks: int, *, nvlink: float = NVLINK, infiniband: float = INFINIBAND) -> float:
        """Time of a step's collectives at the links' full speed, one kind of link after the other."""
        inside, between = self.sent_over(num_ranks)
        return inside / nvlink + between / infiniband


def traffic(
    settings: dict[str, Any], num_parameters: int, *, element_bytes: int, micro_steps: int = 1, persistent: int = 0
) -> Traffic:
    """The traffic of one step of training under a DeepSpeed JSON.

    Args:
        settings: DeepSpeed's configuration; `zero_optimization` counts.
        num_parameters: of the student.
        element_bytes: of a weight and a gradient: 4 in fp32, 2 in bf16 and fp16.
        micro_steps: of one step (gradient accumulation).
        persistent: parameters in tensors of at most `stage3_param_persistence_threshold` elements: ZeRO-3 keeps them
            whole and gathers them once a step. Leaving them at 0 counts a little too much.
    """
    zero, stage = settings.get("zero_optimization", {}), zero_stage(settings)
    whole = float(num_parameters * element_bytes)
    gradients = num_parameters * _BYTES.get(settings.get("communication_data_type") or "", element_bytes)
    gradients *= micro_steps if stage >= 2 else 1
    match stage:
        case 0:
            return Traffic(all_reduce=gradients)
        case 1 | 2:
            if zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True):
                return Traffic(reduce_scatter=gradients, all_gather=whole)
            return Traffic(all_reduce=gradients, all_gather=whole)
    kept = min(num_parameters, float(zero.get("stage3_max_reuse_distance", 1e9)) / 2)  # forth and back: twice the way
    gathers = micro_steps * (2 * num_parameters - kept - persistent) + persistent
    return Traffic(reduce_scatter=gradients, all_gather=gathers * element_bytes)


def step_seconds(compute: float, communication: float) -> tuple[float, float]:
    """(all of the communication hidden behind compute, none of it): the bounds of a step's time."""
    return max(compute, communication), compute + communication


def ranks_pay(*, teacher_share: float, head_share: float, split: float, slowdown: float) -> tuple[float, float]:
    """Device-seconds of a taught step over those of the student alone: (teacher online, teacher on ranks of its own).

    The planner's costs, with two things that FLOPs alone do not say. Ranks pay where the second is the smaller one.

    Args:
        teacher_share: the teacher's forward over the student's step, 2 P_T / 6 P_S.
        head_share: the part of it that is its output projection, which stays with the student in either place.
        split: share of the ranks that teach, in (0, 1).
        slowdown: what making room for the teacher costs the student's own step, 1 for nothing; 4/3 where activations
            are computed again because of it.
    """
    online = slowdown + teacher_share
    return online, max((1 + head_share) / (1 - split), (teacher_share - head_share) / split)
