import itertools

import pytest

from ki_ds.config.paper import NUM_STEPS, PRESETS, TEACHING_STEPS, teaching_share


def test_table_7_names_presets_and_leaves_the_student_time_on_its_own():
    assert len(TEACHING_STEPS) == 18
    for generations, steps in TEACHING_STEPS.items():
        assert PRESETS.keys() >= set(generations)
        task = "mlm" if generations[0].startswith("roberta") else "causal"
        assert 0 < steps < NUM_STEPS[task]


def test_a_larger_teacher_teaches_longer():
    for kind, sizes in (("h", (4, 6, 8, 10)), ("d", (384, 480, 576, 672))):
        shares = [teaching_share(("roberta_base", f"roberta_{kind}{size}"), "mlm") for size in sizes]
        assert all(a < b for a, b in itertools.pairwise(shares))


@pytest.mark.parametrize(
    ("generations", "share"),
    [
        (("roberta_large", "roberta_base"), 40 / 125),
        (("roberta_large", "roberta_base_plus"), 65 / 125),
        (("roberta_large", "roberta_base_plus", "roberta_base"), 75 / 125),
        (("roberta_large", "roberta_base_plus", "roberta_base", "roberta_medium"), 75 / 125),
        (("roberta_large", "roberta_base_plus", "roberta_medium"), 65 / 125),
        (("roberta_medium", "roberta_base"), None),
        (("roberta_base",), None),
    ],
)
def test_the_longest_row_that_begins_the_generations_counts(generations, share):
    assert teaching_share(generations, "mlm") == share
