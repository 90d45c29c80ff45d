"""Run folders with known curves, as training leaves them."""

import json
import math

import yaml

from ki_ds.savings import (
    Costs,
    Point,
)

STUDENT, TEACHER, TOKENS = 1000, 250, 64  # parameters, and tokens a step


def points(ppls, *, taught_steps=0, seconds=2.0):
    """A curve validated every 100 steps from step 0 on."""
    return [_point(100 * index, ppl, taught_steps, seconds) for index, ppl in enumerate(ppls)]


def _point(step, ppl, taught_steps, seconds):
    student = 6.0 * STUDENT * TOKENS * step
    teacher = 2.0 * TEACHER * TOKENS * min(step, taught_steps)
    return Point(Costs(step, student, student + teacher, seconds * step), ppl)


def write_run(folder, ppls, *, inherits=False, seed=1, changes=None, config=None, **manifest):
    """A run folder as training leaves it."""
    folder.mkdir()
    teacher = {"path": "t", "num_parameters": TEACHER, "weights_sha256": "c" * 64, "valid_ppl": 21.5}
    record = {
        "name": folder.name,
        "task": "causal",
        "status": "finished",
        "world_size": 2,
        "device": "x86_64 CPU",
        "student": {"num_parameters": STUDENT, "dense_parameters": STUDENT},
        "teachers": [teacher] if inherits else [],
        "data": {"train_sha256": "a" * 64, "valid_sha256": "b" * 64, "tokenizer_sha256": "d" * 64},
        "valid_masks": {"seed": 1, "variants": 1},
    }
    (folder / "run.json").write_text(json.dumps(record | manifest), encoding="utf-8")
    settings = {"run_dir": str(folder), "seed": seed, "optim": {"lr": 1e-3}, "inherit": {"schedule": "none"}}
    settings["inherit"] = {"schedule": "linear", "steps": 200} if inherits else {"schedule": "none", "steps": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})), encoding="utf-8")
    records = metric_records(points(ppls, taught_steps=200 if inherits else 0))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return folder


def metric_records(curve):
    for point in curve:
        costs = point.costs
        totals = {"step": costs.steps, "tokens": costs.steps * TOKENS, "seconds": costs.seconds}
        totals |= {
            "student_flops": costs.student_flops,
            "teacher_flops": costs.flops_with_teacher - costs.student_flops,
        }
        if costs.steps:
            yield {"kind": "train", **totals, "alpha": 0.5, "ce": 3.0, "kl": 0.1, "loss": 2.0}
        yield {"kind": "valid", **totals, "ce_sum": math.log(point.ppl) * 10, "num_rows": 10, "ppl": point.ppl}
