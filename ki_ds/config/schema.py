"""One run, as frozen typed dataclasses: every field with its unit and source, checked before anything starts.

`parse` reads `--config a.yaml --config b.yaml --optim.lr 3e-4` (later wins); `save`/`load` keep the resolved
configuration beside the run. A recipe is a YAML file of these fields; scale is a second, small YAML laid over it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import jsonargparse
import yaml

from ki_ds.config import conditions
from ki_ds.config.conditions import check_meaning, only, walk, without_meaning
from ki_ds.config.operational import is_operational
from ki_ds.config.ranges import check_ranges
from ki_ds.config.teacher_entries import TeacherEntry, check_entries
from ki_ds.errors import UserError

Task = Literal["mlm", "causal"]
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

    path: str
    domain: str | None = None
    weight: float | None = None
    half: Literal["A", "B"] | None = None
    fraction: float = 1.0
    max_tokens: int | None = None

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

    corpus: str = ""
    sources: list[SourceConfig] | None = None
    tokenizer: str | None = None
    valid: dict[str, str] | None = None
    valid_fraction: float = only(0.0, conditions.OWN_VALID)
    subset_seed: int = only(0, conditions.PARTS)
    seq_len: int = 512
    break_mode: Literal["auto", "complete", "complete_doc", "eos", "none", "none_doc"] = "auto"
    long_lines: Literal["split", "drop"] = only("split", conditions.LINES_KEPT)
    packing: bool = only(False, conditions.SHORT_BLOCKS)
    mask_probability: float = only(0.15, conditions.MASKED)
    keep_probability: float = only(0.1, conditions.MASKED)
    random_probability: float = only(0.1, conditions.MASKED)
    whole_words: bool = only(False, conditions.MASKED)
    mask_variants: int = only(0, conditions.MASKED)
    num_workers: int = 1
    index_dir: str | None = None
    valid_mask_variants: int = only(1, conditions.MASKED)
    max_valid_samples: int | None = None

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

    name: str = "roberta_base"
    init: Literal["random", "pretrained"] = "random"
    num_layers: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    ffn_size: int | None = None
    num_positions: int = 512
    vocab_multiple: int = 64
    dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02


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

    path: str | None = None
    placement: Literal["online", "overlap", "cache", "ranks"] = only("online", conditions.PLACED)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = only("auto", conditions.TEACHER)
    topk: int | None = only(None, conditions.TEACHER)
    topk_semantics: Literal["renormalise", "tail"] = only("renormalise", conditions.TOPK)
    num_ranks: int = only(1, conditions.RANKS)
    ahead: int = only(2, conditions.RANKS)
    patience: float = only(300.0, conditions.RANKS)


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

    schedule: Literal["linear", "heaviside", "constant", "auto", "none"] = "none"
    steps: int | None = only(None, conditions.ENDS)
    slope: float | None = only(None, conditions.ENDS)
    start_step: int = only(0, conditions.INHERITS)
    constant_alpha: float = only(0.5, conditions.CONSTANT)
    tau: float = only(2.0, conditions.INHERITS)


@dataclass(frozen=True)
class LossConfig:
    """How the objective is computed; only label_smoothing and z_weight change its value.

    Args:
        backend: auto takes the Triton kernels on a GPU and chunked PyTorch elsewhere.
        chunk_rows: rows whose logits exist at once; null chooses from the sizes.
        label_smoothing: share of the label's mass spread over the other classes (Table 10; 0 in all other runs).
        z_weight: of logsumexp(logits)^2 in each row while training, which keeps logits small (z-loss; 1e-4 in PaLM).
    """

    backend: Literal["auto", "triton", "torch"] = "auto"
    chunk_rows: int | None = None
    label_smoothing: float = 0.0
    z_weight: float = 0.0


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

    lr: float = 5.0e-4
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1.0e-6
    weight_decay: float = 0.01
    decay_norms_and_biases: bool = only(True, conditions.DECAY)
    warmup_fraction: float = 0.1
    max_grad_norm: float = 0.0


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

    ds_config: str = "ds_configs/zero1.json"
    precision: Precision = "fp32"
    activation_checkpointing: bool = False
    compile: bool = False
    watchdog_seconds: float = 600.0
    connect_seconds: float = 300.0
    num_threads: int = 0


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

    num_steps: int = 125_000
    global_batch_size: int = 2048
    micro_batch_size: int = 16
    eval_micro_batch_size: int | None = None
    eval_every: int = 1000
    save_every: int = 1000
    log_every: int = 10
    save_in_background: bool = False
    keep_checkpoints: int = 2
    keep_every: int | None = None
    stop_at_step: int | None = only(None, conditions.BEFORE_END)
    bad_step: Literal["stop", "skip"] = "stop"
    spike_sigmas: float = 0.0
    changed_config: Literal["refuse", "allow"] = "refuse"


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

    tensorboard: bool = False
    csv: bool = False
    wandb_project: str | None = None
    profile_steps: int = 0
    progress: Literal["auto", "bar", "lines", "none"] = "auto"


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

    run_dir: str = ""
    task: Task = "mlm"
    seed: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: list[TeacherEntry] | None = None
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


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="deepspeed launchers/train_ki.sh",
        description="Train a language model, alone or inheriting from a smaller one. With bash launchers/train_ki.sh "
        "--dry_run [--num_gpus N] [--device H100] ... it only prints what the run will need (--dry_run --help).",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML of the fields below; give several, later ones win.")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse(argv: list[str]) -> RunConfig:
    """The validated run that a command line describes.

    Args:
        argv: `--config FILE` any number of times and `--group.field value`; later ones win.

    Raises:
        UserError: an unknown key, a wrong type, or values that cannot go together; it names value, rule and fix.
        SystemExit: after --help or --print_config.
    """
    return _validated(lambda parser: parser.parse_args(argv))


def of_groups(groups: dict[str, Any]) -> RunConfig:
    """The validated run of a nested dict, as a YAML file has it. Raises UserError as `parse` does."""
    return _validated(lambda parser: parser.parse_object(groups))


def _validated(
    read: Callable[[jsonargparse.ArgumentParser], jsonargparse.Namespace], *, saved: bool = False
) -> RunConfig:
    parser = _parser()
    try:
        values = read(parser)
        for group in (f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.default_factory)):
            if not isinstance(values[group], jsonargparse.Namespace):
                raise UserError(
                    f"configuration: {group}={str(values[group])[:40]} is no group of fields; write {group}.NAME"
                )
        groups = parser.instantiate(values)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"configuration: a YAML file is no UTF-8 text ({error}); save it as UTF-8") from None
    except (jsonargparse.ArgumentError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"configuration: {reason}; --help lists every field with its meaning") from None
    config = RunConfig(**{f.name: groups[f.name] for f in dataclasses.fields(RunConfig)})
    validate(config, saved=saved)
    return config


def load(path: str | Path, *, saved: bool = False) -> RunConfig:
    """The run that a configuration file describes. Raises UserError as `parse` does.

    Args:
        saved: by a run, maybe of an earlier version, whose fields without meaning may have any value.
    """
    return _validated(lambda parser: parser.parse_args(["--config", str(path)]), saved=saved)


def save(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load` and `--config` read."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def flatten(config: Any) -> dict[str, Any]:
    """Every field by its dotted name, e.g. {"optim.lr": 5e-4, "data.sources.0.weight": 1.0, ...}."""
    return {name: value for name, _, value in walk(config)}


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that change what a run computes and differ: {name: (old value, new value)}."""
    before, after = _computed(old), _computed(new)
    pairs = {name: (before.get(name), after.get(name)) for name in {**before, **after}}
    idle = without_meaning(old).keys() & without_meaning(new).keys()
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in idle}


def _computed(config: RunConfig) -> dict[str, Any]:
    """The fields that say what is computed; of corpora by domain the names, for what they hold is compared by hash."""
    flat = {name: value for name, value in flatten(config).items() if not is_operational(name)}
    return {name: sorted(value) if isinstance(value, dict) else value for name, value in flat.items()}


def inherit_steps(config: RunConfig) -> int | None:
    """T_inherit in steps, from `inherit.steps` or from the paper's slope (T_inherit = T / alpha_T)."""
    if config.inherit.slope is not None:
        return round(config.train.num_steps / config.inherit.slope)
    return config.inherit.steps


def validate(config: RunConfig, *, saved: bool = False) -> None:
    """Return silently, or raise UserError for the first rule that the values break.

    Args:
        saved: fields without meaning may have any value.
    """
    _check_given(config)
    check_ranges(flatten(config))
    _check_inheritance(config)
    if not saved:
        check_meaning(config)
    if not config.run_dir:
        raise UserError("run_dir is empty; give the run a folder, e.g. --run_dir runs/base")
    _check_data(config.data)
    _check_teachers(config)
    _check_masking(config)
    if config.train.keep_every and config.train.keep_every % config.train.save_every:
        raise UserError(
            f"train.keep_every={config.train.keep_every} is not a multiple of train.save_every="
            f"{config.train.save_every}, so that nothing is saved there; change one of them"
        )
    if config.train.global_batch_size % config.train.micro_batch_size:
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={config.train.micro_batch_size}; change one of them"
        )


def _check_given(config: Any, prefix: str = "") -> None:
    """No field is null that needs a value: the parser takes null for any."""
    types = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if value is None and type(None) not in get_args(types[item.name]):
            raise UserError(f"{name} is null, but needs a value; give one, or leave {name} out")
        for number, entry in enumerate(value if isinstance(value, list) else [value]):
            if dataclasses.is_dataclass(entry):
                _check_given(entry, f"{name}.{number}." if isinstance(value, list) else f"{name}.")


def _check_inheritance(config: RunConfig) -> None:
    inherit, named = config.inherit, config.all_teachers
    if inherit.schedule != "none" and not named and config.teachers is None:
        raise UserError(
            f"inherit.schedule={inherit.schedule} needs a teacher; give teacher.path, or inherit.schedule none"
        )
    if inherit.schedule == "none" and named:
        what = "teacher.path" if config.teachers is None else "teachers.0.path"
        raise UserError(
            f"{what}={named[0].path} would never be used with inherit.schedule=none; give a schedule or no teacher"
        )
    given = [name for name in ("steps", "slope") if getattr(inherit, name) is not None]
    if inherit.schedule in ("linear", "heaviside") and len(given) != 1:
        what = "neither inherit.steps nor inherit.slope" if not given else "both inherit.steps and inherit.slope"
        raise UserError(f"inherit.schedule={inherit.schedule} was given {what}; give exactly one of them")
    if inherit.schedule in ("linear", "heaviside") and inherit_steps(config) == 0:
        raise UserError(
            f"inherit.slope={inherit.slope} leaves no step of train.num_steps={config.train.num_steps} to inherit "
            "(T_inherit = T / slope); lower it, or take inherit.schedule none"
        )
    if inherit.schedule != "none" and inherit.start_step >= config.train.num_steps:
        raise UserError(
            f"inherit.start_step={inherit.start_step} is not before train.num_steps={config.train.num_steps}; lower it"
        )


def _check_teachers(config: RunConfig) -> None:
    teacher = config.teacher
    if config.teachers is not None:
        if teacher.path is not None:
            raise UserError(f"teacher.path={teacher.path} and teachers are both given; put it into the list")
        check_entries(config.teachers, list(dict.fromkeys(source.name for source in config.data.all_sources)))
    if teacher.topk is not None:
        _check_topk(config)


def _check_topk(config: RunConfig) -> None:
    given = f"teacher.topk={config.teacher.topk}"
    if config.teacher.placement in ("cache", "ranks"):
        why = "cache, whose K is its own" if config.teacher.placement == "cache" else "ranks, which send hidden states"
        raise UserError(f"{given} has no meaning with teacher.placement={why}; leave it out")
    if config.inherit.schedule == "auto":
        raise UserError(f"{given} hides the whole teacher from inherit.schedule=auto; leave it out, or take linear")
    if len(config.all_teachers) > 1 and config.all_teachers[0].domains is None:
        raise UserError(f"{given}: K entries cannot be averaged over teachers; leave it out, or give each domains")


def _check_data(data: DataConfig) -> None:
    if bool(data.corpus) == (data.sources is not None):
        what = "both data.corpus and data.sources" if data.corpus else "neither data.corpus nor data.sources"
        raise UserError(f"{what} are given; give a corpus made by tools/prepare_data.py, or a list of sources")
    if data.sources == []:
        raise UserError("data.sources is empty; give at least one source, e.g. [{path: data/wb}]")
    weights = [source.weight for source in data.all_sources]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise UserError(f"data.sources have the weights {weights}; give every source one, or none")
    for number, source in enumerate(data.all_sources):
        name = f"data.sources.{number}"
        for field_name, value in (("weight", source.weight), ("max_tokens", source.max_tokens)):
            if value is not None and not 0 < value < 2**62:
                raise UserError(f"{name}.{field_name}={value} is not positive; change it")
        if not 0 < source.fraction <= 1:
            raise UserError(f"{name}.fraction={source.fraction} is outside (0, 1]; change it")
    if data.valid == {}:
        raise UserError("data.valid is empty; give {domain: corpus}, or null for the sources' own validation parts")


def _check_masking(config: RunConfig) -> None:
    data = config.data
    if data.keep_probability + data.random_probability > 1:
        raise UserError(
            f"data.keep_probability={data.keep_probability} and data.random_probability={data.random_probability} "
            "add up to more than 1; lower one of them"
        )
