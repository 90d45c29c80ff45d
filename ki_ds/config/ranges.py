"""What numbers a configuration's fields may have."""

from __future__ import annotations

from typing import Any

from ki_ds.errors import UserError

# name: (smallest, largest, largest itself allowed)
RANGES: dict[str, tuple[float, float, bool]] = {
    "seed": (0, 2**63 - 1, True),
    "data.seq_len": (8, 2**20, True),
    "data.valid_fraction": (0, 1, False),
    "data.subset_seed": (0, 2**63 - 1, True),
    "data.mask_variants": (0, 2**31, True),
    "data.mask_probability": (1e-6, 1, False),
    "data.keep_probability": (0, 1, True),
    "data.random_probability": (0, 1, True),
    "data.num_workers": (0, 1024, True),
    "data.valid_mask_variants": (1, 10_000, True),
    "data.max_valid_samples": (1, 2**62, True),
    "model.num_layers": (1, 10_000, True),
    "model.hidden_size": (1, 2**20, True),
    "model.num_heads": (1, 2**20, True),
    "model.ffn_size": (1, 2**24, True),
    "model.num_positions": (8, 2**20, True),
    "model.vocab_multiple": (1, 2**16, True),
    "model.dropout": (0, 1, False),
    "model.attention_dropout": (0, 1, False),
    "model.init_std": (1e-9, 10, True),
    "teacher.topk": (1, 2**31, True),
    "teacher.num_ranks": (1, 2**20, True),
    "teacher.ahead": (1, 1024, True),
    "teacher.patience": (0, 1e9, True),
    "inherit.steps": (1, 2**62, True),
    "inherit.start_step": (0, 2**62, True),
    "inherit.slope": (1e-9, 1e9, True),
    "inherit.constant_alpha": (0, 1, True),
    "inherit.tau": (1e-3, 1e3, True),
    "loss.chunk_rows": (1, 2**31, True),
    "loss.label_smoothing": (0, 1, False),
    "loss.z_weight": (0, 1e3, True),
    "optim.lr": (1e-12, 100, True),
    "optim.beta1": (0, 1, False),
    "optim.beta2": (0, 1, False),
    "optim.eps": (1e-30, 1, True),
    "optim.weight_decay": (0, 100, True),
    "optim.warmup_fraction": (0, 1, False),
    "optim.max_grad_norm": (0, 1e9, True),
    "engine.num_threads": (0, 4096, True),
    "engine.watchdog_seconds": (0, 1e9, True),
    "engine.connect_seconds": (0, 1e9, False),
    "train.num_steps": (1, 2**62, True),
    "train.global_batch_size": (1, 2**40, True),
    "train.micro_batch_size": (1, 2**30, True),
    "train.eval_micro_batch_size": (1, 2**30, True),
    "train.eval_every": (1, 2**62, True),
    "train.save_every": (1, 2**62, True),
    "train.log_every": (1, 2**62, True),
    "train.keep_checkpoints": (1, 2**31, True),
    "train.keep_every": (1, 2**62, True),
    "train.stop_at_step": (1, 2**62, True),
    "monitor.profile_steps": (0, 1000, True),
    "train.spike_sigmas": (0, 1e6, True),
}


def check_ranges(flat: dict[str, Any]) -> None:
    """Return silently, or raise UserError for the first field, by its dotted name, whose value is out of range."""
    for name, (low, high, closed) in RANGES.items():
        value = flat[name]
        if value is None:
            continue
        if not (low <= value <= high) or (value == high and not closed):
            raise UserError(f"{name}={value} is outside [{low:g}, {high:g}{']' if closed else ')'}; change it")
