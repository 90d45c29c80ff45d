"""The report of finished runs: tables for a terminal, a CSV, a picture, and one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rich.table
from rich.console import Group
from rich.markup import escape
from rich.text import Text

from ki_ds.errors import UserError
from ki_ds.reports.figures import draw_curves, png_bytes
from ki_ds.reports.page import page
from ki_ds.reports.results import read_run
from ki_ds.reports.savings import Comparison, compare
from ki_ds.reports.tables import MEANINGS, SAVING, comparison_table, csv_text, section_title


def text_table(sections: Sequence[Comparison]) -> Group:
    """A table for each section, for rich to print; notes are its caption, and what the figures mean stands last."""
    return Group(*map(_section_table, sections), *map(Text, MEANINGS))


def _section_table(section: Comparison) -> rich.table.Table:
    table = comparison_table(section)
    drawn = rich.table.Table(
        title=f"{section_title(section)}\n{table.title}",
        caption=escape("\n".join(section.notes)),
        title_justify="left",
        caption_justify="left",
    )
    for column in table.columns:
        drawn.add_column(escape(column), justify="right" if column else "left")
    for row in table.rows:
        saving = row[0] == SAVING
        drawn.add_row(*map(escape, row), end_section=saving, style="bold" if saving else None)
    return drawn


def write_report(
    specs: Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    title: str | None = None,
    allow_unfinished: bool = False,
) -> tuple[Comparison, ...]:
    """Compare the runs and write OUT.html, OUT.png and OUT.csv; the comparisons, for `text_table` to print.

    Args:
        specs: run folders, or LABEL=FOLDER.
        out: the page; the curves and the CSV get its name with their own suffix.
        title: of the page; by default it names the sizes.
        allow_unfinished: take runs that have not come to their last step.

    Raises:
        UserError: a run cannot be read, the runs cannot be compared, or the files cannot be written.
    """
    sections = compare([read_run(spec, allow_unfinished=allow_unfinished) for spec in specs])
    base = Path(out)
    files = {
        ".png": png_bytes(draw_curves(*sections)),
        ".csv": csv_text(sections).encode(),
        ".html": page(sections, title=title).encode(),
    }
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for suffix, content in files.items():
            base.with_suffix(suffix).write_bytes(content)
    except OSError as error:
        raise UserError(f"{base} cannot be written ({error.strerror}); give another place with --out") from None
    return sections
