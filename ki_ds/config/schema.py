"""One run, as frozen typed dataclasses: every field with its unit and source.

A recipe is a YAML file of these fields; scale is a second, small YAML laid over it. Beside each field stands when it
has a meaning, which numbers it may be, and whether it may differ when a run goes on (`ki_ds.config.fields`).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ki_ds.config import fields
from ki_ds.config.fields import ALWAYS, setting, walk
from ki_ds.config.paper import Task

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class SourceConfig:
    """One corpus of a mixture, or a part of it.

    `half`, then `fraction`, then `max_tokens` narrow it down in a fixed random order of its documents: a smaller part
    lies within a larger one, A and B share nothing (sections 4.2 and 4.3).

    Args:
        path: as data.corpus.
        domain: name under which its perplexity is reported; null takes the last part of the path.
        weight: share of the training tokens; give every source one, or none to take every token once an epoch.
        half: A or B, two disjoint halves of the documents (Fig. 3c); null takes both.
        fraction: share of the tokens (Fig. 3a: 1/16 to 1).
        max_tokens: at most so many tokens (Table 2: 3,400M to 20M).
    """

    path: str = setting(MISSING, ALWAYS, operational=True)
    domain: str | None = setting(None, ALWAYS)
    weight: float | None = setting(None, ALWAYS, above=0, below=2**62)
    half: Literal["A", "B"] | None = setting(None, ALWAYS)
    fraction: float = setting(1.0, ALWAYS, above=0, at_most=1)
    max_tokens: int | None = setting(None, ALWAYS, above=0, below=2**62)

    @property
    def name(self) -> str:
        """Its domain's name."""
        return self.domain or Path(self.path).name


@dataclass(frozen=True)
class DataConfig:
    """What the student reads.

    Args:
        corpus: folder made by tools/prepare_data.py; or a fairseq data-bin folder (dict.txt, train*, valid*); or the
            prefix, or a glob of prefixes, of Megatron token files.
        sources: several corpora instead of one, mixed by weight or by tokens (of two lists, the later one is laid over
            the earlier one, entry by entry).
        tokenizer: Hugging Face folder of the tokenizer of Megatron files; for a fairseq folder GPT-2's, with which the
            exported model gets a tokenizer; null where the corpus has its own or none is needed.
        valid: validation corpora by domain, e.g. {WB: data/wb}; null takes the sources' own. Domains that are not
            trained on are reported, but do not choose the best weights.
        valid_fraction: share of a source's tokens (whole documents) held out where it brings no validation part.
        subset_seed: of the random order in which halves, fractions and held-out parts are taken.
        seq_len: tokens in a block, `<s>` included for mlm (512 in the paper).
        break_mode: how lines become blocks. complete packs whole lines (auto for mlm), complete_doc also ends a block
            with its document, eos makes every line a block; none is a fixed cut (auto for causal), none_doc begins
            anew with each document.
        long_lines: lines longer than a block are split, or dropped as the released code does.
        packing: put short blocks of complete_doc, none_doc or eos into one row, where none sees another (causal).
        mask_probability: share of a block's tokens that the mlm student predicts.
        keep_probability: share of those tokens left as they are.
        random_probability: share of those tokens replaced by a random one; the rest becomes the mask token.
        whole_words: mask all tokens of a word or none.
        mask_variants: different masks of a sample, taken in turn over the epochs; 0 makes new ones every epoch.
        num_workers: loader processes per rank; the order never depends on it. 0 loads in the training process.
        index_dir: folder for hashes of token files and the places of blocks, which make later starts quick; null
            takes .ki_ds_index beside the files, or RUN_DIR/index where that is read-only.
        valid_mask_variants: times the mlm validation set is masked, each time with other fixed masks.
        max_valid_samples: validation blocks of a domain used at most; null takes all.
    """

    corpus: str = setting("", ALWAYS, operational=True)
    sources: list[SourceConfig] | None = setting(None, ALWAYS)
    tokenizer: str | None = setting(None, fields.RULED, operational=True)
    valid: dict[str, str] | None = setting(None, ALWAYS)
    valid_fraction: float = setting(0.0, fields.OWN_VALID, at_least=0, below=1)
    subset_seed: int = setting(0, fields.PARTS, at_least=0, at_most=2**63 - 1)
    seq_len: int = setting(512, ALWAYS, at_least=8, at_most=2**20)
    break_mode: Literal["auto", "complete", "complete_doc", "eos", "none", "none_doc"] = setting("auto", ALWAYS)
    long_lines: Literal["split", "drop"] = setting("split", fields.LINES_KEPT)
    packing: bool = setting(False, fields.SHORT_BLOCKS)
    mask_probability: float = setting(0.15, fields.MASKED, at_least=1e-6, below=1)
    keep_probability: float = setting(0.1, fields.MASKED, at_least=0, at_most=1)
    random_probability: float = setting(0.1, fields.MASKED, at_least=0, at_most=1)
    whole_words: bool = setting(False, fields.MASKED)
    mask_variants: int = setting(0, fields.MASKED, at_least=0, at_most=2**31)
    num_workers: int = setting(1, ALWAYS, at_least=0, at_most=1024, operational=True)
    index_dir: str | None = setting(None, ALWAYS, operational=True)
    valid_mask_variants: int = setting(1, fields.MASKED, at_least=1, at_most=10_000)
    max_valid_samples: int | None = setting(None, ALWAYS, at_least=1, at_most=2**62)

    @property
    def all_sources(self) -> list[SourceConfig]:
        """`sources`, or `corpus` as the only one."""
        return self.sources if self.sources is not None else [SourceConfig(self.corpus)]


@dataclass(frozen=True)
class ModelConfig:
    """The student.

    Args:
        name: a preset of Table 6 (roberta_medium, roberta_base, gpt_124m, ...), or a Hugging Face folder or hub name.
        init: random starts from scratch; pretrained starts from the weights of the folder that `name` gives.
        num_layers: overrides the preset's number of layers.
        hidden_size: overrides the preset's hidden size.
        num_heads: overrides the preset's number of attention heads.
        ffn_size: overrides the preset's feed-forward size.
        num_positions: position embeddings of a preset, in tokens (512, Table 6).
        vocab_multiple: the embedding is padded to a multiple of this; padding takes no probability and is not exported.
        dropout: dropout of a preset (0.1).
        attention_dropout: attention dropout of a preset (0.1).
        init_std: standard deviation of a preset's initial weights (0.02).
    """

    name: str = setting("roberta_base", ALWAYS)
    init: Literal["random", "pretrained"] = setting("random", ALWAYS)
    num_layers: int | None = setting(None, fields.PRESET, at_least=1, at_most=10_000)
    hidden_size: int | None = setting(None, fields.PRESET, at_least=1, at_most=2**20)
    num_heads: int | None = setting(None, fields.PRESET, at_least=1, at_most=2**20)
    ffn_size: int | None = setting(None, fields.PRESET, at_least=1, at_most=2**24)
    num_positions: int = setting(512, fields.PRESET, at_least=8, at_most=2**20)
    vocab_multiple: int = setting(64, fields.PRESET, at_least=1, at_most=2**16)
    dropout: float = setting(0.1, fields.PRESET, at_least=0, below=1)
    attention_dropout: float = setting(0.1, fields.PRESET, at_least=0, below=1)
    init_std: float = setting(0.02, fields.PRESET, at_least=1e-9, at_most=10)


@dataclass(frozen=True)
class TeacherConfig:
    """Who teaches, and where it runs.

    Args:
        path: a run or checkpoint folder of ours, a Hugging Face folder or hub name, or a cache's folder; null trains
            without a teacher.
        placement: online runs the teacher in the student's process; overlap too, in a thread (on a GPU a stream) of its
            own, a micro-batch ahead; cache reads what tools/cache_teacher.py has written; ranks gives it the last
            `num_ranks` of the launcher's ranks for itself, which run ahead.
        dtype: the teacher's weights; auto takes fp16 on a GPU (as the paper does) and fp32 on a CPU, or what a cache
            was written with.
        topk: of the teacher's distribution only its K largest entries count (Fig. 1c); null takes all. A cache has a K
            of its own.
        topk_semantics: K entries are renormalised (as in the paper), or what they leave over is one more class (tail).
        num_ranks: ranks of the job that run the teacher (placement ranks).
        ahead: micro-batches that a teacher rank may be ahead of a student.
        patience: seconds without a word from a teacher rank after which the job ends; 0 waits for ever, and says so.
    """

    path: str | None = setting(None, fields.USED, operational=True)
    placement: Literal["online", "overlap", "cache", "ranks"] = setting("online", fields.PLACED, operational=True)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", fields.TEACHER)
    topk: int | None = setting(
        None,
        fields.TEACHER,
        fields.NOT_CACHED,
        fields.NOT_SENT,
        fields.NOT_AUTO,
        fields.NOT_AVERAGED,
        at_least=1,
        at_most=2**31,
    )
    topk_semantics: Literal["renormalise", "tail"] = setting("renormalise", fields.TOPK)
    num_ranks: int = setting(1, fields.RANKS, at_least=1, at_most=2**20, operational=True)
    ahead: int = setting(2, fields.RANKS, at_least=1, at_most=1024, operational=True)
    patience: float = setting(300.0, fields.RANKS, at_least=0, at_most=1e9, operational=True)


@dataclass(frozen=True)
class TeacherEntry:
    """One of several teachers. Either every one has domains, or none has and they are averaged.

    Args:
        path: as teacher.path.
        domains: domains of data.sources whose rows it teaches; rows of a domain without a teacher learn alone.
        share: its weight in the average of the teachers' softmaxes, relative to the others'; null is 1.
    """

    path: str = setting(MISSING, fields.USED, operational=True)
    domains: list[str] | None = setting(None, fields.RULED)
    share: float | None = setting(None, fields.RULED)


@dataclass(frozen=True)
class InheritConfig:
    """How much is inherited, and how long (section 2.2, equation 2; Fig. 1b).

    Args:
        schedule: alpha over time: linear decay to 0, heaviside (1, then 0), constant, auto (follows the student's gap
            to the teacher, and ends once it is ahead; docs/auto_handover.md), or none (self-learning).
        steps: T_inherit, the steps of teacher-guided learning (Table 7).
        slope: the paper's alpha_T instead of `steps`: alpha_t = max(1 - slope * t / T, 0), so T_inherit = T / slope.
        start_step: updates before the first that is taught, from which the schedule counts: for a run that goes on to
            inherit from another teacher.
        constant_alpha: alpha of the constant schedule.
        tau: temperature of both softmaxes; the KL is scaled by tau squared (2 in the released code).
    """

    schedule: Literal["linear", "heaviside", "constant", "auto", "none"] = setting("none", ALWAYS)
    steps: int | None = setting(None, fields.ENDS, at_least=1, at_most=2**62)
    slope: float | None = setting(None, fields.ENDS, at_least=1e-9, at_most=1e9)
    start_step: int = setting(0, fields.INHERITS, at_least=0, at_most=2**62)
    constant_alpha: float = setting(0.5, fields.CONSTANT, at_least=0, at_most=1)
    tau: float = setting(2.0, fields.INHERITS, at_least=1e-3, at_most=1e3)


@dataclass(frozen=True)
class LossConfig:
    """How the objective is computed; only label_smoothing and z_weight change its value.

    Args:
        backend: auto takes the Triton kernels on a GPU and chunked PyTorch elsewhere.
        chunk_rows: rows whose logits exist at once; null chooses from the sizes.
        label_smoothing: share of the label's mass spread over the other classes (Table 10; 0 in all other runs).
        z_weight: of logsumexp(logits)^2 in each row while training, which keeps logits small (z-loss; 1e-4 in PaLM).
    """

    backend: Literal["auto", "triton", "torch"] = setting("auto", ALWAYS, operational=True)
    chunk_rows: int | None = setting(None, ALWAYS, at_least=1, at_most=2**31, operational=True)
    label_smoothing: float = setting(0.0, ALWAYS, at_least=0, below=1)
    z_weight: float = setting(0.0, ALWAYS, at_least=0, at_most=1e3)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with the paper's settings (appendix, Table 7).

    Args:
        lr: peak learning rate (Table 6: 5.0e-4 for the base size at a global batch of 2,048).
        beta1: decay of the first moment.
        beta2: decay of the second moment (0.98).
        eps: Adam's epsilon (1e-6).
        weight_decay: decoupled weight decay (0.01).
        decay_norms_and_biases: decay every parameter, as the released code does; false spares norms and biases.
        warmup_fraction: share of the steps with linear warm-up; then linear decay to 0.
        max_grad_norm: clips the global gradient norm; 0 clips nothing, as the released code does.
    """

    lr: float = setting(5.0e-4, ALWAYS, at_least=1e-12, at_most=100)
    beta1: float = setting(0.9, ALWAYS, at_least=0, below=1)
    beta2: float = setting(0.98, ALWAYS, at_least=0, below=1)
    eps: float = setting(1.0e-6, ALWAYS, at_least=1e-30, at_most=1)
    weight_decay: float = setting(0.01, ALWAYS, at_least=0, at_most=100)
    decay_norms_and_biases: bool = setting(True, fields.DECAY)
    warmup_fraction: float = setting(0.1, ALWAYS, at_least=0, below=1)
    max_grad_norm: float = setting(0.0, ALWAYS, at_least=0, at_most=1e9)


@dataclass(frozen=True)
class EngineConfig:
    """How DeepSpeed hosts the student.

    Args:
        ds_config: DeepSpeed JSON with ZeRO, offload and communication settings only (ds_configs/).
        precision: of the student's weights and activations; losses are always computed in float32.
        activation_checkpointing: recompute activations in the backward pass instead of storing them.
        compile: torch.compile the student's layers, each by itself. Needs a C++ compiler on a CPU, where it is no gain.
        watchdog_seconds: a rank that is silent, or makes all others wait, for so long is named and the job ends with
            the exit code 75; 0 waits for ever.
        connect_seconds: how long the ranks wait for one another at the start; then those that are missing are named.
        num_threads: CPU threads per rank; 0 takes your OMP_NUM_THREADS, or else shares the cores out among the ranks of
            a host.
    """

    ds_config: str = setting("ds_configs/zero1.json", ALWAYS, operational=True)
    precision: Precision = setting("fp32", ALWAYS)
    activation_checkpointing: bool = setting(False, ALWAYS, operational=True)
    compile: bool = setting(False, ALWAYS, operational=True)
    watchdog_seconds: float = setting(600.0, ALWAYS, at_least=0, at_most=1e9, operational=True)
    connect_seconds: float = setting(300.0, ALWAYS, at_least=0, below=1e9, operational=True)
    num_threads: int = setting(0, ALWAYS, at_least=0, at_most=4096, operational=True)


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and what is kept.

    Args:
        num_steps: T, optimizer steps of the whole run (125k RoBERTa, 62.5k GPT).
        global_batch_size: sequences per optimizer step over all ranks and accumulation steps (2,048 in the paper).
        micro_batch_size: sequences per forward pass of one rank; accumulation follows from both and the ranks.
        eval_micro_batch_size: sequences per forward pass in validation; null takes micro_batch_size.
        eval_every: steps between validations; the first (step 0) and the last step are always validated.
        save_every: steps between checkpoints; the last step is always saved.
        log_every: steps between lines of metrics.
        save_in_background: at a checkpoint training waits only until the state has been copied into the host's memory;
            it is written while training goes on. It takes that memory, and time of the CPU (docs/reliability.md).
        keep_checkpoints: newest full checkpoints kept; the best weights are kept beside them.
        keep_every: checkpoints at multiples of so many steps stay for good, besides the newest; null keeps no others.
        stop_at_step: leave after this step with a checkpoint, all schedules unchanged; null runs to the end.
        bad_step: an update whose loss or gradient is NaN, Inf or a spike is never made; then the run stops with a line
            (stop), or goes on with the next batch and counts it (skip; after 20 in a row it stops as well).
        spike_sigmas: a loss or gradient norm that lies so many standard deviations above the mean of the last 128 good
            updates is a spike; 0 looks for NaN and Inf only.
        changed_config: a run folder with another configuration is refused (refuse), or goes on with the new one
            (allow), e.g. an inheriting run that goes on as plain self-learning.
    """

    num_steps: int = setting(125_000, ALWAYS, at_least=1, at_most=2**62)
    global_batch_size: int = setting(2048, ALWAYS, at_least=1, at_most=2**40)
    micro_batch_size: int = setting(16, ALWAYS, at_least=1, at_most=2**30, operational=True)
    eval_micro_batch_size: int | None = setting(None, ALWAYS, at_least=1, at_most=2**30, operational=True)
    eval_every: int = setting(1000, ALWAYS, at_least=1, at_most=2**62, operational=True)
    save_every: int = setting(1000, ALWAYS, at_least=1, at_most=2**62, operational=True)
    log_every: int = setting(10, ALWAYS, at_least=1, at_most=2**62, operational=True)
    save_in_background: bool = setting(False, ALWAYS, operational=True)
    keep_checkpoints: int = setting(2, ALWAYS, at_least=1, at_most=2**31, operational=True)
    keep_every: int | None = setting(None, ALWAYS, at_least=1, at_most=2**62, operational=True)
    stop_at_step: int | None = setting(None, fields.BEFORE_END, at_least=1, at_most=2**62, operational=True)
    bad_step: Literal["stop", "skip"] = setting("stop", ALWAYS, operational=True)
    spike_sigmas: float = setting(0.0, ALWAYS, at_least=0, at_most=1e6)
    changed_config: Literal["refuse", "allow"] = setting("refuse", ALWAYS, operational=True)


@dataclass(frozen=True)
class MonitorConfig:
    """Where metrics go besides metrics.jsonl; DeepSpeed's monitor writes them under the same names.

    Args:
        tensorboard: write TensorBoard events to RUN_DIR/monitor.
        csv: write one CSV a metric to RUN_DIR/monitor.
        wandb_project: Weights & Biases project; null sends nothing. The key is read from the environment only.
        profile_steps: steps of this start, from the third on, that torch's profiler watches on rank 0; RUN_DIR/profile
            then holds the trace and the share of each part of a step. 0 profiles nothing.
        progress: the progress bar on rank 0; auto shows it on a terminal and prints plain lines elsewhere.
    """

    tensorboard: bool = setting(False, ALWAYS, operational=True)
    csv: bool = setting(False, ALWAYS, operational=True)
    wandb_project: str | None = setting(None, ALWAYS, operational=True)
    profile_steps: int = setting(0, ALWAYS, at_least=0, at_most=1000, operational=True)
    progress: Literal["auto", "bar", "lines", "none"] = setting("auto", ALWAYS, operational=True)


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Args:
        run_dir: folder of the run: configuration, metrics, checkpoints, best weights. Called again, it goes on there.
        task: mlm (RoBERTa) or causal (GPT).
        seed: of initial weights, data order, masks and dropout.
        teachers: several teachers instead of teacher.path: each for the rows of its domains, or all of them averaged;
            what else the group teacher says holds for every one.
    """

    run_dir: str = setting("", ALWAYS, operational=True)
    task: Task = setting("mlm", ALWAYS)
    seed: int = setting(1, ALWAYS, at_least=0, at_most=2**63 - 1)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: list[TeacherEntry] | None = setting(None, ALWAYS)
    inherit: InheritConfig = field(default_factory=InheritConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    @property
    def all_teachers(self) -> list[TeacherEntry]:
        """`teachers`, or `teacher.path` as the only one, or nobody."""
        alone = [] if self.teacher.path is None else [TeacherEntry(self.teacher.path)]
        return alone if self.teachers is None else self.teachers


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every field by its dotted name, e.g. {"optim.lr": 5e-4, "data.sources.0.weight": 1.0, ...}."""
    return {given.name: given.value for given in walk(config)}


def inherit_steps(config: RunConfig) -> int | None:
    """T_inherit in steps, from `inherit.steps` or from the paper's slope (T_inherit = T / alpha_T)."""
    if config.inherit.slope is not None:
        return round(config.train.num_steps / config.inherit.slope)
    return config.inherit.steps
