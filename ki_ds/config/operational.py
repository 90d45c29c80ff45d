"""Which fields of a configuration say how a run is carried out, and not what it computes."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\.\d+")  # of an entry of a list, in a field's name

# They may differ when a run goes on.
OPERATIONAL_FIELDS = frozenset(
    {
        "run_dir",
        "data.corpus",  # its content is compared by hash
        "data.sources.path",  # likewise
        "data.tokenizer",
        "data.num_workers",
        "data.index_dir",
        "teacher.path",  # likewise
        "teachers.path",  # likewise
        "teacher.placement",
        "teacher.num_ranks",
        "teacher.ahead",
        "teacher.patience",
        "loss.backend",
        "loss.chunk_rows",
        "engine.ds_config",
        "engine.activation_checkpointing",
        "engine.compile",
        "engine.watchdog_seconds",
        "engine.connect_seconds",
        "engine.num_threads",
        "train.micro_batch_size",
        "train.eval_micro_batch_size",
        "train.eval_every",
        "train.save_every",
        "train.log_every",
        "train.save_in_background",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.stop_at_step",
        "train.bad_step",
        "train.changed_config",
        "monitor.tensorboard",
        "monitor.csv",
        "monitor.wandb_project",
        "monitor.profile_steps",
        "monitor.progress",
    }
)


def is_operational(name: str) -> bool:
    """Whether a field, by its name in `flatten`, may differ when a run goes on."""
    return _NUMBER.sub("", name) in OPERATIONAL_FIELDS
