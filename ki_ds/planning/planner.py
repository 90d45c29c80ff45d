"""What a run will need, from its configuration alone: memory, FLOPs, hours, disk, and where its teacher should run.

Memory is that of one rank at its worst moment. What lies there all the time follows from the ZeRO stage; the moments
of a step (its forward with the loss, the two ends of its backward, the reduction of gradients, the update, a
validation, a checkpoint) add what they hold, as the code of DeepSpeed and of `ki_ds.objective.chunks` does it.
FLOPs are those that the metrics of the run will report: 6 (student) and 2 (teacher) a dense parameter and token.
All sizes are in bytes, work in FLOPs, times in seconds.

Letters: P parameters, n student ranks, s bytes of a weight, V output classes, D hidden size, N labelled rows, R of a
chunk of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ki_ds.config import ModelConfig, RunConfig
from ki_ds.config.schedules import taught_steps
from ki_ds.engine.student import accumulation_steps, complete_ds_config, read_ds_config, zero_stage
from ki_ds.errors import UserError
from ki_ds.models.presets import DTYPES
from ki_ds.objective.backend import resolve_backend
from ki_ds.objective.chunks import default_chunk_rows
from ki_ds.objective.reference import BLOCK_ELEMENTS_CPU, BLOCK_ELEMENTS_GPU
from ki_ds.planning.communication import traffic
from ki_ds.planning.sizes import Activations, Size, activations, size_of
from ki_ds.teachers.cache_files import bytes_per_row

# Resident memory of a rank on a CPU without any model, measured (docs/planning.md): what is imported before its
# configuration is read, and what DeepSpeed, transformers and gloo bring while it starts, more of it with ZeRO.
CPU_IMPORTS = 471 << 20
CPU_STARTED = 50 << 20
CPU_STARTED_ZERO = 97 << 20
CACHE_RECORD_BYTES = 20  # of a masked sample, beside its rows
COMPONENTS = (
    *("weights", "gradients", "optimizer states", "activations", "loss", "teacher weights", "teacher activations"),
    *("communication", "checkpoint", "framework"),
)
_CLEARLY = 0.99  # of online's cost: what another placement must stay below to be worth the change


@dataclass(frozen=True)
class TeacherPlan:
    """What one teacher costs over the run."""

    parameters: int
    flops_per_step: float  # of a taught step
    flops: float


@dataclass(frozen=True)
class Placement:
    """What teaching from one place costs: device-seconds as multiples of the student's own, and the disk."""

    name: str
    relative_cost: float
    disk: int


@dataclass(frozen=True)
class Plan:
    """A run in numbers: bytes, FLOPs, seconds. Of a run that teaches by `auto`, teacher figures are upper bounds.

    Args:
        num_ranks: of the job; `num_teacher_ranks` of them run the teacher.
        parameters: of the student; `dense_parameters` count for FLOPs.
        memory: by component, of a student's rank at its worst moment; `memory_moment` names it.
        moments: the whole of a rank's memory at each moment.
        host_memory: by component, of what ZeRO offloads to the host and of a copy that is being saved, per rank; on a
            CPU it is part of `memory`.
        teacher_memory: by component, of a teacher's rank; empty without such ranks.
        num_steps, num_tokens: of the whole run; tokens as metrics count them.
        num_taught_steps: steps in which alpha can be above 0; `taught_is_bound` where the run may end them sooner.
        student_flops_per_step, student_flops: training.
        teachers: one entry each.
        teacher_flops: of all teachers over the run.
        seconds: of training alone, without validation and saving; None where no peak is known.
        bytes_sent: of a student's rank in one step, by collectives in rings (`ki_ds.planning.communication`).
        checkpoint_disk: of one checkpoint; `disk` is the most that the run's folder holds.
        topk_cache_disk, hidden_cache_disk: of a cache of all that the run asks (K = 10; hidden states in fp16).
        placements: costs of each; `best_placement` with the reason in one line.
        notes: what the figures take for granted.
    """

    num_ranks: int
    num_teacher_ranks: int
    parameters: int
    dense_parameters: int
    memory: dict[str, int]
    memory_moment: str
    moments: dict[str, int]
    host_memory: dict[str, int]
    teacher_memory: dict[str, int]
    num_steps: int
    num_tokens: int
    num_taught_steps: int
    taught_is_bound: bool
    student_flops_per_step: float
    student_flops: float
    teachers: tuple[TeacherPlan, ...]
    teacher_flops: float
    seconds: float | None
    bytes_sent: float
    checkpoint_disk: int
    disk: int
    topk_cache_disk: int
    hidden_cache_disk: int
    placements: tuple[Placement, ...]
    best_placement: str
    reason: str
    notes: tuple[str, ...]

    @property
    def total_memory(self) -> int:
        """Bytes of a student's rank at its worst moment."""
        return sum(self.memory.values())

    @property
    def flops(self) -> float:
        """Of student and teachers over the whole run."""
        return self.student_flops + self.teacher_flops


def plan(
    config: RunConfig,
    *,
    num_ranks: int,
    num_classes: int,
    teachers: Sequence[Size] = (),
    on_gpu: bool = False,
    mfu: float = 0.4,
    peak_flops: float | None = None,
    model: ModelConfig | None = None,
    tokens_per_sample: float | None = None,
    num_runs: int = 1,
) -> Plan:
    """The plan of a run. Nothing is read but the DeepSpeed JSON (and a folder that `model.name` gives).

    Args:
        num_ranks: of the whole job, teacher ranks included.
        num_classes: ids of the tokenizer.
        teachers: sizes of the run's teachers, in their order; they need not exist yet.
        on_gpu: plan for GPUs, whatever is here.
        mfu: share of the peak that training reaches, in (0, 1].
        peak_flops: peak FLOP/s of one device; None leaves the time open.
        model: what the student is planned as, where `model.name` is a run that does not exist yet.
        tokens_per_sample: mean tokens of a block; None takes full ones (data.seq_len).
        num_runs: runs that would share a teacher cache.

    Raises:
        UserError: what the run itself would refuse of sizes, ranks and DeepSpeed settings; or a number that makes no
            sense.
    """
    _check(config, num_ranks, teachers, mfu, peak_flops, num_runs)
    num_teacher_ranks = config.teacher.num_ranks if config.teacher.placement == "ranks" else 0
    students = num_ranks - num_teacher_ranks
    settings = complete_ds_config(read_ds_config(config.engine.ds_config), config, world=students)
    student = size_of(model or config.model, config.task, num_classes)
    memory = _Memory(config, settings, student, teachers, model or config.model, students, num_classes, on_gpu)
    moments = memory.moments()
    worst = max(moments, key=lambda name: sum(moments[name].values()))
    per_sample = config.data.seq_len if tokens_per_sample is None else tokens_per_sample
    tokens = round(config.train.global_batch_size * per_sample)  # of a step
    taught, shares = len(taught_steps(config)), _shares(config, len(teachers))
    teacher_plans = tuple(_teacher_plan(t, tokens * share, taught) for t, share in zip(teachers, shares, strict=True))
    steps, student_step = config.train.num_steps, 6.0 * student.dense_parameters * tokens
    work = _Work(student_step * steps, sum(t.flops for t in teacher_plans), num_ranks, num_teacher_ranks)
    caches = _cache_disk(config, teachers, num_classes, taught)
    placements = work.placements(caches, num_runs) if teachers else ()
    best, reason = _best(placements, num_runs)
    checkpoint, disk = _disk(config, student, zero_stage(settings))
    micro_steps, element = accumulation_steps(config, students), DTYPES[config.engine.precision].itemsize
    sent = traffic(settings, student.num_parameters, element_bytes=element, micro_steps=micro_steps)
    return Plan(
        num_ranks=num_ranks,
        num_teacher_ranks=num_teacher_ranks,
        parameters=student.num_parameters,
        dense_parameters=student.dense_parameters,
        memory={name: size for name, size in moments[worst].items() if size},
        memory_moment=worst,
        moments={name: sum(parts.values()) for name, parts in moments.items()},
        host_memory=memory.on_host() if on_gpu else {},
        teacher_memory=memory.of_teacher_rank() if num_teacher_ranks else {},
        num_steps=steps,
        num_tokens=tokens * steps,
        num_taught_steps=taught,
        taught_is_bound=config.inherit.schedule == "auto",
        student_flops_per_step=student_step,
        student_flops=work.student,
        teachers=teacher_plans,
        teacher_flops=work.teacher,
        seconds=None if peak_flops is None else work.device_flops(config.teacher.placement) / (mfu * peak_flops),
        bytes_sent=sent.sent(students),
        checkpoint_disk=checkpoint,
        disk=disk,
        topk_cache_disk=caches[0],
        hidden_cache_disk=caches[1],
        placements=placements,
        best_placement=best,
        reason=reason,
        notes=tuple(_notes(config, len(teachers), tokens_per_sample, on_gpu)),
    )


def _teacher_plan(teacher: Size, tokens_per_step: float, taught_steps: int) -> TeacherPlan:
    per_step = 2.0 * teacher.dense_parameters * tokens_per_step
    return TeacherPlan(teacher.num_parameters, per_step, per_step * taught_steps)


def _check(
    config: RunConfig, num_ranks: int, teachers: Sequence[Size], mfu: float, peak: float | None, num_runs: int
) -> None:
    taken = config.teacher.num_ranks if config.teacher.placement == "ranks" else 0
    if num_ranks <= taken:
        raise UserError(f"{num_ranks} ranks, of which teacher.num_ranks={taken} teach, leave no student; give more")
    if len(teachers) != len(config.all_teachers):
        raise UserError(
            f"{len(teachers)} sizes of teachers were given for the run's {len(config.all_teachers)}; give one for each"
        )
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g} is outside (0, 1]; give the share of the peak that is reached, e.g. 0.4")
    if peak is not None and not 0 < peak < math.inf:
        raise UserError(f"--peak_tflops {peak / 1e12:g} is not positive; give a device's peak, e.g. 989 for an H100")
    if num_runs < 1:
        raise UserError(f"--num_runs {num_runs} is not positive; give the runs that would share a cache")


def _shares(config: RunConfig, num_teachers: int) -> list[float]:
    """The share of the tokens that each teacher sees: all, or those of its domains by their weights."""
    weights: dict[str, float] = {}
    for source in config.data.all_sources:
        weights[source.name] = weights.get(source.name, 0.0) + (1.0 if source.weight is None else source.weight)
    total = sum(weights.values())
    return [
        1.0 if entry.domains is None else sum(weights[domain] for domain in entry.domains) / total
        for entry in config.all_teachers[:num_teachers]
    ]


def _notes(config: RunConfig, num_teachers: int, tokens_per_sample: float | None, on_gpu: bool) -> list[str]:
    notes = []
    if tokens_per_sample is None:
        notes.append(f"every block is taken to be full ({config.data.seq_len} tokens): shorter ones cost less")
    if config.inherit.schedule == "auto":
        notes.append("schedule auto: the taught steps are not known beforehand; teacher figures are upper bounds")
    unweighted = any(source.weight is None for source in config.data.all_sources)
    if num_teachers > 1 and config.all_teachers[0].domains is not None and unweighted:
        notes.append("sources without weights: their domains are taken to be equally large")
    if on_gpu:
        notes.append("memory is what torch allocates; CUDA's context and the allocator's gaps come on top")
    else:
        notes.append("memory is the resident set; what the C library keeps of freed memory comes on top")
    return notes


# --- memory -----------------------------------------------------------------------------------------------------


class _Memory:
    """The memory of a rank: what always lies there, and what each moment of a step adds."""

    def __init__(
        self,
        config: RunConfig,
        settings: dict[str, Any],
        student: Size,
        teachers: Sequence[Size],
        model: ModelConfig,
        ranks: int,
        num_classes: int,
        on_gpu: bool,
    ) -> None:
        self.config, self.student, self.teachers, self.ranks, self.on_gpu = config, student, teachers, ranks, on_gpu
        self.num_classes = num_classes
        self.cached_hidden = all(teacher.hidden_size for teacher in teachers)
        zero = settings.get("zero_optimization", {})
        self.stage = zero_stage(settings)
        self.offloads = {
            name: zero.get(f"offload_{name}", {}).get("device", "none") != "none" for name in ("optimizer", "param")
        }
        self.bucket = int(zero.get("reduce_bucket_size", 5e8))
        self.num_buckets = 2 if self.stage in (1, 2) and zero.get("overlap_comm", False) else 1
        self.live_parameters = int(float(zero.get("stage3_max_live_parameters", 1e9)))
        self.dtype = DTYPES[config.engine.precision]
        self.s, self.p = self.dtype.itemsize, student.num_parameters
        self.accumulates = accumulation_steps(config, ranks) > 1
        teacher = config.teacher.dtype
        self.t = DTYPES[("fp16" if on_gpu else "fp32") if teacher == "auto" else teacher].itemsize
        length, batch = config.data.seq_len, config.train.micro_batch_size
        padded = config.data.break_mode not in ("none", "none_doc") and config.task == "mlm"
        self.body: Activations = activations(
            model,
            config.task,
            num_classes,
            batch=batch,
            length=length,
            dtype=self.dtype,
            on_gpu=on_gpu,
            padded=padded,
        )
        share = config.data.mask_probability if config.task == "mlm" else 1.0
        self.rows = max(1, round(batch * length * share))

    # -- what lies there from the first step to the last

    def on_host(self) -> dict[str, int]:
        """What ZeRO keeps in the host's memory instead of the device's, and what a save in the background has there."""
        own = self.p // self.ranks
        copied = self.s * self.p + (8 * self.p if self.stage == 0 else 12 * own)  # on rank 0, the others lack weights
        held = {"checkpoint": copied} if self.config.train.save_in_background else {}
        if not self.offloads["optimizer"]:
            return held
        held |= {"optimizer states": 12 * own, "gradients": 4 * own, "communication": self.s * own}
        if self.stage == 3:
            held["gradients"] += self.s * own
            held["weights"] = self.s * own if self.offloads["param"] else 0
        return held

    def always(self) -> dict[str, int]:
        """Weights, optimizer states, and the gradients that ZeRO-3 keeps, of a device without offloading."""
        own, stage = self.p // self.ranks, self.stage
        held = {"weights": self.s * self.p, "optimizer states": 8 * self.p if stage == 0 else 12 * own}
        if stage == 3:
            held["weights"] = 0 if self.offloads["param"] else self.s * own
            if self.s == 4 and not self.offloads["optimizer"]:
                held["optimizer states"] = 8 * own  # its weights are its master weights
            held["gradients"] = self.s * own
            held["communication"] = self._buckets()
        if self.offloads["optimizer"]:
            held["optimizer states"] = 0
            held.pop("gradients", None)
            held["communication"] = held.get("communication", 0) + self.s * self.student.largest_parameter
        if not self.on_gpu:
            for name, size in self.on_host().items():
                held[name] = held.get(name, 0) + size
            held["framework"] = CPU_IMPORTS + (CPU_STARTED_ZERO if stage else CPU_STARTED)
        return held

    def _buckets(self) -> int:
        """The buckets in which gradients travel: whole on a GPU, on a CPU the pages that are written."""
        elements = self.num_buckets * self.bucket
        return self.s * (elements if self.on_gpu else min(elements, self.p))

    # -- the moments

    def moments(self) -> dict[str, dict[str, int]]:
        """Components by moment."""
        whole = self.s * self.p
        embedding = self.student.vocab_size * self.student.hidden_size
        accumulated = self._accumulated()
        # ZeRO-3 has gathered all weights, up to its limit, for none is far from its next use
        gathered = self.s * min(self.p, self.live_parameters) if self.stage == 3 else 0
        acts = self.body.kept(checkpointing=self.config.engine.activation_checkpointing) + self._head_activations()
        again = self.body.recomputed(checkpointing=self.config.engine.activation_checkpointing)
        kept, transient = self._loss()
        teacher = self._teacher()
        buckets = self._buckets() if self.stage in (1, 2) and self.on_gpu else 0
        # the head's gradient waits for that of the input embedding, to which it is tied
        late = 2 * self.s * embedding if self.student.tied else self.s * embedding
        full = {0: whole, 1: whole, 2: min(self._buckets(), whole) + accumulated, 3: 0}[self.stage]
        # what is reduced is flattened into a tensor of its own; from ZeRO-2 on the last of it while backward ends
        flat = self.s * min(self.bucket, self.p) if self.stage or self.ranks > 1 else 0
        in_backward = flat if self.stage >= 2 else 0
        return {
            "forward and loss": self._sum(
                teacher, gradients=accumulated, activations=acts, loss=kept + transient, weights=gathered
            ),
            "backward, first layer": self._sum(
                teacher,
                gradients=accumulated,
                activations=acts + again,
                loss=kept + (0 if self.s == 4 else self.s * embedding),
                weights=gathered,
                communication=buckets,
            ),
            "backward, last layer": self._sum(
                teacher,
                gradients=max(full, accumulated) + late,
                weights=gathered,
                communication=buckets + in_backward,
            ),
            "reduction of gradients": self._sum(
                teacher, gradients=full, communication=flat + buckets, weights=gathered
            ),
            "update": self._sum(teacher, gradients=self._update_gradients()),
            "validation": self._sum(
                teacher, activations=self._evaluated(), loss=self._logits(eval_=True), weights=gathered
            ),
            **({} if self.on_gpu else {"checkpoint": self._sum(teacher, checkpoint=whole + (1 << 24))}),
        }

    def _sum(self, *groups: Mapping[str, int], **more: int) -> dict[str, int]:
        """Components of a moment: what always lies there, and what the moment adds."""
        total = Counter(self.always())
        for group in (*groups, more):
            total.update(group)
        return {name: total[name] for name in COMPONENTS if name in total}

    def _accumulated(self) -> int:
        """Gradients of the micro-batches before, which lie there while the next one is computed."""
        if not self.accumulates or self.stage == 3:
            return 0
        if self.stage == 2:
            return 0 if self.offloads["optimizer"] else self._partition()
        return self.s * self.p

    def _partition(self) -> int:
        """ZeRO's gradients of its own partition, in which a weight that lies across a border is whole."""
        across = 0 if self.ranks == 1 else self.student.largest_parameter
        return self.s * min(self.p // self.ranks + across, self.p)

    def _update_gradients(self) -> int:
        own = self.p // self.ranks
        if self.stage == 0:
            return self.s * self.p
        if self.offloads["optimizer"]:
            return 0
        flat = 4 * own + (self.s * own if self.s != 4 else 0)
        return flat + (self._partition() if self.stage < 3 else 0)

    def _head_activations(self) -> int:
        """What RoBERTa's head keeps of the labelled rows: two dense layers' worth and the normalised rows."""
        return 5 * self.rows * self.student.hidden_size * self.s if self.config.task == "mlm" else 0

    def _chunk_rows(self, rows: int) -> int:
        logits: Any = SimpleNamespace(is_cuda=self.on_gpu, element_size=lambda: self.s)
        chosen = self.config.loss.chunk_rows or default_chunk_rows(rows, self.student.vocab_size, logits)
        return min(chosen, rows)

    def _logits(self, *, eval_: bool = False) -> int:
        """One chunk of the student's logits, and the blocks of it that plain PyTorch works on."""
        rows = self.rows
        if eval_ and self.config.train.eval_micro_batch_size:
            rows = max(1, rows * self.config.train.eval_micro_batch_size // self.config.train.micro_batch_size)
        backend: str = "triton" if self.on_gpu and self.config.loss.backend == "auto" else self.config.loss.backend
        if backend != "triton":
            backend = resolve_backend(backend, "cpu")
        elements = BLOCK_ELEMENTS_GPU if self.on_gpu else BLOCK_ELEMENTS_CPU * (self.config.engine.num_threads or 1)
        chunk = self._chunk_rows(rows)
        copies = 6 if self.teachers and not eval_ else 2  # logits, softmax and gradient, the teacher's too
        block = 0 if backend == "triton" else copies * 4 * min(elements, chunk * self.num_classes)
        return self.s * chunk * self.student.vocab_size + block

    def _loss(self) -> tuple[int, int]:
        """(gradients that the loss has made and keeps until backward, what it needs besides while it is computed)."""
        student = self.student
        elements = student.vocab_size * student.hidden_size
        kept = 4 * elements + self.s * self.rows * student.hidden_size
        transient = self._logits()
        if self.s != 4 and not self.on_gpu:
            transient += self.s * elements  # a chunk's part of the weight's gradient, before it is added in float32
        placement, chunk = self.config.teacher.placement, self._chunk_rows(self.rows)
        for teacher in self.teachers if placement != "cache" or self.cached_hidden else ():
            transient += self.t * (chunk * teacher.vocab_size + self.rows * teacher.hidden_size)
        if len(self.teachers) > 1 and self.config.all_teachers[0].domains is None:
            transient += 4 * 2 * chunk * self.num_classes  # the average of their softmaxes
        return kept, transient

    def _evaluated(self) -> int:
        size = self.config.train.eval_micro_batch_size or self.config.train.micro_batch_size
        return self.s * size * self.config.data.seq_len * _live_width(self.student)

    def _teacher(self) -> dict[str, int]:
        """What the teachers have in a student's rank: weights (or their heads), and a forward that runs ahead."""
        placement = self.config.teacher.placement
        heads = sum(t.vocab_size * t.hidden_size for t in self.teachers)
        if placement == "cache":
            return {"teacher weights": self.t * heads if self.cached_hidden else 0}
        if placement == "ranks":
            ahead = (self.config.teacher.ahead + 2) * self.rows * sum(t.hidden_size for t in self.teachers)
            return {"teacher weights": self.t * heads, "teacher activations": 0 if self.on_gpu else self.t * ahead}
        weights = self.t * sum(t.num_parameters for t in self.teachers)
        ahead = self._teacher_forward() if placement == "overlap" else 0
        return {"teacher weights": weights, "teacher activations": ahead}

    def _teacher_forward(self) -> int:
        tokens = self.config.train.micro_batch_size * self.config.data.seq_len
        return max((self.t * tokens * _live_width(teacher) for teacher in self.teachers), default=0)

    def of_teacher_rank(self) -> dict[str, int]:
        """Components of a rank that teaches."""
        held = {
            "teacher weights": self.t * sum(t.num_parameters for t in self.teachers),
            "teacher activations": self._teacher_forward(),
        }
        return held if self.on_gpu else held | {"framework": CPU_IMPORTS + CPU_STARTED}


def _live_width(model: Size) -> int:
    """Elements a token of a forward without gradients: a layer's input, its feed-forward twice."""
    return 3 * model.hidden_size + 2 * model.ffn_size


# --- work, disk, placements -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    student: float  # FLOPs of the run
    teacher: float
    num_ranks: int
    num_teacher_ranks: int

    def device_flops(self, placement: str) -> float:
        """FLOPs of the device that is busy longest; what the run's time follows from."""
        match placement:
            case "cache":
                return self.student / self.num_ranks
            case "ranks":
                return self._on_ranks(self.num_teacher_ranks)
        return (self.student + self.teacher) / self.num_ranks

    def _on_ranks(self, num_teacher_ranks: int) -> float:
        """Students and teachers side by side while alpha is above 0; then the teachers' ranks stand idle."""
        return max(self.student / (self.num_ranks - num_teacher_ranks), self.teacher / num_teacher_ranks)

    def placements(self, caches: tuple[int, int], num_runs: int) -> tuple[Placement, ...]:
        """Each placement's device-seconds over those of the student alone."""
        both = (self.student + self.teacher) / self.student
        splits = range(1, max(self.num_ranks, 2))
        ranks = min(_Work(self.student, self.teacher, max(self.num_ranks, 2), n)._on_ranks(n) for n in splits)
        return (
            Placement("online", both, 0),
            Placement("overlap", both, 0),
            Placement("ranks", ranks * max(self.num_ranks, 2) / self.student, 0),
            Placement("cache", 1 + self.teacher / self.student / num_runs, caches[0]),
        )


def _best(placements: Sequence[Placement], num_runs: int) -> tuple[str, str]:
    if not placements:
        return "none", "the run has no teacher"
    online, _, ranks, cache = placements
    share = online.relative_cost - 1
    if cache.relative_cost < online.relative_cost * _CLEARLY:
        return "cache", (
            f"{num_runs} runs share one forward, which costs each of them online {share:.1%} of its own work; a top-10 "
            f"cache takes {cache.disk / 1e9:,.1f} GB, and is no exact copy of the teacher"
        )
    return "online", (
        f"its forward adds {share:.1%} to the student's work; overlap is the same work, ranks of its own would cost "
        f"{ranks.relative_cost - 1:.1%}, and a cache pays that forward as well, and {cache.disk / 1e9:,.1f} GB, for "
        "one run"
    )


def _disk(config: RunConfig, student: Size, stage: int) -> tuple[int, int]:
    """(one checkpoint, the most that the run's folder holds): full states, exported and best weights."""
    s, p, train = DTYPES[config.engine.precision].itemsize, student.num_parameters, config.train
    weights = s * p
    checkpoint = 2 * weights + (8 if stage == 0 else 12) * p
    saves = math.ceil(train.num_steps / train.save_every)
    kept = min(saves, train.keep_checkpoints + 1)  # the newest is whole before the oldest goes
    if train.keep_every:
        kept = min(saves, kept + train.num_steps // train.keep_every)
    return checkpoint, kept * checkpoint + 2 * weights  # the best weights, and new ones beside them


def _cache_disk(config: RunConfig, teachers: Sequence[Size], num_classes: int, taught: int) -> tuple[int, int]:
    """(top-10, hidden states in fp16) of everything that the taught steps ask, no sample counted twice."""
    if not teachers:
        return 0, 0
    samples = taught * config.train.global_batch_size
    rows = samples * config.data.seq_len * (config.data.mask_probability if config.task == "mlm" else 1.0)
    topk = bytes_per_row({"kind": "topk", "topk": min(10, num_classes), "num_classes": num_classes})
    shares = _shares(config, len(teachers))
    hidden = sum(2 * t.hidden_size * share for t, share in zip(teachers, shares, strict=True))
    index = samples * CACHE_RECORD_BYTES
    return round(rows * topk * sum(shares)) + index, round(rows * hidden) + index
