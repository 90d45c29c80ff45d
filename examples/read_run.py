#!/usr/bin/env python3
"""Reading runs: what each validation had cost, and what the second run saved. usage: read_run.py RUN [RUN]"""

import sys

from ki_ds.reports.results import read_run
from ki_ds.reports.savings import costs_to_reach

runs = [read_run(folder) for folder in sys.argv[1:]]
for run in runs:
    print(f"{run.name}: {run.manifest['student']['num_parameters']:,} parameters, seed {run.seed}")
    for point in run.curve:
        costs = point.costs
        print(f"  step {costs.steps:6.0f}  {costs.flops_with_teacher:9.3e} FLOPs  perplexity {point.ppl:8.2f}")

if len(runs) == 2:
    alone, inheriting = runs
    goal = alone.curve[-1].ppl
    reached = costs_to_reach(inheriting.curve, goal)
    if reached is None:
        print(f"{inheriting.name} never reaches {goal:.2f}")
    else:
        saved = reached.saved_against(alone.curve[-1].costs)
        print(f"{goal:.2f} after {reached.steps:.0f} steps: {saved.flops_with_teacher:.0%} of the FLOPs saved")
