"""Run folders with known curves, as training leaves them."""

import json
import math

import yaml

from ki_ds.reports.results import Costs, Point

STUDENT, TEACHER, TOKENS = 1000, 250, 64  # parameters, and tokens a step
DATA = {"train_sha256": "a" * 64, "valid_sha256": "b" * 64, "tokenizer_sha256": "d" * 64}
MASKS = {"seed": 1, "variants": 1}


def points(ppls, *, taught_steps=0, seconds=2.0, before=0.0):
    """A curve validated every 100 steps from step 0 on; `before`: what ancestors had cost."""
    return tuple(_point(100 * index, ppl, taught_steps, seconds, before) for index, ppl in enumerate(ppls))


def _point(step, ppl, taught_steps, seconds, before):
    student = 6.0 * STUDENT * TOKENS * step
    both = student + 2.0 * TEACHER * TOKENS * min(step, taught_steps)
    return Point(Costs(step, step * TOKENS, student, both, both + before, seconds * step), ppl)


def teacher_record(*, flops=1e8, ppl=21.5, weights="c" * 64, **changes):
    """The lineage of a teacher that learnt alone, measured as the fake runs are."""
    return {
        "version": 1,
        "name": "small",
        "task": "causal",
        "weights_sha256": weights,
        "num_parameters": TEACHER,
        "data": DATA,
        "valid_masks": MASKS,
        "valid_domains": ["corpus"],
        "seed": 1,
        "step": 300,
        "tokens": 300 * TOKENS,
        "student_flops": flops,
        "teacher_flops": 0.0,
        "valid_ppl": ppl,
        "inherit": {"schedule": "none", "steps": None, "tau": 2.0},
        "teachers": [],
        "started_from": None,
    } | changes


def write_run(folder, ppls, *, inherits=False, seed=1, config=None, teacher=None, domains=None, **manifest):
    """A run folder as training leaves it.

    Args:
        teacher: the lineage of its teacher, which makes it inherit and gives it a lineage of its own.
        domains: {name: perplexities}, whose rows are as many in each.
    """
    folder.mkdir()
    inherits = inherits or teacher is not None
    facts = {"path": "t", "num_parameters": TEACHER, "weights_sha256": "c" * 64, "valid_ppl": 21.5, "lineage": teacher}
    record = {
        "name": folder.name,
        "task": "causal",
        "status": "finished",
        "world_size": 2,
        "device": "x86_64 CPU",
        "student": {"num_parameters": STUDENT, "dense_parameters": STUDENT},
        "teachers": [facts] if inherits else [],
        "data": DATA,
        "valid_masks": MASKS,
        "valid_domains": ["corpus"],
    } | manifest
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    settings = {"run_dir": str(folder), "seed": seed, "optim": {"lr": 1e-3}}
    settings["inherit"] = {"schedule": "linear", "steps": 200} if inherits else {"schedule": "none", "steps": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})), encoding="utf-8")
    curve = points(ppls, taught_steps=200 if inherits else 0)
    records = list(metric_records(curve))
    for name, values in (domains or {}).items():
        for each, ppl in zip([r for r in records if r["kind"] == "valid"], values, strict=True):
            each.setdefault("domains", {})[name] = {"ce_sum": math.log(ppl) * 10, "num_rows": 10, "ppl": ppl}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    if teacher is not None:
        write_lineage(folder / "best", record, curve[-1])
    return folder


def write_lineage(folder, manifest, point):
    """The record of weights at a point of a run."""
    costs = point.costs
    record = teacher_record(ppl=point.ppl, weights="f" * 64) | {
        "name": manifest["name"],
        "num_parameters": STUDENT,
        "step": costs.steps,
        "student_flops": costs.student_flops,
        "teacher_flops": costs.flops_with_teacher - costs.student_flops,
        "teachers": manifest["teachers"],
    }
    folder.mkdir(parents=True)
    (folder / "lineage.json").write_text(json.dumps(record), encoding="utf-8")


def metric_records(curve):
    for point in curve:
        costs = point.costs
        totals = {"step": costs.steps, "tokens": costs.tokens, "seconds": costs.seconds}
        totals |= {
            "student_flops": costs.student_flops,
            "teacher_flops": costs.flops_with_teacher - costs.student_flops,
        }
        if costs.steps:
            yield {"kind": "train", **totals, "alpha": 0.5, "ce": 3.0, "kl": 0.1, "loss": 2.0}
        yield {"kind": "valid", **totals, "ce_sum": math.log(point.ppl) * 10, "num_rows": 10, "ppl": point.ppl}
