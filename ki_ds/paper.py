"""What the paper's appendix prescribes for a run, beside its architectures and learning rates (`models.PRESETS`)."""

from __future__ import annotations

from collections.abc import Sequence

from ki_ds.config import Task

# Updates of every model trained from scratch at a global batch of 2,048 (section 4.1).
NUM_STEPS: dict[Task, int] = {"mlm": 125_000, "causal": 62_500}

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
