"""DeepSpeed folders of any training: whole weights from whatever ZeRO left of them.

Every file is read by `safe_pickle` first. DeepSpeed's own `zero_to_fp32`, which unpickles what it is given, sees
only copies that hold nothing but tensors, numbers and strings, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ki_ds.convert.safe_pickle import Inert, plain, read_checkpoint
from ki_ds.errors import UserError
from ki_ds.files import check_space, is_plain_name

_MOMENTS = ("optimizer", "base_optimizer_state", "param_slice_mappings")  # large, and of no use here
_WRAPPERS = ("module.", "lm.")


@dataclass(frozen=True)
class Consolidated:
    """A DeepSpeed checkpoint's weights by the wrapped model's names, and what is known of it."""

    weights: dict[str, Tensor]
    files: tuple[Path, ...]
    loader: str
    facts: dict[str, Any]


def find_checkpoint(folder: Path) -> Path | None:
    """The folder with DeepSpeed's files: the given one, or the one that its `latest` names; None without either."""
    if any(folder.glob("*_model_states.pt")):
        return folder
    if not (folder / "latest").is_file():
        return None
    tag = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    if not is_plain_name(tag) or not any((folder / tag).glob("*_model_states.pt")):
        shown = repr(tag[:100])
        raise UserError(f"{folder / 'latest'} names {shown}, which has no model states; name the global_step folder")
    return folder / tag


def consolidate(folder: Path) -> Consolidated:
    """The whole weights of a DeepSpeed checkpoint, in float32 where ZeRO has kept them so.

    Raises:
        UserError: the model was split (pipeline, tensor or expert parallel), a file is missing, damaged or hostile,
            or DeepSpeed is needed and not there.
    """
    model_files, shards = sorted(folder.glob("*_model_states.pt")), sorted(folder.glob("*_optim_states.pt"))
    split = [p.name for p in folder.iterdir() if p.name.startswith(("layer_", "expert_")) or "mp_rank_01" in p.name]
    if split:
        raise UserError(
            f"{folder} has {split[0]}: the model itself was split (pipeline, tensor, expert); merge it first"
        )
    main = read_checkpoint(model_files[0])
    module = main.get("module") if isinstance(main, dict) else None
    if not isinstance(module, dict):
        raise UserError(f"{model_files[0]} is no DeepSpeed checkpoint (it has no 'module'); name another folder")
    facts = {name: main.get(name) for name in ("global_steps", "dp_world_size", "ds_version")}
    facts = {name: value for name, value in facts.items() if isinstance(value, str | int | float)}
    whole = not model_files[0].name.startswith("zero_pp_rank_")  # stage 3 has one such file a rank
    if whole and (not shards or all(t.dtype == torch.float32 for t in _tensors(module).values())):
        weights = _unwrapped(_tensors(module))
        return Consolidated(weights, (model_files[0],), "torch.load(weights_only=True)", facts)
    weights = _unwrapped(_merge(folder, [*model_files, *shards]))
    if whole:
        _check_rounding(folder, weights, _unwrapped(_tensors(module)))
    loader = "deepspeed.utils.zero_to_fp32, on copies rewritten after torch.load(weights_only=True)"
    return Consolidated(weights, (*model_files, *shards), loader, facts)


def _tensors(state: dict[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers around the model have put before every name."""
    while state and (prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in state)), None)):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _merge(folder: Path, files: Sequence[Path]) -> dict[str, Tensor]:
    """zero_to_fp32's state dict of clean copies of the files."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{folder} has weights in shards of ZeRO, which DeepSpeed merges; pip install deepspeed")
    with tempfile.TemporaryDirectory(prefix="ki_ds_zero_") as place:
        copies, merged = Path(place, "in", "clean"), Path(place, "out")
        copies.mkdir(parents=True)
        check_space(copies, 2 * sum(file.stat().st_size for file in files))  # TMPDIR moves it elsewhere
        for file in files:
            torch.save(_clean(read_checkpoint(file)), copies / file.name)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "deepspeed.utils.zero_to_fp32", copies.parent, merged, "--tag", copies.name],
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"DeepSpeed cannot merge {folder} ({reason[:200]}); get the checkpoint again")
        parts = [read_checkpoint(path) for path in sorted(merged.glob("*.bin"))]
        return {name: tensor.clone() for part in parts for name, tensor in _tensors(part).items()}


def _clean(value: Any) -> Any:
    """The value without anything but containers, tensors, numbers and strings; without the optimizer's moments."""
    if isinstance(value, Inert):
        return plain(value)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if name not in _MOMENTS}
        clean = {_clean(name): _clean(item) for name, item in kept.items()}
        return OrderedDict(clean) if isinstance(value, OrderedDict) else clean
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, list | tuple):
        return type(value)(_clean(item) for item in value)
    return value if isinstance(value, str | int | float | bool | torch.dtype | None) else None


def _check_rounding(folder: Path, merged: dict[str, Tensor], module: dict[str, Tensor]) -> None:
    """That the merged weights, rounded, are those that the training computed with."""
    for name, tensor in module.items():
        if name not in merged:
            raise UserError(f"{folder}: the shards lack {name} {list(tensor.shape)}; get the checkpoint again")
        if not torch.equal(merged[name].to(tensor.dtype), tensor):
            raise UserError(f"{folder}: {name} of the shards is not that of the model states; get the checkpoint again")
