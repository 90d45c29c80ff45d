"""Finished runs compared at equal perplexity: arms, and what inheriting saved (section 3.1, footnote 1).

The self-learner's final validation perplexity is the target; what counts is what the inheriting student had spent when
it first got there: steps, FLOPs (alone, with the teacher's forward, with all that came before) and time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ki_ds.config import is_operational
from ki_ds.errors import UserError
from ki_ds.reports.results import Costs, Curve, Point, Run, validation_data, with_titles

TRAINING_FLOPS = 6  # per parameter and token: forward 2, backward 4 (Kaplan et al. 2020, as footnote 3 counts)
FORWARD_FLOPS = 2


# --- formulas and curves ----------------------------------------------------------------------------------------


def flops_saved_with_teacher(step_saving: float, *, student_params: float, teacher_params: float) -> float:
    """Share of the FLOPs saved when a share of the steps is saved and the teacher's forward runs in all others.

    A student costs 6 P_S FLOPs a token, its teacher's forward 2 P_T. Source: footnote 3, where 27.3% of the steps
    becomes 18.7% for P_S = 355M and P_T = 125M.
    """
    student, teacher = TRAINING_FLOPS * student_params, FORWARD_FLOPS * teacher_params
    return 1 - (1 - step_saving) * (student + teacher) / student


def costs_to_reach(curve: Sequence[Point], ppl: float) -> Costs | None:
    """Costs at the first crossing of `ppl`, linear in log-perplexity between two validations; None if never reached."""
    before: Point | None = None
    for point in curve:
        if point.ppl <= ppl:
            if before is None or not math.isfinite(before.ppl):
                return point.costs
            span = math.log(before.ppl) - math.log(point.ppl)
            return before.costs.toward(point.costs, (math.log(before.ppl) - math.log(ppl)) / span)
        before = point
    return None


def steps_to_reach(curve: Sequence[Point], ppl: float) -> float | None:
    """Steps at the first crossing of `ppl`, as `costs_to_reach` finds it; None if never reached."""
    costs = costs_to_reach(curve, ppl)
    return None if costs is None else costs.steps


@dataclass(frozen=True)
class Savings:
    """One run against one self-learning run, at the latter's final perplexity."""

    baseline: Costs
    inheriting: Costs | None  # None: the target was not reached
    baseline_end: Point
    end: Point

    @property
    def target_ppl(self) -> float:
        return self.baseline_end.ppl

    @property
    def final_ppl(self) -> float:
        return self.end.ppl

    @property
    def saved(self) -> Costs | None:
        """Shares of the baseline's costs saved; None if the target was not reached."""
        return None if self.inheriting is None else self.inheriting.saved_against(self.baseline)

    @property
    def ppl_change(self) -> float:
        """Final perplexity against the baseline's: -0.1 is 10% lower. Needs no crossing."""
        return self.final_ppl / self.target_ppl - 1

    @property
    def domain_changes(self) -> dict[str, float]:
        """As `ppl_change`, for each domain that both were measured on."""
        before = self.baseline_end.domains
        return {name: ppl / before[name] - 1 for name, ppl in self.end.domains.items() if name in before}


def savings(baseline: Curve, inheriting: Curve) -> Savings:
    """What `inheriting` saved on the way to the final perplexity of `baseline`.

    Both are charged up to their first crossing of it: a baseline that had been there before its end gets no blame
    for the rest.
    """
    spent = costs_to_reach(baseline, baseline[-1].ppl)
    assert spent is not None
    return Savings(spent, costs_to_reach(inheriting, baseline[-1].ppl), baseline[-1], inheriting[-1])


# --- arms, comparison -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in their seed only."""

    label: str
    runs: tuple[Run, ...]

    @property
    def inherits(self) -> bool:
        return bool(self.runs[0].teachers)


@dataclass(frozen=True)
class Comparison:
    """Arms of equal task, student size and validation; `savings[i]` has one entry for each run of `others[i]`."""

    task: str
    num_parameters: int
    arms: tuple[Arm, ...]
    baseline: Arm | None  # the first arm that learnt alone
    others: tuple[Arm, ...]  # all but the baseline, if there is one
    savings: tuple[tuple[Savings, ...], ...]
    same_machine: bool  # else times say nothing
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs]

    @property
    def domains(self) -> list[str]:
        """Names of the domains that some run was measured on, where there are several."""
        return list(dict.fromkeys(name for run in self.runs for name in run.curve[-1].domains))


def compare(runs: Sequence[Run]) -> tuple[Comparison, ...]:
    """A comparison for each task and student size, small ones first: its arms, and savings against its baseline.

    A run is compared with the baseline of its own seed, or with the first baseline where no seed fits.

    Raises:
        UserError: runs were measured on different data, or cannot be told apart.
    """
    if not runs:
        raise UserError("no run was given; give at least one run folder")
    _check_comparable(runs)
    runs, notes = _with_common_measure(with_titles(runs))
    tasks = list(dict.fromkeys(run.manifest["task"] for run in runs))
    groups: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        size = run.manifest["student"]["num_parameters"]
        groups.setdefault((tasks.index(run.manifest["task"]), size), []).append(run)
    return tuple(
        _compare_arms(tasks[task], size, groups[task, size], notes if number == 0 else [])
        for number, (task, size) in enumerate(sorted(groups))
    )


def _compare_arms(task: str, num_parameters: int, runs: Sequence[Run], notes: Sequence[str]) -> Comparison:
    arms = _arms(runs)
    baseline = next((arm for arm in arms if not arm.inherits), None)
    others = tuple(arm for arm in arms if baseline and arm is not baseline)
    pairs = tuple(
        tuple(savings(_partner(baseline, run).curve, run.curve) for run in arm.runs) for arm in others if baseline
    )
    same_machine = len({(run.manifest.get("device"), run.manifest.get("world_size")) for run in runs}) == 1
    found = (*notes, *_notes(runs, baseline, others, same_machine))
    return Comparison(task, num_parameters, arms, baseline, others, pairs, same_machine, found)


def _partner(baseline: Arm, run: Run) -> Run:
    return next((other for other in baseline.runs if other.seed == run.seed), baseline.runs[0])


def _check_comparable(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        a, b = (_comparability(each.manifest) for each in (first, run))
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                raise UserError(
                    f"{first.path} and {run.path} cannot be compared: {key} is {_short(a.get(key))} and "
                    f"{_short(b.get(key))}; give runs of the same tokenizer, validation data and masks"
                )


def _comparability(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be equal between two runs for their perplexities to be comparable."""
    parts = {"data": validation_data(manifest), "valid_masks": manifest["valid_masks"]}
    return {f"{part}.{key}": value for part, facts in parts.items() for key, value in facts.items()}


def _with_common_measure(runs: Sequence[Run]) -> tuple[Sequence[Run], list[str]]:
    """The runs, with perplexities of all domains where each one's own are of domains that others are not measured by.

    And a line that says so.
    """
    measures = {run.measured_domains for run in runs}
    if len(measures) == 1 and frozenset() not in measures:
        return runs, []
    note = "The runs train on different domains: perplexities are of all validation domains together."
    return [run.measured_on_all_domains() for run in runs], [note]


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def _identity(run: Run) -> dict[str, Any]:
    """What tells two arms apart: every field that changes the training, but the seed; its data; its teachers."""
    identity = {key: value for key, value in run.config.items() if not (is_operational(key) or _is_compared(key))}
    identity["training data"] = _short(run.manifest["data"].get("train_sha256"))
    sizes = [teacher["num_parameters"] for teacher in run.teachers]
    records = [teacher.get("lineage") or {"data": {}} for teacher in run.teachers]
    facts = {"teacher.num_parameters": sizes}
    facts["teacher's training data"] = [_short(record["data"].get("train_sha256")) for record in records]
    return identity | {key: found if len(found) > 1 else found[0] for key, found in facts.items() if found}


def _is_compared(key: str) -> bool:
    """Whether a field of the configuration is no difference: the seed, and paths of validation data equal by hash."""
    return key in ("seed", "data.valid") or key.startswith("data.valid.")


def _arms(runs: Sequence[Run]) -> tuple[Arm, ...]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label or json.dumps(_identity(run), sort_keys=True, default=str), []).append(run)
    for group in groups.values():
        _check_seeds(group)
    return tuple(Arm(_label(group[0], list(groups.values())), tuple(group)) for group in groups.values())


def _check_seeds(group: list[Run]) -> None:
    seen: dict[int, Run] = {}
    for run in group:
        if bool(run.teachers) != bool(group[0].teachers):
            raise UserError(
                f"{group[0].path} and {run.path} are both labelled {run.label}, and only one of them inherits; give "
                "them different labels"
            )
        if run.seed in seen:
            raise UserError(
                f"{seen[run.seed].path} and {run.path} have the same configuration and seed {run.seed}; "
                "give one of them, or label the arms: LABEL=RUN"
            )
        seen[run.seed] = run


def _label(run: Run, groups: list[list[Run]]) -> str:
    """The user's label; else the kind, with the fields that tell it from other arms of its kind."""
    if run.label:
        return run.label
    kind = "inheriting" if run.teachers else "self-learning"
    peers = [_identity(group[0]) for group in groups if bool(group[0].teachers) == bool(run.teachers)]
    own = _identity(run)
    parts = [f"{key}={value}" for key, value in own.items() if any(peer.get(key) != value for peer in peers)]
    return f"{kind} ({', '.join(parts)})" if parts else kind


def _notes(runs: Sequence[Run], baseline: Arm | None, others: Sequence[Arm], same_machine: bool) -> Iterator[str]:
    """What a reader must know to take the figures for what they are."""
    if baseline is None:
        yield "No self-learning run was given, so no saving can be stated."
    if unfinished := [run.title for run in runs if run.manifest["status"] != "finished"]:
        yield f"Not finished: {', '.join(unfinished)}; their final perplexity is the one so far."
    if not same_machine:
        yield "The runs used different machines or numbers of ranks, so their times are not compared."
    if len({run.manifest["data"].get("train_sha256") for run in runs}) > 1:
        yield "The runs do not all train on the same data."
    for arm in others:
        strangers = [run for run in arm.runs if baseline and run.seed != _partner(baseline, run).seed]
        if baseline and strangers:
            seeds = ", ".join(str(run.seed) for run in strangers)
            yield f"{arm.label}: no {baseline.label} run has seed {seeds}; compared with seed {baseline.runs[0].seed}."
    if unknown := [run.title for run in runs if math.isnan(run.curve[-1].costs.flops_with_ancestors)]:
        yield f"No lineage record of all ancestors: {', '.join(unknown)}; what was spent on them is not known."
