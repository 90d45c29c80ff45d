import io
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from ki_ds.objective.types import LossOutput
from ki_ds.reports import metrics
from ki_ds.reports.metrics import Display, Figures, MetricsLog, Stopwatch, Totals, Window, perplexity, read_log

CPU = torch.device("cpu")
FIGURES = {"tokens_per_second": 12_345.6, "alpha": 0.75, "ce": 6.5432, "kl": 0.9876, "loss": 5.0, "lr": 5e-4}


def output(loss, ce, kl, rows, teachers=()):
    tensors = (torch.tensor(value, dtype=torch.float32) for value in (loss, ce, kl))
    return LossOutput(*tensors, torch.tensor(rows), *torch.tensor(teachers, dtype=torch.float32).view(-1, 4).unbind(1))


def closed(window):
    """What a window comes to at a line of metrics, two seconds after it began."""
    window.settle()
    return window.figures(2.0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    hand = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: hand.now))
    return hand


# --- sums ---


def test_a_window_gives_means_over_all_rows_not_over_batches():
    window = Window(CPU, num_teachers=1)
    weight = torch.tensor(3.0, requires_grad=True)
    first = LossOutput(weight * 2, torch.tensor(4.0), torch.tensor(1.0), torch.tensor(2), *torch.empty(4, 0))
    window.add(first, 10, teacher_tokens=[10])
    window.add(output(30.0, 20.0, 5.0, 8), 100)
    window.add(output(0.0, 0.0, 0.0, 0), 0, teacher_tokens=[0])
    found = closed(window)
    assert found.means == {"loss": 36 / 10, "ce": 24 / 10, "kl": 6 / 10}
    assert found.others["tokens_per_second"] == 55
    assert [told["tokens"] for told in found.teachers] == [10]


def test_a_window_averages_an_architectures_own_loss_over_micro_batches():
    window = Window(CPU)
    window.add(output(36.0, 24.0, 6.0, 10), 10, aux_loss=torch.tensor(1.0, requires_grad=True))
    window.add(output(2.0, 2.0, 0.0, 2), 10, aux_loss=torch.tensor(4.0))
    window.add(output(math.nan, 2.0, 0.0, 2), 10, aux_loss=torch.tensor(9.0))
    found = closed(window)
    assert found.others["aux_loss"] == 2.5
    assert found.means["loss"] == 38 / 12  # equation 2 alone
    window = Window(CPU)
    window.add(output(2.0, 2.0, 0.0, 2), 10)
    assert "aux_loss" not in closed(window).others


def test_a_window_tells_teachers_apart_by_their_own_rows_and_tokens():
    window = Window(CPU, num_teachers=3)
    window.add(output(1, 1, 1, 5, [[2.0, 6.0, 2, 8], [0] * 4, [1.0, math.nan, 1, 2]]), 50, teacher_tokens=[20, 0, 10])
    window.add(output(1, 1, 1, 5, [[4.0, 3.0, 1, 1], [0] * 4, [1.0, math.nan, 3, 2]]), 50, teacher_tokens=[10, 0, 30])
    window.add(output(1, 1, 0, 5), 50)  # alpha is 0
    found = closed(window)
    assert found.teachers == [
        {"kl": 2.0, "ce": 3.0, "teacher_ce": 3.0, "rows": 3, "tokens": 30},
        {"kl": 0, "ce": 0, "teacher_ce": 0, "rows": 0, "tokens": 0},
        {"kl": 0.5, "ce": 1.0, "rows": 4, "tokens": 40},
    ]
    assert found.others == {"tokens_per_second": 75}


def test_what_an_average_says_is_no_single_teachers():
    window = Window(CPU, num_teachers=2)
    window.add(output(1, 1, 1, 5, [[2.0, 6.0, 2, 1]]), 50, teacher_tokens=[50, 50])
    found = closed(window)
    assert [told["tokens"] for told in found.teachers] == [50, 50]
    assert [told["rows"] for told in found.teachers] == [0, 0]


def test_a_window_adds_up_in_float64():
    window = Window(CPU)
    window.add(output(2.0**24, 2.0**24, 0.0, 1), 1)
    for _ in range(5):
        window.add(output(1.0, 1.0, 0.0, 0), 1)
    assert closed(window).means["ce"] == 2.0**24 + 5  # float32 would have lost all five


def test_an_empty_window_divides_by_nothing():
    assert closed(Window(CPU)) == Figures({"loss": 0.0, "ce": 0.0, "kl": 0.0}, {"tokens_per_second": 0.0}, [])


def test_perplexity_is_the_exponential_of_the_mean():
    assert perplexity(30.0, 10) == math.exp(3)
    assert perplexity(699.0, 1) == math.exp(699)
    assert perplexity(1e6, 10) == math.inf


# --- time ---


def test_a_stopwatch_counts_only_while_it_runs(clock):
    watch = Stopwatch(1000.0)
    clock.now += 5
    assert watch.pause() == 1000.0
    watch.run()
    clock.now += 3
    assert watch.pause() == 1003.0
    clock.now += 50
    assert watch.pause() == 1003.0
    watch.run()
    clock.now += 4
    assert watch.pause() == 1007.0


def test_a_stopwatch_that_runs_already_loses_no_time(clock):
    """The loop says `run` after every step, and pauses only when a line of metrics is due."""
    watch = Stopwatch()
    for _ in range(10):
        watch.run()
        clock.now += 2
    assert watch.pause() == 20.0


# --- the log ---


def write_log(path, steps):
    log = MetricsLog(path, resume_step=0)
    for step in steps:
        log.write("train", Totals(step=step, tokens=step * 10), ce=1.5)
    return path


def test_a_record_is_the_totals_and_the_figures(tmp_path):
    path = write_log(tmp_path / "metrics.jsonl", [3])
    (record,) = read_log(path)
    totals = {"step": 3, "samples": 0, "tokens": 30, "student_flops": 0.0, "teacher_flops": 0.0, "seconds": 0.0}
    assert record == {"kind": "train", **totals, "ce": 1.5}


def test_records_of_a_part_that_is_done_again_are_dropped(tmp_path):
    path = write_log(tmp_path / "metrics.jsonl", [1, 2, 3, 4, 5])
    log = MetricsLog(path, resume_step=3)
    assert [r["step"] for r in read_log(path)] == [1, 2, 3]
    log.write("valid", Totals(step=4), ppl=7.0)
    assert [(r["kind"], r["step"]) for r in read_log(path)] == [("train", 1), ("train", 2), ("train", 3), ("valid", 4)]


def test_a_line_cut_by_a_crash_is_dropped_wherever_it_was_cut(tmp_path):
    path = write_log(tmp_path / "metrics.jsonl", [1, 2])
    whole = path.read_text()
    last = len(whole.splitlines()[0]) + 1
    for cut in range(last, len(whole) - 1):
        path.write_text(whole[:cut])
        log = MetricsLog(path, resume_step=2)
        log.write("train", Totals(step=2), ce=0.5)
        assert [r["step"] for r in read_log(path)] == [1, 2], whole[last:cut]
        assert read_log(path)[-1]["ce"] == 0.5


def test_other_ranks_write_no_log(tmp_path, monkeypatch):
    path = write_log(tmp_path / "metrics.jsonl", [1, 2])
    before = path.read_text()
    monkeypatch.setattr(metrics, "is_main", lambda: False)
    MetricsLog(path, resume_step=0).write("train", Totals(step=1))
    assert path.read_text() == before


# --- the display ---


def show(kind, clock):
    display = Display(kind, title="student", num_steps=40, start_step=10)
    display.validation(10, 98.765, {"corpus": 98.765})
    clock.now += 30
    for step in (11, 12):
        display.advance(step)
    display.figures(12, FIGURES)
    display.close()


@pytest.mark.parametrize("kind", ["lines", "auto"])
def test_plain_lines_carry_every_figure(kind, clock, capsys):
    show(kind, clock)  # auto: the captured output is no terminal
    valid, line = capsys.readouterr().out.splitlines()
    assert re.search(r"student step 10/40 .*valid ppl 98\.77$", valid)
    for words in ("student step 12/40", "12,346 tokens/s", "alpha 0.75", "ce 6.543", "kl 0.988", "lr 5.0e-04"):
        assert words in line
    assert "eta 420 s" in line  # 2 steps in 30 s, 28 to go
    assert line.endswith("valid ppl 98.77")


def test_none_prints_nothing(clock, capsys):
    show("none", clock)
    assert capsys.readouterr() == ("", "")


def test_other_ranks_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "is_main", lambda: False)
    for kind in ("bar", "lines", "auto"):
        show(kind, clock)
    assert capsys.readouterr() == ("", "")


def test_the_bar_carries_every_figure_and_leaves_the_terminal_in_order(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(metrics, "Console", lambda **_: Console(file=terminal, force_terminal=True, width=160))
    display = Display("bar", title="student", num_steps=40, start_step=10)
    display.validation(10, 98.765, {"corpus": 98.765})
    display.advance(12)
    display.figures(12, FIGURES)
    display.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    last = text[text.rindex("student") :]
    for words in ("12/40", "eta", "12,346 tokens/s", "alpha 0.75", "ce 6.543", "kl 0.988", "valid ppl 98.77"):
        assert words in last
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")  # the cursor is back


def test_totals_are_json():
    assert json.loads(json.dumps(Totals().__dict__)) == Totals().__dict__
