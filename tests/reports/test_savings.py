"""Savings from curves with known answers; sections, arms, and which runs say something about each other."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_ds.errors import UserError
from ki_ds.reports.results import Costs, Point, read_run
from ki_ds.reports.savings import compare, costs_to_reach, flops_saved_with_teacher, savings, steps_to_reach
from tests.fake_runs import DATA, STUDENT, TEACHER, TOKENS, points, teacher_record, write_run


def test_paper_footnote_on_flops_with_the_teacher_counted():
    """LARGE has at 55k steps what BASE -> LARGE has at 40k: 27.3% of the steps, 18.7% with the teacher's forward."""
    step_saving = 1 - 40_000 / 55_000
    assert round(100 * step_saving, 1) == 27.3
    saved = flops_saved_with_teacher(step_saving, student_params=355e6, teacher_params=125e6)
    assert round(100 * saved, 1) == 18.7


def test_paper_footnote_from_two_curves():
    def curve(steps, ppls, teacher):
        flops = [(6 * 355e6 * s, (6 * 355e6 + 2 * teacher) * s) for s in steps]
        return [Point(Costs(s, s, own, both, both, s), p) for s, (own, both), p in zip(steps, flops, ppls, strict=True)]

    saved = savings(curve([0, 55_000], [50, 4.28], 0), curve([0, 40_000, 60_000], [50, 4.28, 4.0], 125e6)).saved
    assert [round(100 * part, 1) for part in (saved.steps, saved.student_flops, saved.flops_with_teacher)] == [
        27.3,
        27.3,
        18.7,
    ]


def test_interpolates_in_log_perplexity():
    assert steps_to_reach(points([100, 25]), 50) == pytest.approx(50)
    costs = costs_to_reach(points([100, 25], taught_steps=100), 50)
    assert costs.seconds == pytest.approx(100)
    assert costs.flops_with_teacher == pytest.approx(50 * TOKENS * (6 * STUDENT + 2 * TEACHER))


def test_first_crossing_counts():
    assert steps_to_reach(points([100, 40, 60, 30]), 40) == 100
    assert steps_to_reach(points([30, 40]), 35) == 0


def test_never_reached_is_none():
    assert steps_to_reach(points([100, 40]), 39.9) is None
    assert steps_to_reach([], 10) is None


def test_infinite_perplexity_is_not_interpolated():
    assert steps_to_reach(points([math.inf, 40]), 50) == 100


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=20), st.floats(1, 1e6))
def test_crossing_lies_between_the_validations_around_it(ppls, target):
    curve = points(ppls)
    steps = steps_to_reach(curve, target)
    if steps is None:
        assert min(ppls) > target
        return
    after = next(index for index, ppl in enumerate(ppls) if ppl <= target)
    assert max(after - 1, 0) * 100 <= steps + 1e-6
    assert steps <= after * 100 + 1e-6


def test_savings_charge_the_baseline_up_to_its_own_first_crossing():
    result = savings(points([100, 50, 50, 50]), points([100, 50]))
    assert result.baseline.steps == 100
    assert result.saved.steps == 0


def test_inheritance_that_costs_more_is_a_negative_saving():
    result = savings(points([100, 50]), points([100, 70.7106781, 50], taught_steps=200))
    assert result.saved.steps == pytest.approx(-1)
    assert result.saved.flops_with_teacher < result.saved.student_flops


def test_all_ancestors_are_charged_on_both_sides():
    """The heir reaches 50 after 100 of 200 steps; its ancestors had cost as much as its own 200 steps do."""
    whole = 6.0 * STUDENT * TOKENS * 200
    result = savings(points([100, 70.7106781, 50]), points([100, 50], taught_steps=0, before=whole))
    assert result.saved.student_flops == pytest.approx(0.5)
    assert result.saved.flops_with_ancestors == pytest.approx(-0.5)
    assert savings(points([100, 50], before=whole), points([100, 50], before=whole)).saved.flops_with_ancestors == 0


# --- sections and arms ------------------------------------------------------------------------------------------


def read(tmp_path, name, *arguments, label=None, **settings):
    folder = write_run(tmp_path / name, *arguments, **settings)
    return read_run(f"{label}={folder}" if label else folder)


def size(number):
    return {"num_parameters": number, "dense_parameters": number}


def test_sizes_and_tasks_have_sections_and_baselines_of_their_own(tmp_path):
    runs = [
        read(tmp_path, "large_ki", [400, 40, 30], inherits=True, student=size(9000)),
        read(tmp_path, "large", [400, 60, 40], student=size(9000)),
        read(tmp_path, "small", [400, 100, 80], student=size(500)),
        read(tmp_path, "masked", [400, 300], task="mlm", student=size(500)),
    ]
    sections = compare(runs)
    found = [(s.task, s.num_parameters, [run.name for run in s.runs]) for s in sections]
    assert found == [
        ("causal", 500, ["small"]),
        ("causal", 9000, ["large_ki", "large"]),
        ("mlm", 500, ["masked"]),
    ]
    assert [section.baseline.runs[0].name for section in sections] == ["small", "large", "masked"]
    assert [[pair.target_ppl for pairs in s.savings for pair in pairs] for s in sections] == [[], [40], []]


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("valid_masks", {"seed": 2, "variants": 1}),
        ("data.valid_sha256", DATA | {"valid_sha256": "e" * 64}),
        ("data.tokenizer_sha256", DATA | {"tokenizer_sha256": "e" * 64}),
        ("data.of_the_future", DATA | {"of_the_future": "e" * 64}),
    ],
)
def test_runs_measured_otherwise_are_refused(tmp_path, key, other):
    """In whatever section they are."""
    runs = [read(tmp_path, "self", [400, 50])]
    runs.append(read(tmp_path, "ki", [400, 45], inherits=True, student=size(7), **{key.split(".")[0]: other}))
    with pytest.raises(UserError, match=rf"self and .*ki cannot be compared: {key}.* is .+ and ") as error:
        compare(runs)
    assert "\n" not in str(error.value)


def test_training_data_may_differ_and_tells_arms_apart(tmp_path):
    runs = [
        read(tmp_path, "self", [400, 50]),
        read(tmp_path, "ki", [400, 45], teacher=teacher_record()),
        read(tmp_path, "ki_half", [400, 47], teacher=teacher_record(data=DATA | {"train_sha256": "1" * 64})),
        read(tmp_path, "ki_b", [400, 48], teacher=teacher_record(), data=DATA | {"train_sha256": "2" * 64}),
    ]
    (section,) = compare(runs)
    assert len(section.others) == 3
    assert "teacher's training data=111111111111" in section.arms[2].label
    assert "training data=222222222222" in section.arms[3].label
    assert any("do not all train on the same data" in note for note in section.notes)


def test_paths_of_equal_validation_data_make_no_arms(tmp_path):
    configs = [{"data": {"valid": {"cs": f"{name}/cs"}}} for name in "ab"]
    runs = [read(tmp_path, f"s{n}", [400, 50], seed=n, config=config) for n, config in enumerate(configs)]
    assert len(compare(runs)[0].arms) == 1


def test_labels_name_arms_and_part_equal_configurations(tmp_path):
    folders = [write_run(tmp_path / name, [400, 45], inherits=True) for name in ("a", "b")]
    with pytest.raises(UserError, match="same configuration and seed 1"):
        compare([read_run(folder) for folder in folders])
    (section,) = compare([read_run(f"teacher {folder.name}={folder}") for folder in folders])
    assert [arm.label for arm in section.arms] == ["teacher a", "teacher b"]
    with pytest.raises(UserError, match=r"a and .*c are both labelled x, and only one of them inherits"):
        compare([read_run(f"x={folders[0]}"), read(tmp_path, "c", [400, 50], seed=2, label="x")])


def test_several_inheriting_arms_are_named_by_what_differs(tmp_path):
    runs = [read(tmp_path, "self", [400, 50])]
    for name in ("linear", "heaviside"):
        runs.append(read(tmp_path, name, [400, 45], inherits=True, config={"inherit": {"schedule": name}}))
    labels = [arm.label for arm in compare(runs)[0].arms]
    assert labels[1:] == ["inheriting (inherit.schedule=linear)", "inheriting (inherit.schedule=heaviside)"]


def test_runs_are_compared_with_the_baseline_of_their_own_seed(tmp_path):
    runs = [read(tmp_path, f"self{seed}", [400, 40 + seed], seed=seed) for seed in (1, 2)]
    runs += [read(tmp_path, f"ki{seed}", [400, 40], seed=seed, inherits=True) for seed in (2, 1, 3)]
    (section,) = compare(runs)
    assert [pair.target_ppl for pair in section.savings[0]] == [42, 41, 41]
    (note,) = [note for note in section.notes if "has seed" in note]
    assert "no self-learning run has seed 3; compared with seed 1" in note


def test_domains_trained_on_differ(tmp_path):
    """Each run's own perplexity is of other rows then; all are measured on all domains, and it is said."""
    domains = {"wb": [400, 100, 25], "cs": [400, 100, 100]}
    own = [("wb", 25), ("cs", 100)]
    runs = [
        read(tmp_path, name, [400, 100, ppl], domains=domains, valid_domains=[name], label=name) for name, ppl in own
    ]
    (section,) = compare(runs)
    assert [run.curve[-1].ppl for run in section.runs] == pytest.approx([50, 50])
    assert any("of all validation domains together" in note for note in section.notes)
    (alike,) = compare([runs[0]])
    assert alike.runs[0].curve[-1].ppl == 25
    assert not alike.notes


def test_domains_of_runs_that_do_not_say_what_they_measure(tmp_path):
    domains = {"wb": [400, 25], "cs": [400, 100]}
    (section,) = compare([read(tmp_path, "old", [400, 25], domains=domains, valid_domains=[])])
    assert section.runs[0].curve[-1].ppl == pytest.approx(50)


def test_changes_of_every_domain(tmp_path):
    """What is gained in one domain and forgotten in the other."""
    alone = read(tmp_path, "self", [400, 50], domains={"wb": [30, 40], "cs": [400, 50]}, valid_domains=["cs"])
    heir = read(
        tmp_path, "ki", [400, 45], domains={"wb": [30, 44], "cs": [400, 45]}, valid_domains=["cs"], inherits=True
    )
    (section,) = compare([alone, heir])
    assert section.domains == ["wb", "cs"]
    assert section.savings[0][0].domain_changes == pytest.approx({"wb": 0.1, "cs": -0.1})
    assert section.savings[0][0].ppl_change == pytest.approx(-0.1)


def test_several_teachers_are_told_apart(tmp_path):
    """By their sizes and domains, but not by where they lie."""
    facts = {"path": "t", "num_parameters": 250, "weights_sha256": "c" * 64, "valid_ppl": 21.5}
    runs = [read(tmp_path, "self", [400, 100, 50])]
    arms = {"one": (["wb"], ["cs"]), "other": (["cs"], ["wb"]), "moved": (["wb"], ["cs"])}
    for seed, (name, domains) in enumerate(arms.items()):
        teachers = [facts | {"num_parameters": 250 + i, "domains": d} for i, d in enumerate(domains)]
        entries = [{"path": f"{name}/{i}", "domains": d, "share": None} for i, d in enumerate(domains)]
        config = {"teachers": entries}
        runs.append(read(tmp_path, name, [400, 60, 45], inherits=True, seed=seed, teachers=teachers, config=config))
    (section,) = compare(runs)
    assert [[run.name for run in arm.runs] for arm in section.arms] == [["self"], ["one", "moved"], ["other"]]
    assert "teachers.0.domains=['wb']" in section.arms[1].label
