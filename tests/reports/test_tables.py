"""What the table, the findings and the CSV say, from curves with known answers."""

import csv
import io
import math

import pytest

from ki_ds.reports.results import read_run
from ki_ds.reports.savings import compare
from ki_ds.reports.tables import SHARE, Unit, comparison_table, csv_text, duration, findings, shown
from tests.fake_runs import DATA, teacher_record, write_run


def one(*runs):
    (section,) = compare(runs)
    return section


def seeds(tmp_path, ppls):
    """Runs of {(kind, seed): perplexities}."""
    return [
        read_run(write_run(tmp_path / f"{kind}{seed}", curve, seed=seed, inherits=kind == "ki"))
        for (kind, seed), curve in ppls.items()
    ]


def test_table_of_two_runs(tmp_path):
    alone = read_run(write_run(tmp_path / "self", [400, 100, 60, 50]))
    heir = read_run(write_run(tmp_path / "ki", [400, 80, 50, 45], teacher=teacher_record(flops=1.152e7)))
    section = one(heir, alone)  # the order does not matter
    rows = comparison_table(section).rows
    assert [row[0] for row in rows] == ["self-learning", "inheriting", "  saving"]
    assert [row[1] for row in rows] == ["300", "200", "33.3%"]
    # 1 - 2/3 * 6500/6000 = 27.8%; the teacher's training costs a tenth of the baseline's 115.2 MFLOP more
    assert rows[2][2:] == ("33.3%", "27.8%", "17.8%", "33.3%", "-10.0%")
    assert [row[5] for row in rows[:2]] == ["10.00 min", "6.67 min"]
    assert [row[6] for row in rows[:2]] == ["50.00", "45.00"]
    assert all(len(row) == len(comparison_table(section).columns) for row in rows)
    assert "50.00" in comparison_table(section).title


def test_not_reached_is_said_and_no_number_made_up(tmp_path):
    alone = read_run(write_run(tmp_path / "self", [400, 100, 50]))
    heir = read_run(write_run(tmp_path / "ki", [400, 120, 55], inherits=True))
    section = one(alone, heir)
    rows = comparison_table(section).rows
    assert rows[1][1:6] == rows[2][1:6] == ("not reached", "-", "-", "-", "-")
    assert rows[2][6] == "+10.0%"
    assert findings(section) == [
        "inheriting: the self-learner's final perplexity was not reached; final perplexity 55.00 (+10.0% against the "
        "self-learner's)"
    ]


def test_one_seed_of_two_not_reached_gives_no_mean(tmp_path):
    ends = {("self", 1): 50, ("self", 2): 50, ("ki", 1): 40, ("ki", 2): 60}
    section = one(*seeds(tmp_path, {key: [400, 100, end] for key, end in ends.items()}))
    rows = comparison_table(section).rows
    assert rows[2][1] == "not reached in 1 of 2"
    assert rows[0][6] == "50.00"  # both alike: no spread to show
    assert rows[2][6] == "+0.0 ± 254.1%\n-20.0 to +20.0%"  # t(0.975, 1) = 12.706, times 0.2


def test_mean_and_interval_over_seeds_paired_by_seed(tmp_path):
    ppls = {("self", 1): [400, 100, 64, 50], ("self", 2): [400, 100, 64, 60]}
    ppls |= {("ki", 1): [400, 50, 45, 40], ("ki", 2): [400, 100, 60, 45]}
    section = one(*seeds(tmp_path, ppls))
    assert [pair.target_ppl for pair in section.savings[0]] == [50, 60]
    half = 12.7062 * (1 / 3) / 2  # t, the standard deviation (1/3) / sqrt 2, over sqrt 2
    assert comparison_table(section).rows[2][1] == f"50.0 ± {100 * half:.1f}%\n33.3 to 66.7%"
    assert "own seed" in comparison_table(section).title
    assert f"50.0 ± {100 * half:.1f}% of the steps" in findings(section)[0]


def test_unknown_ancestors_are_unknown(tmp_path):
    alone = read_run(write_run(tmp_path / "self", [400, 100, 50]))
    heir = read_run(write_run(tmp_path / "ki", [400, 50, 45], inherits=True))
    section = one(alone, heir)
    assert [row[4] for row in comparison_table(section).rows] == ["76.8 MFLOP", "unknown", "unknown"]
    assert any("No lineage record of all ancestors: ki" in note for note in section.notes)


def test_times_of_different_machines_are_not_compared(tmp_path):
    alone = read_run(write_run(tmp_path / "self", [400, 100, 50]))
    heir = read_run(write_run(tmp_path / "ki", [400, 50, 45], inherits=True, world_size=1))
    section = one(alone, heir)
    assert comparison_table(section).rows[2][5] == "other machine"
    assert any("their times are not compared" in note for note in section.notes)
    assert read_csv(section)[1]["saved_seconds"] == ""
    assert read_csv(section)[1]["saved_steps"] == "0.5"


def test_domains_have_columns(tmp_path):
    alone = read_run(write_run(tmp_path / "self", [400, 50], domains={"wb": [30, 40], "cs": [400, 50]}))
    heir = read_run(write_run(tmp_path / "ki", [400, 45], domains={"wb": [30, 44], "cs": [400, 45]}, inherits=True))
    section = one(alone, heir)
    assert comparison_table(section).columns[-2:] == ("wb", "cs")
    assert [row[-2:] for row in comparison_table(section).rows] == [
        ("40.00", "50.00"),
        ("44.00", "45.00"),
        ("+10.0%", "-10.0%"),
    ]
    assert [(row["ppl_wb"], row["ppl_cs"]) for row in read_csv(section)] == [("40", "50"), ("44", "45")]


def test_numbers():
    assert duration(7199) == "119.98 min"
    assert duration(7200) == "2.0 h"
    assert shown([0.5], SHARE) == "50.0%"
    assert shown([math.nan, 1.0], SHARE) == "unknown"
    assert Unit(1e12, None, "").show(1234567e9) == "1230"


def read_csv(*sections):
    return list(csv.DictReader(io.StringIO(csv_text(sections))))


def test_a_line_for_every_run_of_every_section(tmp_path):
    size = {"num_parameters": 9000, "dense_parameters": 9000}
    runs = [read_run(write_run(tmp_path / "small", [400, 100, 80]))]
    runs.append(read_run(write_run(tmp_path / "large", [400, 60, 40], student=size)))
    teacher = teacher_record(flops=1e6, ppl=50.0, data=DATA | {"train_sha256": "9" * 64})
    runs.append(read_run(write_run(tmp_path / "ki", [400, 40, 30], teacher=teacher, student=size)))
    small, large, heir = read_csv(*compare(runs))
    assert [row["run"] for row in (small, large, heir)] == ["small", "large", "ki"]
    assert [row["student_parameters"] for row in (small, large, heir)] == ["1000", "9000", "9000"]
    assert (large["arm"], large["steps"], large["saved_steps"]) == ("self-learning", "200.0", "")
    assert (heir["target_ppl"], heir["saved_steps"], heir["end_steps"]) == ("40", "0.5", "200")
    spent = 6.0 * 1000 * 64 * 100 + 2.0 * 250 * 64 * 100  # the fake's own figures, whatever its size
    assert float(heir["flops_with_ancestors"]) == pytest.approx(spent + 1e6)
    assert float(heir["gap_to_teacher"]) == pytest.approx(math.log(30 / 50))
    assert float(heir["ppl_change"]) == pytest.approx(-0.25)
    assert heir["path"] == str(tmp_path / "ki")
