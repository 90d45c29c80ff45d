"""The student's DeepSpeed engine; the only module that imports deepspeed.

DeepSpeed's JSON holds ZeRO, offload and communication; batch, accumulation, precision, clipping and optimizer come
from the run's configuration. A JSON that says otherwise, and every setting in which DeepSpeed trains wrongly
without a word, is refused.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ki_ds.checkpoints.checkpoint import File, Snapshot
from ki_ds.config import EngineConfig, MonitorConfig, OptimConfig, RunConfig
from ki_ds.convert import safe_pickle
from ki_ds.data.batches import Batch
from ki_ds.engine.guard import Guard
from ki_ds.engine.memory import keep_freed_memory
from ki_ds.errors import UserError
from ki_ds.models.presets import InheritanceModel
from ki_ds.objective.types import LossOutput, Signal
from ki_ds.ranks.bridge import Bridge, split_world
from ki_ds.ranks.environment import launched, tasks_left_idle
from ki_ds.ranks.world import (
    all_sum,
    barrier,
    free_port,
    is_main,
    join_world,
    meet,
    on_main,
    pick_interface,
    repair_environment,
    say,
    share_of_cores,
    threads_asked_for,
    world_size,
)

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from deepspeed.utils import logger as _deepspeed_logger
from deepspeed.utils.tensor_fragment import fragment_address

from ki_ds.engine import monitors as engine_monitors
from ki_ds.engine import state as engine_state

ROOT = Path(__file__).resolve().parents[2]
# Filled in from the run's configuration; a JSON may repeat them but not contradict them.
_OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_OWNED_BY = {
    "optimizer": "optim.*",
    "scheduler": "optim.*",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
    "tensorboard": "monitor.tensorboard",
    "wandb": "monitor.wandb_project",
    "csv_monitor": "monitor.csv",
    "activation_checkpointing": "engine.activation_checkpointing",
    "checkpoint": "train.save_in_background",
    "datastates_ckpt": "train.save_in_background",
}
# How the engine has to be set up, whatever a JSON says.
_FIXED = {
    "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own needs a compiler at start
    "zero_force_ds_cpu_optimizer": False,
}
_PASSED_ON = {
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_allgather", "data_types"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler", "dump_state"),
    "aio",
}
_SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
}
_HALVES = ("fp16", "bf16")
_PICKLED = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)  # beside tensors and plain values
_GUARD = "guard.json"


def start(config: EngineConfig) -> torch.device:
    """This rank's device, with the ranks connected and the CPU's threads shared out.

    Raises:
        UserError: the launcher's environment makes no sense.
    """
    return connect(config)[0]


def connect(config: EngineConfig, *, num_teacher_ranks: int = 0) -> tuple[torch.device, Bridge | None]:
    """As `start`; of the launcher's ranks the last `num_teacher_ranks` are kept out of the student's world.

    The bridge between the two is None without teacher ranks. A teacher rank is in no world of its own.
    """
    _deepspeed_logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's old calls
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Its C++ extension would be compiled at every start (34 s, and fatal without ninja); gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    repair_environment(os.environ)
    if "RANK" not in os.environ and launched(os.environ):
        _ask_mpi()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    pick_interface(os.environ)
    threads = config.num_threads or threads_asked_for(os.environ)
    bridge = None
    if num_teacher_ranks:
        bridge = split_world(os.environ, num_teacher_ranks, seconds=config.connect_seconds)
    elif not torch.distributed.is_initialized():
        store = meet(os.environ, seconds=config.connect_seconds)
        join_world(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    torch.set_num_threads(threads or share_of_cores())
    if bridge and bridge.is_teacher:
        return _own_device(), bridge
    deepspeed.init_distributed(verbose=False)
    _check_world(int(os.environ["WORLD_SIZE"]))
    if bridge is None and (tasks := tasks_left_idle(os.environ, world_size())):
        say(
            f"warning: one rank trains in a Slurm job of {tasks} tasks; srun bash launchers/train_ki.sh starts one for "
            f'each, KI_DS_ARGS="--num_gpus {tasks}" bash launchers/train_ki.sh so many on this host'
        )
    return _own_device(), bridge


def _ask_mpi() -> None:
    """Let MPI name rank 0's host and a free port of it, where mpirun started ranks on several; the user's stay."""
    given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if os.environ.get(name)}
    try:
        deepspeed.comm.comm.mpi_discovery(verbose=False)
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"mpirun does not say where rank 0 is ({error}); pip install ki_ds[mpi], or set MASTER_ADDR and MASTER_PORT"
        ) from None
    os.environ["MASTER_PORT"] = MPI.COMM_WORLD.bcast(free_port(), root=0)
    os.environ.update(given)


def _own_device() -> torch.device:
    if torch.cuda.is_available():
        if torch.cuda.device_count() == 1:  # a rank that sees its own GPU only (srun --gpus-per-task=1)
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed takes the GPU of this number
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    keep_freed_memory()
    return torch.device("cpu")


def _check_world(expected: int) -> None:
    if world_size() != expected:
        raise UserError(f"WORLD_SIZE={expected}, but {world_size()} ranks are connected; check the launcher's settings")


# --- configuration ----------------------------------------------------------------------------------------------


def read_ds_config(path: str) -> dict[str, Any]:
    """The DeepSpeed JSON as a dict. Raises UserError when it is missing, no JSON object, or DeepSpeed refuses it.

    A relative path is looked up from the working folder, then beside the package, where ds_configs/ lies.
    """
    file = Path(path) if Path(path).exists() else ROOT / path
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"engine.ds_config={path} cannot be read ({error}); take one of ds_configs/") from None
    if not isinstance(settings, dict):
        raise UserError(f"engine.ds_config={path} is not a JSON object; take one of ds_configs/")
    for name, model in _SECTIONS.items():
        _check_section(settings.get(name, {}), model, f"engine.ds_config={path} sets {name}")
    return settings


def _check_section(section: Any, model: type[BaseModel], what: str) -> None:
    """What DeepSpeed itself would say of a section, in one line and before anything is built."""
    if not isinstance(section, dict):
        raise UserError(f"{what}={section!r}, which is no JSON object; take one of ds_configs/")
    try:
        model(**{key: value for key, value in section.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{what}.{name}={first['input']!r}: {first['msg']}; change it or leave it out") from None


def complete_ds_config(settings: dict[str, Any], run: RunConfig, *, world: int) -> dict[str, Any]:
    """DeepSpeed's whole configuration for a run: the JSON's ZeRO and communication, the rest filled in.

    Raises:
        UserError: the JSON contradicts the run, or asks for a setting in which DeepSpeed trains wrongly.
    """
    _refuse_foreign_settings(settings, run)
    engine_monitors.check_packages(run.monitor)
    filled: dict[str, Any] = {
        "train_batch_size": run.train.global_batch_size,
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(run, world),
        "gradient_clipping": run.optim.max_grad_norm,
    }
    for key in _OWNED:
        if settings.get(key, "auto") not in ("auto", filled[key]):
            raise UserError(
                f"engine.ds_config={run.engine.ds_config} sets {key}={settings[key]}, the run needs {filled[key]}; "
                "leave it out of the JSON"
            )
    for half in _HALVES:
        section = {k: v for k, v in settings.get(half, {}).items() if k != "enabled"}
        filled[half] = {**section, "enabled": run.engine.precision == half}
    return {
        "steps_per_print": 10**9,  # metrics are ours
        **settings,
        **filled,
        **_FIXED,
    }


def supports(precision: str) -> bool:
    """Whether DeepSpeed can train in this precision on this machine's accelerator."""
    accelerator = deepspeed.accelerator.get_accelerator()
    return {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}[precision]


def read_hostfile(path: str) -> dict[str, int]:
    """{host: slots} of a hostfile as DeepSpeed's launcher reads it. Raises UserError if it is missing or malformed."""
    from deepspeed.launcher.runner import fetch_hostfile

    _deepspeed_logger.setLevel("CRITICAL")  # it prints the whole file
    try:
        hosts = fetch_hostfile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; write lines like `worker-0 slots=4`") from None
    if hosts is None:
        raise UserError(f"{path} is no file; give a hostfile with lines like `worker-0 slots=4`")
    return dict(hosts)


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed JSON asks for."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def accumulation_steps(run: RunConfig, world: int) -> int:
    """Micro-batches per rank and optimizer step. Raises UserError when the global batch cannot be split so."""
    steps, rest = divmod(run.train.global_batch_size, run.train.micro_batch_size * world)
    if rest or not steps:
        raise UserError(
            f"train.global_batch_size={run.train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{run.train.micro_batch_size} x {world} ranks; change one of them"
        )
    return steps


def _without_effect(settings: dict[str, Any], precision: str) -> Iterator[tuple[str, Any, str]]:
    """(name, value, why) of what a JSON sets for another precision or ZeRO stage than the run's; auto sets nothing."""
    stage = zero_stage(settings)
    idle = {half: lambda key: key != "enabled" for half in _HALVES if half != precision}
    if stage == 0:
        idle["zero_optimization"] = lambda key: key != "stage"
    elif stage < 3:
        idle["zero_optimization"] = lambda key: key.startswith("stage3_") or key == "offload_param"
    for section, is_idle in idle.items():
        why = f"with ZeRO stage {stage}" if section == "zero_optimization" else f"with engine.precision={precision}"
        for key, value in settings.get(section, {}).items():
            if is_idle(key) and value != "auto":
                yield f"{section}.{key}", json.dumps(value)[:40], why


def _refuse_foreign_settings(settings: dict[str, Any], run: RunConfig) -> None:
    path = run.engine.ds_config
    for key, field in _OWNED_BY.items():
        if key in settings:
            raise UserError(f"engine.ds_config={path} sets {key}, which {field} decides; leave it out of the JSON")
    for key in sorted(settings.keys() - {*_SECTIONS, *_OWNED, *_PASSED_ON}):
        if key not in _FIXED or settings[key] != _FIXED[key]:
            value = f"{key}={json.dumps(settings[key])[:40]}"
            raise UserError(
                f"engine.ds_config={path} sets {value}, which has no meaning here; leave it out of the JSON"
            )
    for half in _HALVES:
        enabled = settings.get(half, {}).get("enabled", "auto")
        if enabled not in ("auto", run.engine.precision == half):
            raise UserError(
                f"engine.ds_config={path} sets {half}.enabled={enabled}, engine.precision={run.engine.precision} "
                "decides; leave it out of the JSON"
            )
    for name, value, why in _without_effect(settings, run.engine.precision):
        raise UserError(f"engine.ds_config={path} sets {name}={value}, which has no meaning {why}; leave it out of it")
    if settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("ratio", 1) != 1:
        raise UserError(  # a second optimizer, which could not leave a bad update out
            f"engine.ds_config={path} sets offload_optimizer.ratio, with which a bad update cannot be left out as a "
            "whole; leave it out of the JSON"
        )
    if run.engine.precision != "fp32" and zero_stage(settings) == 0:
        # fp16 gradients would be unscaled twice, and Adam would start at its second step
        raise UserError(
            f"engine.precision={run.engine.precision} with ZeRO stage 0 trains wrongly in DeepSpeed; "
            "take ds_configs/zero1.json or a higher stage"
        )


# --- the engine -------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, with norms and biases in a group of their own when they are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": optim.weight_decay}]
    if not optim.decay_norms_and_biases:
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)


def _compile_layers(model: InheritanceModel) -> None:
    """torch.compile each layer by itself: one layer's graph serves all, and hooks around the body stay as they are.

    Raises:
        UserError: the architecture has no layers that could be found, or a CPU has no compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise UserError(f"engine.compile=true needs {compiler} on a CPU, which is not there; install it, or take false")
    layers = [module for module in model.lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"engine.compile=true finds no layers in {type(model.lm).__name__}; take false")
    for layer in layers:
        layer.compile()


@torch.no_grad()
def _own_shard(parameter: Any) -> Tensor:
    """This rank's part of a parameter, whichever memory has it; one that waits on NVMe is read."""
    shard = getattr(parameter, "ds_tensor", parameter)
    status = getattr(shard, "status", PartitionedParamStatus.AVAILABLE)
    if status == PartitionedParamStatus.INFLIGHT:
        parameter.nvme_swapper.synchronize_reads()
    if status != PartitionedParamStatus.NOT_AVAILABLE:
        return shard
    read = torch.empty(shard.ds_numel, dtype=shard.dtype)
    parameter.nvme_swapper.swap_into_buffer(parameter, read)
    return read


class _LaterWriter(TorchCheckpointEngine):
    """Takes the files that DeepSpeed wants written, to write them as DeepSpeed does once its collectives are over."""

    @contextlib.contextmanager
    def collecting(self, snapshot: Snapshot) -> Iterator[list[File]]:
        """Collect the files of one checkpoint, and drop the snapshot at the end: it would keep what it has copied."""
        self._files: list[File] = []
        self._snapshot = snapshot
        try:
            yield self._files
        finally:
            del self._files, self._snapshot

    def save(self, state_dict: Any, path: str) -> None:
        self._files.append((Path(path), functools.partial(self._write, self._snapshot(state_dict))))

    def _write(self, state: Any, path: Path) -> None:
        super().save(state, str(path))


class StudentEngine:
    """The student under DeepSpeed: losses by the row, one division by the global rows, one update a step."""

    _precisions_used: set[str] = set()  # noqa: RUF012 - of the process on purpose, see below

    def __init__(self, model: InheritanceModel, run: RunConfig, *, device: torch.device):
        # A second engine of another precision in one process trains wrongly: DeepSpeed keeps global state.
        if self._precisions_used - {run.engine.precision}:
            raise UserError(
                f"engine.precision={run.engine.precision} after {sorted(self._precisions_used)} in one process; "
                "start a new process"
            )
        self._precisions_used.add(run.engine.precision)
        if not supports(run.engine.precision):
            raise UserError(
                f"engine.precision={run.engine.precision} is not supported on this device; take fp32 or bf16"
            )
        settings = read_ds_config(run.engine.ds_config)
        self.zero_stage = zero_stage(settings)
        self.device = device
        self.model = model.train()  # one that was loaded is in evaluation mode, without dropout
        if run.engine.activation_checkpointing:
            model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if run.engine.compile:
            _compile_layers(model)
        self._precision = run.engine.precision
        self.guard = Guard(device, spike_sigmas=run.train.spike_sigmas, stop=run.train.bad_step == "stop")
        self._loss = torch.zeros((), device=device)
        self._judged = False
        self._optimizer = make_optimizer(model, run.optim)
        named = {parameter: name for name, parameter in model.named_parameters()}
        groups = [group["params"] for group in self._optimizer.param_groups]
        self._group_sizes = [len(group) for group in groups]
        self._parameters = {named[parameter]: parameter for group in groups for parameter in group}
        self._optimizer.register_step_pre_hook(lambda *_: self._judge())
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=self._optimizer,
            config=complete_ds_config(settings, run, world=world_size()),
        )
        if self.zero_stage == 0 and world_size() == 1:  # two copies of all gradients for nothing
            self._engine.enable_backward_allreduce = False
        self._engine.checkpoint_engine = self._writer = _LaterWriter(self._engine._config)

    def loss(self, batch: Batch, signal: Signal | None, alpha: float | Tensor) -> tuple[LossOutput, Tensor | None]:
        """As `InheritanceModel.forward` of this rank's micro-batch, with gradient."""
        return self._engine(batch, signal, alpha)

    def backward(self, loss_sum: Tensor, global_rows: Tensor, aux_loss: Tensor | None = None) -> None:
        """Accumulate the gradient of loss_sum / global_rows, the mean over ALL ranks and accumulation steps.

        An architecture's own loss, already a mean over its micro-batch, counts as its plain average over the
        micro-batches of all ranks and accumulation steps, whatever rows each has.
        DeepSpeed averages gradients over the ranks, which are not means here, so that average is undone.
        """
        objective = loss_sum * (world_size() / global_rows)
        self._loss += loss_sum.detach() / global_rows
        if aux_loss is not None:
            share = aux_loss / self._engine.gradient_accumulation_steps()
            objective = objective + share
            self._loss += share.detach() / world_size()
        self._engine.backward(objective, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> None:
        """End a micro-step; after the last one of a global batch, update the weights unless the update is bad."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        self._judged, norm = False, torch.zeros_like(self._loss)
        if self.zero_stage == 0:  # before its gradients are clipped; in the other stages DeepSpeed has the norm
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self._loss, norm_sum = all_sum(torch.stack([self._loss, norm.float()])).unbind()
        if self.zero_stage == 0:
            self._engine._global_grad_norm = norm_sum / world_size()  # the same bits on every rank
        self._engine.step()
        if not self._judged:
            self.guard.left_out(self._engine.global_steps, self._loss, bad=self._precision != "fp16")
        self._loss = torch.zeros_like(self._loss)

    def _judge(self) -> None:
        """Called before each part of an update is made: let the optimizer leave the whole of it out if it is bad.

        DeepSpeed never comes here with a gradient whose overflow it has found itself.
        """
        if not self._judged:
            owner = self._engine if self.zero_stage == 0 else self._engine.optimizer
            norm = torch.as_tensor(owner._global_grad_norm, dtype=torch.float32, device=self.device)
            self._verdict = self.guard.judge(self._engine.global_steps + 1, self._loss, norm)
            self._judged = True
        part = next(parameter for group in self._optimizer.param_groups for parameter in group["params"])
        # As torch's GradScaler hands it over. Of another device torch would copy it without waiting: not an offloaded
        # part's kernel, which reads it at once.
        self._optimizer.found_inf = self._verdict.to(part.device)  # type: ignore[attr-defined]

    def weights_are_finite(self) -> bool:
        """Whether no weight is NaN or Inf on any rank, which agree. Waits for the device."""
        bad = torch.zeros((), device=self.device)  # where NCCL can take it, wherever weights are kept
        for parameter in self.model.parameters():
            bad += (~_own_shard(parameter).isfinite()).any().to(self.device)
        return not all_sum(bad).item()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossOutput:
        """The student's plain cross-entropy sums on a batch: no teacher, no dropout, no smoothing, no gradient."""
        self._engine.eval()
        try:
            return self._engine(batch)[0]
        finally:
            self._engine.train()

    @property
    def grad_norm(self) -> float | None:
        """The global gradient norm of the last update, where ZeRO has computed it."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Updates left out because fp16 gradients overflowed."""
        return int(self._engine.skipped_steps)

    def open_monitors(self, monitor: MonitorConfig, folder: Path, *, samples: int) -> None:
        """Let TensorBoard, W&B and CSV files go on from so many samples, whichever are on. Called by rank 0."""
        engine_monitors.open_monitors(self._engine.monitor, monitor, folder, samples=samples)

    def write_monitor(self, events: list[tuple[str, float, int]]) -> None:
        """Hand (name, value, step) events to TensorBoard, W&B or CSV, whichever are on."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events(events)

    def state_dict(self) -> dict[str, Tensor]:
        """The Hugging Face model's whole state dict in the training dtype; complete on rank 0. Called by all ranks."""
        if self.zero_stage == 3:
            state = self._engine._zero3_consolidated_16bit_state_dict() or {}
        else:
            state = self._engine.module.state_dict()
        return {name.removeprefix("lm."): tensor for name, tensor in state.items()}

    def save(self, folder: Path, tag: str, snapshot: Snapshot) -> list[File]:
        """This rank's files of the sharded state (weights, optimizer, counters) in folder/tag. Called by all ranks.

        All collectives are over when it returns; what the files will hold has gone through `snapshot`.
        """
        with self._writer.collecting(snapshot) as files:
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        if is_main():
            guard = json.dumps(self.guard.state())
            files.append((folder / tag / _GUARD, lambda path: path.write_text(guard, encoding="utf-8")))
        return files

    def load(self, folder: Path, tag: str, *, saved_world: int, saved_stage: int) -> None:
        """Restore what `save` wrote with `saved_world` ranks: bit for bit with as many, to float32 with others.

        Raises:
            UserError: it cannot be loaded at this stage.
        """
        if (folder / tag / _GUARD).exists():
            self.guard.load(json.loads((folder / tag / _GUARD).read_text(encoding="utf-8")))
        on_main(lambda: safe_pickle.check_names(sorted((folder / tag).rglob("*.pt")), _PICKLED))
        with safe_pickle.weights_and(_PICKLED, what=folder):
            self._load_any(folder, tag, saved_world=saved_world, saved_stage=saved_stage)

    def _load_any(self, folder: Path, tag: str, *, saved_world: int, saved_stage: int) -> None:
        like = {saved_stage, self.zero_stage}
        if like == {0} or (saved_world == world_size() and (len(like) == 1 or like == {1, 2})):
            self._load(folder, tag)  # stage 0 has no shards; 1 and 2 have the same
            return
        universal = folder.with_name(f".{folder.name}.resharded") / tag
        try:
            if is_main() and saved_stage:
                from deepspeed.checkpoint import ds_to_universal

                engine_state.reshard(folder / tag, universal, ds_to_universal.main)
            barrier()
            source = universal if saved_stage else folder / tag
            whole = engine_state.read(source, list(self._parameters), self._group_sizes, stage=saved_stage)
            engine_state.write(whole, self._engine, self._parameters)
            barrier()
        finally:  # of a killed start it goes with the next save
            if is_main():
                shutil.rmtree(universal.parent, ignore_errors=True)

    def _load(self, folder: Path, tag: str) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise UserError(f"{folder / tag} holds no state that DeepSpeed can load; resume from another checkpoint")

    def close(self) -> None:
        """Give DeepSpeed's buffers and hooks back."""
        self._engine.destroy()
