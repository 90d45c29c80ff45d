import pytest

from tools import architectures


def test_a_page_says_of_every_kind_what_came_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(architectures, "KINDS", {"mlm": {"esm": "EsmForMaskedLM", "fnet": "FNetForMaskedLM"}})
    architectures.main(["--output", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "| mlm | 1 | 1 | 0 |" in page
    assert "| esm | EsmForMaskedLM | computed: bias lm_head.bias | " in page
    assert "| fnet | FNetForMaskedLM | refused: FNetForMaskedLM sees padding" in page
    assert "esm" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("task", architectures.KINDS)
def test_every_kind_of_transformers_is_right_or_refused_in_one_line(task):
    verdicts = [architectures.judge(kind, task) for kind in architectures.KINDS[task]]
    assert [v for v in verdicts if v.outcome == "failed"] == []
    assert all("\n" not in v.said for v in verdicts)
    assert sum(v.outcome == "computed" for v in verdicts) >= {"mlm": 40, "causal": 155}[task]
