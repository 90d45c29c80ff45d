"""The tool that tests the promises one by one counts what fails, and every row names tests that exist."""

import importlib.util

from tests.tiny import ROOT

SPEC = importlib.util.spec_from_file_location("fault_matrix", ROOT / "tools" / "fault_matrix.py")
fault_matrix = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fault_matrix)


def test_every_promise_has_its_tests():
    assert list(fault_matrix.ROWS) == list(range(1, 18))
    for _, selections in fault_matrix.ROWS.values():
        for selection in selections:
            assert (ROOT / selection.split(" -k ")[0]).exists(), selection


def test_what_passes_fails_and_is_measured_is_counted(tmp_path):
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('figure', '3/3')\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skip\ndef test_left(): pass\n"
        "@pytest.mark.slow\ndef test_slow(record_property): record_property('figure', '20/20')\n"
    )
    assert fault_matrix.test(str(tests), short=True) == (1, 1, 1, ["3/3"])
    assert fault_matrix.test(f"{tests} -k 'good or slow'", short=False) == (2, 0, 0, ["3/3", "20/20"])


def test_a_row_without_tests_is_not_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_none.py").write_text("def test_a(): pass\n")
    monkeypatch.setattr(fault_matrix, "ROWS", {1: ("x", [f"{tmp_path}/test_none.py -k nothing"])})
    monkeypatch.setattr("sys.argv", ["fault_matrix.py"])
    assert fault_matrix.main() == 1
    monkeypatch.setattr(fault_matrix, "ROWS", {1: ("x", [f"{tmp_path}/test_none.py"])})
    assert fault_matrix.main() == 0
