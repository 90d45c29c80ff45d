"""The paper's tables: architectures and learning rates (Table 6), steps of teacher-guided learning (Table 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Task = Literal["mlm", "causal"]


@dataclass(frozen=True)
class Preset:
    """One row of Table 6; the vocabulary comes from the tokenizer, the head is tied to the embedding."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    peak_lr: float  # at a global batch of 2,048


PRESETS: dict[str, Preset] = {
    "roberta_medium": Preset(9, 576, 12, 3072, 5.0e-4),
    **{f"roberta_d{d}": Preset(12, d, 12, 3072, 5.0e-4) for d in (384, 480, 576, 672)},
    **{f"roberta_h{h}": Preset(h, 768, 12, 3072, 5.0e-4) for h in (4, 6, 8, 10)},
    "roberta_base": Preset(12, 768, 12, 3072, 5.0e-4),
    "roberta_base_plus": Preset(18, 864, 12, 3600, 3.5e-4),
    "roberta_large": Preset(24, 1024, 16, 4096, 2.5e-4),
    "gpt_73m": Preset(9, 576, 12, 3072, 5.0e-4),
    "gpt_124m": Preset(12, 768, 12, 3072, 5.0e-4),
    "gpt_209m": Preset(18, 864, 12, 3600, 4.0e-4),
    "gpt_354m": Preset(24, 1024, 16, 4096, 3.5e-4),
    "gpt_773m": Preset(36, 1280, 20, 5120, 3.0e-4),
    "gpt_1b": Preset(40, 1440, 20, 5760, 2.5e-4),
}

# Updates of every model trained from scratch at a global batch of 2,048 (section 4.1).
NUM_STEPS: dict[Task, int] = {"mlm": 125_000, "causal": 62_500}
# Updates that adapt a model to another domain (section 4.4).
ADAPT_STEPS = 4_000

# Table 7, the steps of teacher-guided learning: (student, its teacher, the teacher's own teacher, ...).
TEACHING_STEPS: dict[tuple[str, ...], int] = {
    ("roberta_base", "roberta_medium"): 35_000,
    ("roberta_base", "roberta_d384"): 28_000,
    ("roberta_base", "roberta_d480"): 40_000,
    ("roberta_base", "roberta_d576"): 70_000,
    ("roberta_base", "roberta_d672"): 85_000,
    ("roberta_base", "roberta_h4"): 22_000,
    ("roberta_base", "roberta_h6"): 35_000,
    ("roberta_base", "roberta_h8"): 55_000,
    ("roberta_base", "roberta_h10"): 65_000,
    ("roberta_base_plus", "roberta_base"): 55_000,
    ("roberta_large", "roberta_base"): 40_000,
    ("roberta_large", "roberta_base_plus"): 65_000,
    ("roberta_large", "roberta_base_plus", "roberta_base"): 75_000,
    ("gpt_124m", "gpt_73m"): 10_000,
    ("gpt_209m", "gpt_124m"): 15_000,
    ("gpt_354m", "gpt_209m"): 18_000,
    ("gpt_773m", "gpt_354m"): 16_000,
    ("gpt_1b", "gpt_773m"): 20_000,
}


def teaching_share(generations: Sequence[str], task: Task) -> float | None:
    """T_inherit as a share of all steps, or None for a pair that Table 7 does not have.

    Args:
        generations: presets of the student, its teacher, the teacher's teacher, and so on; Table 7's longest row that
            begins them counts.
    """
    for length in range(len(generations), 1, -1):
        steps = TEACHING_STEPS.get(tuple(generations[:length]))
        if steps is not None:
            return steps / NUM_STEPS[task]
    return None
