"""Records of JSON in every form it is written in; one line for what is none."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.data import json_records as module
from ki_ds.data.json_records import is_record_list, json_records
from ki_ds.errors import UserError

RECORDS = [{"text": 'one\n"two" [3] {4}', "n": 1}, {"text": "–\\", "more": {"a": [1, {"b": None}]}}, {"text": ""}]
FORMS = {
    "lines": lambda records: "\n".join(map(json.dumps, records)),
    "lines and blanks": lambda records: "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\r\n",
    "one after another": lambda records: "".join(json.dumps(r, indent=1) for r in records),
    "array": json.dumps,
    "array, indented": lambda records: json.dumps(records, indent=2) + "\n",
    "array, a line each": lambda records: "[\n" + ",\n".join(map(json.dumps, records)) + "\n]",
    "list in an object": lambda records: json.dumps({"version": "1", "tags": ["a"], "data": records}, indent=1),
}


def read(text, key="text"):
    return list(json_records(io.StringIO(text), Path("a.json"), key))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(form):
    assert read(FORMS[form](RECORDS)) == RECORDS


@settings(max_examples=60)
@given(
    records=st.lists(
        st.fixed_dictionaries(
            {"text": st.text(max_size=9)}, optional={"n": st.recursive(st.none() | st.booleans(), st.lists)}
        ),
        min_size=1,
    ),
    form=st.sampled_from(sorted(FORMS)),
    block=st.integers(16, 64),
)
def test_wherever_reading_stops_between(records, form, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_CHARACTERS", block)
        assert read(FORMS[form](records)) == records


def test_empty_ones_have_no_record():
    assert read("") == read(" \n") == read("[]") == read("[ ]\n") == []


def test_numbers_of_any_length_are_json():
    assert read('{"text": "a", "n": ' + "9" * 5000 + "}")[0]["text"] == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "x"}\n{"text"', "line 2 is not JSON"),
        ('{"text": "x"\n{"text": "y"}', "line 1 is not JSON"),
        ('{"text": "x"}\n\n{"text": "a\nb"}\n{"text": "y"}', "line 3 is not JSON"),
        ('{"text": "x"},\n{"text": "y"}', "line 1 is not JSON"),
        ('[{"text": "x"},\n{"text": "y"}', "the array does not end"),
        ('[{"text": "x"},\n{"text": "y', "line 2 is not JSON"),
        ('[{"text": "x"}\n{"text": "y"}]', "line 2 is not JSON .*expecting ',' or"),
        ('[{"text": "x"},]', "line 1 is not JSON"),
        ("plain text", "line 1 is not JSON"),
        ('["x"]', "line 1 has no text under 'text'"),
        ('{"text": "x"}\n{"body": "x"}', "line 2 has no text under 'text'"),
        ('{"text": null}', "has no text under 'text'"),
        ('{"text": ["x"]}', "has no text under 'text'"),
        ("7", "has no text under 'text'"),
        ('{"train": [{"text": "x"}], "test": [{"text": "y"}]}', "has no text under 'text'"),
        ('{"text": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper"),
    ],
)
def test_what_is_none_is_one_line(text, message):
    with pytest.raises(UserError, match=f"^a.json .*{message}") as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_a_fault_in_the_middle_is_told_before_the_rest_is_read():
    file = io.StringIO('{"text": "x"]\n' + '{"text": "y"}\n' * 1_000_000)
    with pytest.raises(UserError, match="line 1 is not JSON"):
        list(json_records(file, Path("a.json"), "text"))
    assert file.tell() < 100_000


def test_lists_of_records():
    assert is_record_list([{}])
    assert not any(map(is_record_list, ([], [1], {}, "x", None)))
