"""What a comparison of runs looks like: a table, a CSV, and one HTML page that needs no network."""

from __future__ import annotations

import csv
import html
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ki_ds.errors import UserError
from ki_ds.figures import draw_curves, draw_training, png_bytes, svg_text
from ki_ds.savings import Arm, Comparison, Costs, Run, Savings, compare, costs_to_reach, read_run

if TYPE_CHECKING:
    pass


# --- the table --------------------------------------------------------------------------------------------------

COLUMNS = ("", "steps", "FLOPs, student only", "FLOPs with teacher", "time", "final perplexity")
SAVING = "  saving"  # first cell of the rows that state shares saved


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Cells of the table, COLUMNS wide: a row for the baseline, two (costs and savings) for every other arm."""
    if comparison.baseline is None:
        return [_last_row(arm) for arm in comparison.arms]
    spent = [costs_to_reach(run.curve, run.curve[-1].ppl) for run in comparison.baseline.runs]
    finals = [run.curve[-1].ppl for run in comparison.baseline.runs]
    rows = [(comparison.baseline.label, *_cost_cells(spent), _spread(finals, _ppl))]
    for arm, pairs in zip(comparison.others, comparison.savings, strict=True):
        cells = _cost_cells([pair.inheriting for pair in pairs])
        rows.append((arm.label, *cells, _spread([pair.final_ppl for pair in pairs], _ppl)))
        rows.append((SAVING, *_saving_cells(pairs, comparison.same_machine), _ppl_change(pairs)))
    return rows


def _last_row(arm: Arm) -> tuple[str, ...]:
    """An arm's costs at its end: there is no target."""
    cells = _cost_cells([run.curve[-1].costs for run in arm.runs])
    return (arm.label, *cells, _spread([run.curve[-1].ppl for run in arm.runs], _ppl))


def _cost_cells(costs: Sequence[Costs | None]) -> tuple[str, ...]:
    """Mean and spread of each cost; "not reached" as soon as one run did not get there: no mean over the others."""
    reached = [each for each in costs if each is not None]
    if len(reached) < len(costs):
        return (_not_reached(len(costs) - len(reached), len(costs)), "-", "-", "-")
    return (
        _spread([each.steps for each in reached], lambda value: f"{value:,.0f}"),
        _spread([each.student_flops for each in reached], _flops),
        _spread([each.flops_with_teacher for each in reached], _flops),
        _spread([each.seconds for each in reached], _duration),
    )


def _saving_cells(pairs: Sequence[Savings], same_machine: bool) -> tuple[str, ...]:
    saved = [pair.saved for pair in pairs if pair.saved is not None]
    if len(saved) < len(pairs):
        return (_not_reached(len(pairs) - len(saved), len(pairs)), "-", "-", "-")
    columns = [[getattr(each, f.name) for each in saved] for f in fields(Costs)]
    cells = [_spread(column, lambda value: f"{value:.1%}") for column in columns]
    return (*cells[:-1], cells[-1] if same_machine else "other machine")


def _not_reached(missing: int, total: int) -> str:
    return "not reached" if total == 1 else f"not reached in {missing} of {total}"


def _ppl_change(pairs: Sequence[Savings]) -> str:
    return _spread([pair.final_ppl / pair.target_ppl - 1 for pair in pairs], lambda value: f"{value:+.1%}")


def _spread(values: Sequence[float], show: Any) -> str:
    """The value, or mean ± sample standard deviation over several runs."""
    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.fmean(values))} ± {show(statistics.stdev(values)).lstrip('+')}"


def _ppl(value: float) -> str:
    return f"{value:.2f}"


def _flops(value: float) -> str:
    """With an SI prefix: 1.23 PFLOP."""
    for prefix, scale in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 7200 else f"{seconds / 60:.2f} min"


def caption(comparison: Comparison) -> str:
    """One sentence on what the costs of the table lead to."""
    if comparison.baseline is None:
        return "Costs up to the last validation"
    targets = [run.curve[-1].ppl for run in comparison.baseline.runs]
    spread = " (mean ± standard deviation over seeds)" if any(len(arm.runs) > 1 for arm in comparison.arms) else ""
    return f"Costs up to the self-learner's final validation perplexity of {_spread(targets, _ppl)}{spread}"


def text_table(comparison: Comparison) -> Table:
    """The table for a terminal, for rich to print; notes are its caption."""
    table = Table(title=caption(comparison), caption=escape("\n".join(comparison.notes)), title_justify="left")
    table.caption_justify = "left"
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for row in table_rows(comparison):
        saving = row[0] == SAVING
        table.add_row(*map(escape, row), end_section=saving, style="bold" if saving else None)
    return table


def csv_text(comparison: Comparison) -> str:
    """One line a run: costs up to the target, and the shares saved; empty cells where nothing can be stated."""
    names = [f.name for f in fields(Costs)]
    head = ["arm", "run", "seed", "status", "final_ppl", "target_ppl", *names, *(f"saved_{name}" for name in names)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for arm in comparison.arms:
        pairs = dict(zip(comparison.others, comparison.savings, strict=True)).get(arm)
        for index, run in enumerate(arm.runs):
            writer.writerow(_csv_row(arm, run, pairs[index] if pairs else None, comparison))
    return out.getvalue()


def _csv_row(arm: Arm, run: Run, pair: Savings | None, comparison: Comparison) -> list[object]:
    final = run.curve[-1].ppl
    target = pair.target_ppl if pair else (final if arm is comparison.baseline else None)
    costs = None if target is None else costs_to_reach(run.curve, target)
    saved = pair.saved if pair else None
    row: list[object] = [arm.label, run.name, run.seed, run.manifest["status"], final, target]
    for source in (costs, saved):
        row += [getattr(source, f.name) if source else None for f in fields(Costs)]
    if not comparison.same_machine:
        row[-1] = None
    return row


# --- the page ---------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --faint: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.saving { font-weight: 600; background: var(--faint); }
svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.notes { font-size: .9rem; }
@media print { body { max-width: none; margin: 0; } h2 { break-after: avoid; } svg, table { break-inside: avoid; } }
"""


def page(comparison: Comparison, curves_svg: str, training_svg: str) -> str:
    """One HTML page that needs nothing beside itself."""
    task = comparison.arms[0].runs[0].manifest["task"]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in comparison.notes)
    rows = table_rows(comparison)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Knowledge inheritance: {html.escape(headline(comparison))}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(headline(comparison))}</h1>
<div class="wide">{_html_table(COLUMNS, rows, caption(comparison))}</div>
<div class="notes">{notes}</div>
<h2>Validation perplexity ({html.escape(task)})</h2>
<p>Dotted: the self-learner's final perplexity; a ring marks where another arm first reached it.
Dashed: the teacher.</p>
{curves_svg}
<h2>Inheritance rate and losses during training</h2>
{training_svg}
<h2>Runs</h2>
<div class="wide">{_html_table(*_details(comparison), "")}</div>
</body></html>
"""


def headline(comparison: Comparison) -> str:
    """The main finding in one sentence."""
    if not comparison.others:
        return "Perplexity of " + ", ".join(arm.label for arm in comparison.arms)
    arm, pairs = comparison.others[0], comparison.savings[0]
    cells = _saving_cells(pairs, comparison.same_machine)
    if any(pair.saved is None for pair in pairs):
        return f"{arm.label}: the self-learner's final perplexity was {cells[0]}"
    return f"{arm.label}: {cells[2]} of the FLOPs saved with the teacher counted, {cells[0]} of the steps"


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> str:
    lines = [f"<table><caption>{html.escape(title)}</caption>" if title else "<table>"]
    lines.append("<thead><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr></thead><tbody>")
    for row in rows:
        kind = ' class="saving"' if row[0] == SAVING else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join(lines) + "</tbody></table>"


def _details(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(head, rows): a column for each run, so that many runs scroll sideways and facts read downwards."""
    runs = [(arm, run) for arm in comparison.arms for run in arm.runs]
    facts = [_facts(arm, run) for arm, run in runs]
    rows = [(key, *(each.get(key, "-") for each in facts)) for key in facts[0]]
    return ("", *(run.name for _, run in runs)), rows


def _facts(arm: Arm, run: Run) -> dict[str, str]:
    manifest, config, teachers = run.manifest, run.config, run.teachers
    end = run.curve[-1].costs
    return {
        "arm": arm.label,
        "seed": str(run.seed),
        "status": manifest["status"],
        "student parameters": f"{manifest['student']['num_parameters']:,}",
        "teachers for": ", ".join(_task_of(teacher) for teacher in teachers) or "-",
        "teacher parameters": ", ".join(f"{teacher['num_parameters']:,}" for teacher in teachers) or "-",
        "teacher perplexity": ", ".join(_ppl_of(teacher) for teacher in teachers) or "-",
        "teacher weights": ", ".join((teacher["weights_sha256"] or "-")[:12] for teacher in teachers) or "-",
        "alpha": str(config.get("inherit.schedule", "-")),
        "steps": f"{end.steps:,.0f}",
        "steps with teacher": f"{manifest.get('inheriting_steps', 0):,}",
        "sequences a step": str(config.get("train.global_batch_size", "-")),
        "tokens a sequence": str(config.get("data.seq_len", "-")),
        "peak learning rate": str(config.get("optim.lr", "-")),
        "time": _duration(end.seconds),
        "device": f"{manifest.get('world_size', '?')} x {manifest.get('device', '?')}",
        "data": manifest["data"].get("train_sha256", "-")[:12],
    }


def _task_of(teacher: dict[str, Any]) -> str:
    """Which rows a teacher was there for."""
    return "+".join(teacher.get("domains") or ["all rows"])


def _ppl_of(teacher: dict[str, Any]) -> str:
    return _ppl(teacher["valid_ppl"]) if teacher.get("valid_ppl") else "-"


def write_report(
    specs: Sequence[str | Path], out: str | Path = "report.html", *, allow_unfinished: bool = False
) -> Comparison:
    """Compare the runs and write OUT.html, OUT.png and OUT.csv; the comparison, for `text_table` to print.

    Args:
        specs: run folders, or LABEL=FOLDER.
        out: the page; the curves and the CSV get its name with their own suffix.
        allow_unfinished: take runs that have not come to their last step.

    Raises:
        UserError: a run cannot be read, the runs cannot be compared, or the files cannot be written.
    """
    comparison = compare([read_run(spec, allow_unfinished=allow_unfinished) for spec in specs])
    curves, training = draw_curves(comparison), draw_training(comparison)
    text = page(comparison, svg_text(curves, name="curves"), svg_text(training, name="training"))
    base = Path(out)
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        base.with_suffix(".png").write_bytes(png_bytes(curves))
        base.with_suffix(".csv").write_text(csv_text(comparison), encoding="utf-8")
        base.with_suffix(".html").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{base} cannot be written ({error.strerror}); give another place with --out") from None
    return comparison
