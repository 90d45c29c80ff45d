"""A comparison of runs as one HTML page that needs nothing beside itself: no network, no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from rich.tree import Tree

from ki_ds.checkpoints import lineage
from ki_ds.reports.figures import draw_curves, draw_savings, draw_training, svg_text
from ki_ds.reports.results import Run
from ki_ds.reports.savings import Arm, Comparison
from ki_ds.reports.tables import MEANINGS, SAVING, caption, columns, duration, findings, section_title, table_rows

COLUMNS_OF_RUNS = 6  # beside one another

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #8886; --faint: #8881; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; } a { color: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: .9rem; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } td small { opacity: .75; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
tr.saving { font-weight: 600; background: var(--faint); }
.runs table { width: auto; } figure { margin: 0; } figcaption, .notes { font-size: .9rem; }
svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.lineage ul { padding-left: 1.2rem; margin: .2rem 0; border-left: 1px solid var(--line); list-style: none; }
.lineage { font-size: .9rem; overflow-wrap: anywhere; }
@page { margin: 12mm; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; font-size: 10pt; }
  body { max-width: none; margin: 0; padding: 0; font-size: 1rem; }
  table { font-size: 7.5pt; } th, td { padding: .2rem .3rem; } .wide { overflow: visible; }
  h2, h3 { break-after: avoid; } figure, tr, .lineage li { break-inside: avoid; }
}
"""


def page(sections: Sequence[Comparison], *, title: str | None = None) -> str:
    """The whole page; it is well-formed XML, too."""
    shown = html.escape(title or default_title(sections))
    parts = [_section(section, f"s{number}") for number, section in enumerate(sections, start=1)]
    meanings = "".join(f"<p>{html.escape(text)}</p>" for text in MEANINGS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>
<title>{shown}</title><style>{_STYLE}</style></head><body>
<h1>{shown}</h1>
{_summary(sections)}
{"".join(parts)}
<h2>What the figures mean</h2>
<div class="notes">{meanings}</div>
</body></html>
"""


def default_title(sections: Sequence[Comparison]) -> str:
    """What is compared with what."""
    heirs = any(arm.inherits for section in sections for arm in section.arms)
    what = "Knowledge inheritance" if heirs else "Runs compared"
    return f"{what}: {', '.join(f'{s.num_parameters:,}' for s in sections)} parameters"


def _summary(sections: Sequence[Comparison]) -> str:
    items = []
    for number, section in enumerate(sections, start=1):
        found = "".join(f"<li>{html.escape(finding)}</li>" for finding in findings(section))
        head = f'<a href="#s{number}">{html.escape(section_title(section))}</a>' if len(sections) > 1 else ""
        items.append(f"{head}<ul>{found}</ul>")
    return "\n".join(items)


def _section(section: Comparison, name: str) -> str:
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in section.notes)
    curves = svg_text(draw_curves(section), name=f"{name}-curves")
    marks = "A ring marks where an arm first reached the target; dashed: the teacher, measured on the same rows."
    parts = [
        f'<section id="{name}"><h2>{html.escape(section_title(section))}</h2>',
        f'<div class="wide">{_table(columns(section), table_rows(section), caption(section))}</div>',
        f'<div class="notes">{notes}</div>',
        _figure("Validation perplexity", f"Dotted: the target. {marks}", curves),
    ]
    if section.others:
        bars = "A dot for each run; with several seeds a bar for the 95% interval of the mean."
        saved = svg_text(draw_savings(section), name=f"{name}-savings")
        parts.append(_figure("Savings and final perplexity", bars, saved))
    training = svg_text(draw_training(section), name=f"{name}-training")
    parts.append(_figure("Inheritance rate and losses", _words_on_gaps(section), training))
    parts += ["<h3>Runs</h3>", *_details(section), "<h3>Lineage</h3>", *map(_lineage, section.runs), "</section>"]
    return "\n".join(parts)


def _words_on_gaps(section: Comparison) -> str:
    heirs = [run for run in section.runs if run.teachers]
    unknown = ", ".join(run.title for run in heirs if not run.teacher_gaps)
    if not heirs:
        return "Of the training batches."
    why = "it has no only teacher whose lineage says that it was measured on the same data with the same masks"
    missing = f" Not drawn for {unknown}: {why}." if unknown else ""
    return f"alpha, CE and KL of the training batches; the gap to the teacher on the validation data.{missing}"


def _figure(title: str, words: str, svg: str) -> str:
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
    return f"<h3>{html.escape(title)}</h3><figure>{named}\n<figcaption>{html.escape(words)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> str:
    lines = [f"<table><caption>{html.escape(title)}</caption>" if title else "<table>"]
    lines.append("<thead><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr></thead><tbody>")
    for row in rows:
        kind = ' class="saving"' if row[0] == SAVING else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join(lines) + "</tbody></table>"


def _cell(text: str) -> str:
    first, *others = html.escape(text).split("\n")
    return first + "".join(f"<br/><small>{line}</small>" for line in others)


# --- runs and their lineage -------------------------------------------------------------------------------------


def _details(section: Comparison) -> list[str]:
    """Tables with a column for each run, so that facts read downwards."""
    runs = [(arm, run) for arm in section.arms for run in arm.runs]
    parts = [runs[first : first + COLUMNS_OF_RUNS] for first in range(0, len(runs), COLUMNS_OF_RUNS)]
    return [f'<div class="wide runs">{_facts_table(part)}</div>' for part in parts]


def _facts_table(runs: Sequence[tuple[Arm, Run]]) -> str:
    facts = [_facts(arm, run) for arm, run in runs]
    rows = [(key, *(each.get(key, "-") for each in facts)) for key in facts[0]]
    return _table(("", *(run.title for _, run in runs)), rows)


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
        "teacher perplexity, own validation": ", ".join(_ppl_of(teacher) for teacher in teachers) or "-",
        "teacher weights": ", ".join((teacher["weights_sha256"] or "-")[:12] for teacher in teachers) or "-",
        "alpha": str(config.get("inherit.schedule", "-")),
        "steps": f"{end.steps:,.0f}",
        "steps with teacher": f"{manifest.get('inheriting_steps', 0):,}",
        "tokens": f"{end.tokens:,.0f}",
        "sequences a step": str(config.get("train.global_batch_size", "-")),
        "tokens a sequence": str(config.get("data.seq_len", "-")),
        "peak learning rate": str(config.get("optim.lr", "-")),
        "time": duration(end.seconds),
        "device": f"{manifest.get('world_size', '?')} x {manifest.get('device', '?')}",
        "training data": manifest["data"].get("train_sha256", "-")[:12],
        "validation data": manifest["data"].get("valid_sha256", "-")[:12],
    }


def _task_of(teacher: dict[str, Any]) -> str:
    """Which rows a teacher was there for."""
    return "+".join(teacher.get("domains") or ["all rows"])


def _ppl_of(teacher: dict[str, Any]) -> str:
    return f"{teacher['valid_ppl']:.2f}" if teacher.get("valid_ppl") else "-"


def _lineage(run: Run) -> str:
    """The run, and below it what taught it or started it, and so on."""
    if run.lineage is None:
        return f'<div class="lineage"><p>{html.escape(run.title)}: no lineage record</p></div>'
    return f'<div class="lineage"><p>{html.escape(run.title)}</p><ul>{_branch(lineage.tree(run.lineage))}</ul></div>'


def _branch(tree: Tree) -> str:
    first, *others = html.escape(str(tree.label)).split("\n")
    below = "".join(map(_branch, tree.children))
    told = f"<b>{first}</b>" + "".join(f"<br/>{line}" for line in others)
    return f"<li>{told}{f'<ul>{below}</ul>' if below else ''}</li>"
