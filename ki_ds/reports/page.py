"""A comparison of runs as one HTML page that needs nothing beside itself: no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ki_ds.checkpoints import lineage
from ki_ds.reports.figures import draw_curves, draw_savings, draw_training, svg_text
from ki_ds.reports.results import Run
from ki_ds.reports.savings import Arm, Comparison
from ki_ds.reports.tables import MEANINGS, SAVING, Table, comparison_table, duration, findings, section_title

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


_PAGE = """\
{%- macro lines(text, tag) -%}
{% for line in text.split("\\n") %}{% if loop.first %}{{ line }}{% else %}<br/>\
{% if tag %}<{{ tag }}>{{ line }}</{{ tag }}>{% else %}{{ line }}{% endif %}{% endif %}{% endfor %}
{%- endmacro -%}
{%- macro table(data) -%}
<table>{% if data.title %}<caption>{{ data.title }}</caption>
{% endif %}<thead><tr>{% for cell in data.columns %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in data.rows %}<tr{% if row[0] == saving %} class="saving"{% endif %}>\
{% for cell in row %}<td>{{ lines(cell, "small") }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{%- endmacro -%}
{%- macro branch(tree) -%}
{% set first, _, others = tree.label.partition("\\n") %}<li><b>{{ first }}</b>\
{% if others %}<br/>{{ lines(others, "") }}{% endif %}\
{% if tree.children %}<ul>{% for child in tree.children %}{{ branch(child) }}{% endfor %}</ul>{% endif %}</li>
{%- endmacro -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>
<title>{{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1>
{% for section in sections %}
{% if sections|length > 1 %}<a href="#{{ section.name }}">{{ section.title }}</a>{% endif %}
<ul>{% for finding in section.findings %}<li>{{ finding }}</li>{% endfor %}</ul>
{% endfor %}
{% for section in sections %}
<section id="{{ section.name }}"><h2>{{ section.title }}</h2>
<div class="wide">{{ table(section.table) }}</div>
<div class="notes">{% for note in section.notes %}<p>{{ note }}</p>{% endfor %}</div>
{% for title, words, svg in section.figures %}
<h3>{{ title }}</h3><figure><svg role="img" aria-label="{{ title }}" {{ svg }}
<figcaption>{{ words }}</figcaption></figure>
{% endfor %}
<h3>Runs</h3>
{% for facts in section.facts %}<div class="wide runs">{{ table(facts) }}</div>
{% endfor %}
<h3>Lineage</h3>
{% for title, tree in section.lineages %}
<div class="lineage">{% if tree %}<p>{{ title }}</p><ul>{{ branch(tree) }}</ul>\
{% else %}<p>{{ title }}: no lineage record</p>{% endif %}</div>
{% endfor %}
</section>
{% endfor %}
<h2>What the figures mean</h2>
<div class="notes">{% for text in meanings %}<p>{{ text }}</p>{% endfor %}</div>
</body></html>
"""


def page(sections: Sequence[Comparison], *, title: str | None = None) -> str:
    """The whole page; it is well-formed XML, too."""
    template = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return template.render(
        title=title or default_title(sections),
        style=Markup(_STYLE),
        saving=SAVING,
        meanings=MEANINGS,
        sections=[_section(section, f"s{number}") for number, section in enumerate(sections, start=1)],
    )


def default_title(sections: Sequence[Comparison]) -> str:
    """What is compared with what."""
    heirs = any(arm.inherits for section in sections for arm in section.arms)
    what = "Knowledge inheritance" if heirs else "Runs compared"
    return f"{what}: {', '.join(f'{s.num_parameters:,}' for s in sections)} parameters"


def _section(section: Comparison, name: str) -> dict[str, Any]:
    """What the template shows of a comparison."""
    marks = "A ring marks where an arm first reached the target; dashed: the teacher, measured on the same rows."
    figures = [("Validation perplexity", f"Dotted: the target. {marks}", "curves", draw_curves(section))]
    if section.others:
        bars = "A dot for each run; with several seeds a bar for the 95% interval of the mean."
        figures.append(("Savings and final perplexity", bars, "savings", draw_savings(section)))
    training = draw_training(section)
    figures.append(("Inheritance rate and losses", _words_on_gaps(section), "training", training))
    runs = [(arm, run) for arm in section.arms for run in arm.runs]
    return {
        "name": name,
        "title": section_title(section),
        "findings": findings(section),
        "table": comparison_table(section),
        "notes": section.notes,
        "figures": [
            (title, words, Markup(svg_text(figure, name=f"{name}-{part}").removeprefix("<svg ")))
            for title, words, part, figure in figures
        ],
        "facts": [
            _facts_table(runs[first : first + COLUMNS_OF_RUNS]) for first in range(0, len(runs), COLUMNS_OF_RUNS)
        ],
        "lineages": [(run.title, run.lineage and lineage.tree(run.lineage)) for run in section.runs],
    }


def _words_on_gaps(section: Comparison) -> str:
    heirs = [run for run in section.runs if run.teachers]
    unknown = ", ".join(run.title for run in heirs if not run.teacher_gaps)
    if not heirs:
        return "Of the training batches."
    why = "it has no only teacher whose lineage says that it was measured on the same data with the same masks"
    missing = f" Not drawn for {unknown}: {why}." if unknown else ""
    return f"alpha, CE and KL of the training batches; the gap to the teacher on the validation data.{missing}"


def _facts_table(runs: Sequence[tuple[Arm, Run]]) -> Table:
    """A column for each run, so that facts read downwards."""
    facts = [_facts(arm, run) for arm, run in runs]
    return Table(("", *(run.title for _, run in runs)), [(key, *(own[key] for own in facts)) for key in facts[0]])


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
