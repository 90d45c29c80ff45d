#!/usr/bin/env python3
"""The schedule auto beside linear ones and none, on real text: the experiment of docs/auto_handover.md.

One teacher, then for each seed the same student alone, inheriting by linear schedules of several T_inherit, and by
auto.
Interrupted, it goes on where it was. It prints one table last; a figure and the same table as JSON lie in the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ki_ds.cli import ends_cleanly
from ki_ds.data.corpora import gensim_dump_path
from ki_ds.data.prepare import TokenizerSpec, build_store
from ki_ds.errors import UserError
from ki_ds.experiments.demo import VALID_FRACTION, VOCAB_SIZES
from ki_ds.files import write_json
from ki_ds.jobs.chain import Job, local_places, run_jobs
from ki_ds.reports.figures import draw_curves, png_bytes
from ki_ds.reports.results import read_run
from ki_ds.reports.savings import Arm, Comparison, compare

INHERIT_STEPS = {"causal": (75, 150, 225, 300), "mlm": (125, 250, 375, 500)}


def jobs(
    folder: Path, task: str, seeds: Sequence[int], inherit_steps: Sequence[int], tau: float, teacher_steps: int | None
) -> list[Job]:
    """The teacher first, then every seed's runs; the arm is the part of the name before the slash."""
    recipe, corpus = f"handover_{task}.yaml", {"data.corpus": folder / "corpus"}
    longer: dict[str, object] = {} if teacher_steps is None else {"train.num_steps": teacher_steps}
    recipes = (recipe, f"handover_{task}_teacher.yaml")
    made = [Job("teacher", folder / "teacher", recipes, {**corpus, **longer, "seed": 100})]
    taught = {"teacher.path": folder / "teacher", "inherit.tau": tau}
    arms: dict[str, dict[str, object]] = {"none": {}, "auto": {**taught, "inherit.schedule": "auto"}}
    for steps in inherit_steps:
        arms[f"linear {steps}"] = {**taught, "inherit.schedule": "linear", "inherit.steps": steps}
    for seed in seeds:
        for arm, fields in arms.items():
            run_dir = folder / f"{arm.replace(' ', '_')}_seed{seed}"
            made.append(Job(f"{arm}/{seed}", run_dir, (recipe,), {**corpus, **fields, "seed": seed}))
    return made


def figures(arm: Arm, comparison: Comparison) -> dict[str, object]:
    """What the table says of an arm: every seed's figure, in the order of the seeds."""
    found: dict[str, object] = {"arm": arm.label, "final_ppl": [run.curve[-1].ppl for run in arm.runs]}
    if arm.inherits:
        pairs = comparison.savings[comparison.others.index(arm)]
        found["inherit_steps"] = [run.manifest["inherit"]["steps"] for run in arm.runs]
        found["steps_saved"] = [pair.saved.steps if pair.saved else None for pair in pairs]
        found["flops_saved"] = [pair.saved.flops_with_teacher if pair.saved else None for pair in pairs]
    return found


def table(rows: Sequence[dict], teacher_ppl: float) -> Table:
    """Means over seeds, smallest and largest in brackets."""
    made = Table(title=f"teacher: perplexity {teacher_ppl:.1f}", title_justify="left")
    titles = {"arm": "arm", "inherit_steps": "T_inherit", "final_ppl": "final perplexity"}
    titles |= {"steps_saved": "steps saved", "flops_saved": "FLOPs saved, teacher's forward counted"}
    for title in titles.values():
        made.add_column(title, justify="left" if title == "arm" else "right")
    for row in rows:
        made.add_row(*(_shown(name, row.get(name)) for name in titles))
    return made


def _shown(name: str, values: object) -> str:
    if not isinstance(values, list):
        return str(values or "")
    if name == "inherit_steps" and None in values:
        values = [value for value in values if value is not None]
        if not values:
            return "never handed over"
    if None in values:
        return f"{values.count(None)} of {len(values)} never got there"
    form = {"final_ppl": "{:.1f}", "inherit_steps": "{:.0f}"}.get(name, "{:.1%}")
    mean, low, high = (form.format(f(values)) for f in (statistics.fmean, min, max))
    return mean if low == high else f"{mean} ({low} to {high})"


@ends_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(INHERIT_STEPS), default="causal")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm, seeds 1 to N")
    parser.add_argument("--inherit_steps", type=int, nargs="+", help="T_inherit of the linear arms")
    parser.add_argument("--teacher_steps", type=int, help="another number of steps for the teacher")
    parser.add_argument("--tau", type=float, default=1.0, help="temperature of all arms")
    parser.add_argument("--out", type=Path, help="folder; runs/handover_TASK")
    arguments = parser.parse_args()
    for name in ("seeds", "teacher_steps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} is not positive; give at least 1")
    folder = arguments.out or Path("runs") / f"handover_{arguments.task}"
    steps = arguments.inherit_steps or INHERIT_STEPS[arguments.task]
    spec = TokenizerSpec(vocab_size=VOCAB_SIZES[arguments.task])
    build_store([gensim_dump_path()], spec, folder / "corpus", valid_fraction=VALID_FRACTION)
    planned = jobs(folder, arguments.task, range(1, arguments.seeds + 1), steps, arguments.tau, arguments.teacher_steps)
    run_jobs(planned, local_places(1))
    (comparison,) = compare([read_run(f"{job.name.split('/')[0]}={job.run_dir}") for job in planned[1:]])
    rows = [figures(arm, comparison) for arm in comparison.arms]
    write_json(folder / "comparison.json", {"arms": rows})
    (folder / "comparison.png").write_bytes(png_bytes(draw_curves(comparison)))
    teacher_ppl = json.loads((folder / "teacher" / "best" / "valid.json").read_text(encoding="utf-8"))["ppl"]
    Console().print(table(rows, teacher_ppl))


if __name__ == "__main__":
    sys.exit(main())
