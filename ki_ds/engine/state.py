"""A student's whole optimizer state, from the shards of one ZeRO stage and number of ranks into those of another.

DeepSpeed's universal checkpoints lead from stage 1 or 2 to 1 or 2 and from 3 to 3 only, and there give all groups of
parameters the first group's weight decay. So only their files are used here, one parameter at a time.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ki_ds.errors import UserError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class WholeState:
    """What training goes on from.

    Args:
        adam_step: updates that Adam has made.
        counters: DeepSpeed's own, by attribute of its engine.
        tensors: a parameter's name to its float32 weight and moments, each with all its elements, on the CPU.
        loss_scaler: DeepSpeed's, of fp16.
    """

    adam_step: float
    counters: Mapping[str, int]
    tensors: Callable[[str], dict[str, Tensor]]
    loss_scaler: Any = None


# --- reading ------------------------------------------------------------------------------------------------------


def reshard(shards: Path, universal: Path, convert: Callable[[SimpleNamespace], None]) -> None:
    """Write the shards of stages 1 to 3 parameter by parameter, by DeepSpeed's converter. Called by one rank."""
    shutil.rmtree(universal.parent, ignore_errors=True)
    arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert(
            SimpleNamespace(
                input_folder=str(shards), output_folder=str(universal), inject_missing_state=True, **arguments
            )
        )


def read(folder: Path, names: Sequence[str], group_sizes: Sequence[int], *, stage: int) -> WholeState:
    """The state in a folder: of stage 0 as DeepSpeed wrote it, of the others as `reshard` did.

    Args:
        names: of the parameters, in the order of the optimizer's groups.
        group_sizes: parameters in each group.

    Raises:
        UserError: it was written with other groups of parameters.
    """
    counted = _load(min(folder.glob("*model_states.pt")))
    counters = {name: int(counted[name]) for name in _COUNTERS}
    if stage == 0:
        found = counted["optimizer"]
        if [len(group["params"]) for group in found["param_groups"]] != list(group_sizes):
            raise UserError(
                f"{folder} was saved with other groups of parameters; set optim.decay_norms_and_biases as it was"
            )
        states = dict(zip(names, (found["state"][index] for index in range(len(names))), strict=True))
        step = float(states[names[0]]["step"])
        module = counted["module"]
        return WholeState(step, counters, lambda name: {"fp32": module[name].float(), **_moments(states[name])})
    zero = folder / "zero"
    common = _load(zero / "optimizer_state.pt")
    if (zero / names[0] / "step.pt").exists():
        step = float(_load(zero / names[0] / "step.pt"))
    else:
        step = float(common["optimizer_state_dict"]["state"][0]["step"])
    return WholeState(
        step,
        counters,
        lambda name: {key: _load_part(zero / name, key) for key in ("fp32", *_MOMENTS)},
        common.get("loss_scaler"),
    )


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_part(folder: Path, key: str) -> Tensor:
    found = _load(folder / f"{key}.pt")
    return found["param"] if isinstance(found, dict) else found


def _moments(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: state[key] for key in _MOMENTS}


# --- writing ------------------------------------------------------------------------------------------------------


def write(whole: WholeState, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put a state into a DeepSpeed engine that has made no update yet. Called by all ranks.

    Raises:
        UserError: the engine keeps its state where it cannot be put.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise UserError(
            "a state on NVMe cannot go to another ZeRO stage or number of ranks; go on with those it was saved with"
        )
    if getattr(optimizer, "dynamic_loss_scale", False) and whole.loss_scaler is not None:
        optimizer.loss_scaler = whole.loss_scaler
    stage = engine.zero_optimization_stage()
    if stage == 3:
        _write_stage_3(whole, optimizer, parameters)
    elif stage:
        _write_stages_1_and_2(whole, optimizer, parameters)
    else:
        for name, parameter in parameters.items():
            values = whole.tensors(name)
            optimizer.state[parameter] = _adam(parameter, whole.adam_step)
            parameter.data.copy_(values["fp32"].view_as(parameter))
            for key in _MOMENTS:
                optimizer.state[parameter][key].copy_(values[key].view_as(parameter))
    for name, value in whole.counters.items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def _adam(like: Tensor, step: float) -> dict[str, Tensor]:
    """The state that torch's fused AdamW makes for a parameter at its first update, as after `step` of them."""
    moments = {key: torch.zeros_like(like, dtype=torch.float32) for key in _MOMENTS}
    return {"step": torch.tensor(step, dtype=torch.float32, device=like.device), **moments}


@torch.no_grad()
def _write_stages_1_and_2(whole: WholeState, optimizer: Any, parameters: Mapping[str, Any]) -> None:
    states = [_adam(flat, whole.adam_step) for flat in optimizer.single_partition_of_fp32_groups]
    names = {parameter: name for name, parameter in parameters.items()}
    for flat, state, group in zip(
        optimizer.single_partition_of_fp32_groups, states, optimizer.bit16_groups, strict=True
    ):
        optimizer.optimizer.state[flat] = state
        for parameter in group:
            values = whole.tensors(names[parameter])
            parameter.data.copy_(values["fp32"].view_as(parameter))
            mapping = parameter._hp_mapping
            if mapping is None:  # no part of it is this rank's
                continue
            own, whole_part = mapping.hp_fragment_address, mapping.lp_fragment_address
            for key, target in (("fp32", flat), *((key, state[key]) for key in _MOMENTS)):
                part = values[key].flatten().narrow(0, whole_part.start, whole_part.numel)
                target.data.narrow(0, own.start, own.numel).copy_(part)


@torch.no_grad()
def _write_stage_3(whole: WholeState, optimizer: Any, parameters: Mapping[str, Any]) -> None:
    optimizer.checkpoint_event_prologue()  # small parameters are kept whole: part them as well
    flats = optimizer.fp32_partitioned_groups_flat
    for flat in flats:
        optimizer.optimizer.state[flat] = _adam(flat, whole.adam_step)
    for name, parameter in parameters.items():
        values = whole.tensors(name)
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = optimizer._get_param_partition_rank(parameter) * size
        length = max(0, min(size, parameter.ds_numel - start))  # the last ranks' parts are padded
        state = optimizer.optimizer.state[flats[group]]
        for key, target in (("fp32", flats[group]), *((key, state[key]) for key in _MOMENTS)):
            if length:
                target.data.narrow(0, offset, length).copy_(values[key].flatten().narrow(0, start, length))
        if length:
            part = values["fp32"].flatten().narrow(0, start, length)
            parameter.ds_tensor.data.view(-1).narrow(0, 0, length).copy_(part)
    optimizer.checkpoint_event_epilogue()
