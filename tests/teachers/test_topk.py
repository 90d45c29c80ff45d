from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ki_ds import config as configuration
from ki_ds.errors import UserError
from ki_ds.objective.types import PLAIN, Head, LogitForm
from ki_ds.teachers.factory import make_teachers
from ki_ds.teachers.online import largest_entries
from tests.teachers.cache_cases import CPU, cache_of, config_of, data_of, questions_of
from tests.tiny import inherit, records, tiny_config, write_config


@pytest.mark.parametrize("topk", [1, 7, 50])
@pytest.mark.parametrize("form", [PLAIN, LogitForm(0.25), LogitForm(-1.0, 3.0)])
def test_the_entries_are_the_largest_of_the_teachers_softmax(topk, form):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2100, 6, generator=draw), torch.randn(64, 6, generator=draw)
    signal = Head(hidden, weight, torch.randn(64, generator=draw), form)
    ids, log_probs = largest_entries(signal, topk=topk, tau=2.0, num_classes=50)
    logits = form.scale * F.linear(hidden.double(), weight.double())[:, :50] + signal.bias_V.double()[:50]
    logits = logits if form.cap is None else form.cap * torch.tanh(logits / form.cap)
    expected = torch.log_softmax(logits / 2.0, dim=-1).sort(descending=True).values[:, :topk]
    assert ids.max() < 50
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=1e-5)


def test_no_rows_have_no_entries():
    signal = Head(torch.zeros(0, 6), torch.zeros(64, 6), None)
    ids, log_probs = largest_entries(signal, topk=3, tau=1.0, num_classes=50)
    assert ids.shape == log_probs.shape == (0, 3)


@pytest.mark.parametrize("placement", ["online", "overlap"])
def test_training_on_k_entries_is_training_on_a_cache_of_them(base, tmp_path, placement):
    """A cache's log-probabilities are float16, hence not bit for bit."""
    live = inherit(base, f"topk_{placement}", teacher=_teacher(base, topk=10, placement=placement))
    cache_of(config_of(base, train={"num_steps": 6}), tmp_path / "cache", topk=10)
    cached = {"path": str(tmp_path / "cache"), "placement": "cache"}
    stored = inherit(base, f"topk_stored_{placement}", teacher=cached)
    for one, other in zip(records(live, "train"), records(stored, "train"), strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=2e-3, abs=1e-6)
        assert one["ce"] == pytest.approx(other["ce"], rel=1e-4)


def test_all_entries_are_the_whole_teacher(base):
    whole = inherit(base, "topk_whole")
    size = data_of(config_of(base)).vocabulary.size
    cut = inherit(base, "topk_all", teacher=_teacher(base, topk=size))
    pairs = zip(records(whole, "train"), records(cut, "train"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5) for a, b in pairs)
    fewer = inherit(base, "topk_few", teacher=_teacher(base, topk=2))
    assert records(fewer, "train")[0]["kl"] != pytest.approx(records(whole, "train")[0]["kl"], rel=1e-2)


def test_what_the_entries_leave_over_may_be_a_class_of_its_own(base):
    config = config_of(base, teacher={"topk": 3, "topk_semantics": "tail"})
    teacher, _ = make_teachers(config, data_of(config), device=CPU)
    assert teacher.signal(questions_of(config).one(0, 0)).semantics == "tail"
    tail = inherit(base, "topk_tail", teacher=_teacher(base, topk=3, topk_semantics="tail"))
    cut = inherit(base, "topk_cut", teacher=_teacher(base, topk=3))
    assert records(tail, "train")[0]["kl"] != records(cut, "train")[0]["kl"]


def test_more_entries_than_ids_are_refused(base):
    config = config_of(base)
    config = replace(config, teacher=replace(config.teacher, topk=10_000))
    with pytest.raises(UserError, match=r"teacher.topk=10000 exceeds the \d+ ids of the vocabulary; lower it"):
        make_teachers(config, data_of(config), device=CPU)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"teacher": {"topk": 0, "path": "t"}}, "teacher.topk=0 is outside"),
        (
            {"teacher": {"topk": 10}, "inherit": {"schedule": "none"}},
            "teacher.topk=10 has no meaning without a teacher",
        ),
        ({"teacher": {"topk": 10, "path": "t", "placement": "cache"}}, "whose K is its own; leave it out"),
        ({"teacher": {"topk": 10, "path": "t", "placement": "ranks"}}, "which send hidden states; leave it out"),
        ({"teacher": {"topk": 10, "path": "t"}, "inherit": {"schedule": "auto"}}, "hides the whole teacher"),
        ({"teacher": {"topk": 10}, "teachers": [{"path": "a"}, {"path": "b"}]}, "cannot be averaged over teachers"),
    ],
)
def test_what_k_entries_cannot_do_is_refused(tmp_path, groups, message):
    groups.setdefault("inherit", {"schedule": "linear", "steps": 4})
    config = tiny_config(tmp_path / "run", tmp_path / "corpus", **groups)
    with pytest.raises(UserError, match=message):
        configuration.load(write_config(tmp_path / "run.yaml", config))


def _teacher(base, **values):
    return {"path": str(base / "mlm_teacher"), **values}
