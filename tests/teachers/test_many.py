"""Several teachers: each row learns from its own, or all rows from their average; wherever they run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForMaskedLM

from ki_ds import config as configuration
from ki_ds.config import TeacherEntry
from ki_ds.data.batches import TrainBatches, collate
from ki_ds.errors import UserError
from ki_ds.loss import inheritance_loss
from ki_ds.models.presets import Rows
from ki_ds.objective.types import Average, Head, Part, Routed, Sparse
from ki_ds.teachers.cache_build import build_cache, record_teacher
from ki_ds.teachers.factory import make_teacher, make_teachers
from ki_ds.teachers.questions import Questions
from ki_ds.teachers.teacher import Assignment, ManyTeachers, hidden_answers
from ki_ds.training.setup import load_data
from tests.data.test_batches import BlockDataset, write_store
from tests.tiny import ROOT, records, run, tiny_config, tiny_corpus, train_ranks, write_config

CPU = torch.device("cpu")
QUIET = {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def sources(base):
    """Three domains of one tokenizer, and a teacher of B that is wider than the base's, which is taken for A."""
    found = [{"path": str(base / "corpus"), "domain": "A"}]
    for number, name in enumerate(("B", "C")):
        folder = base / f"many_{name}"
        tiny_corpus(folder, seed=9 + number, num_documents=60, tokenizer=base / "corpus" / "tokenizer")
        found.append({"path": str(folder), "domain": name})
    run(base / "many_teacher", base / "many_B", model={"hidden_size": 24}, train={"num_steps": 8})
    return found


def groups_of(base, sources, teachers, **groups):
    """What to lay over the tiny configuration; teachers as {domain: path}, or as entries."""
    if isinstance(teachers, dict):
        teachers = [{"path": str(path), "domains": [name]} for name, path in teachers.items()]
    groups.setdefault("inherit", {"schedule": "linear", "steps": 4})
    return {"data": {"corpus": "", "sources": sources}, "teachers": teachers, **groups}


@pytest.fixture(scope="module")
def both(base, sources):
    """The groups of a run on A, B and C with a teacher each for A and B."""
    return groups_of(base, sources, {"A": base / "mlm_teacher", "B": base / "many_teacher"})


def config_of(base, groups):
    return configuration.load(write_config(base / "many.yaml", tiny_config(base / "many", base / "corpus", **groups)))


def batches_of(config, data, num_steps=2):
    loader = TrainBatches(data.train, seed=config.seed, micro_batch_size=8, global_batch_size=8, num_steps=num_steps)
    return [batch.to("cpu") for step in loader for batch in step]


def logits_of(path, batch):
    """The logits of the labelled rows as Hugging Face's own model gives them for the whole batch."""
    lm = AutoModelForMaskedLM.from_pretrained(f"{path}/best").eval()
    with torch.no_grad():
        return lm(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits.flatten(0, 1)[
            batch.rows_N
        ]


def student_of(config, data):
    from ki_ds.models.presets import InheritanceModel, build_lm

    lm = build_lm(
        config.model, "mlm", num_classes=data.vocabulary.size, special_ids=data.vocabulary.special_ids, seed=1
    )
    return InheritanceModel(lm.eval(), num_classes=data.vocabulary.size, loss=config.loss, tau=2.0).eval()


def figures(run_dir):
    return [(r["step"], r["loss"], r["ce"], r["kl"]) for r in records(run_dir, "train")]


def weights(run_dir):
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    return (newest / "hf" / "model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_each_part_put_together(base, both):
    """Against the plain loss of Hugging Face's logits, a domain at a time; of C, which has no teacher, the labels'."""
    config = config_of(base, both)
    data = load_data(config)
    teacher, facts = make_teachers(config, data, device=CPU)
    student = student_of(config, data)
    paths = [base / "mlm_teacher", base / "many_teacher", None]
    seen = set()
    for batch in batches_of(config, data, num_steps=4):
        with torch.no_grad():
            student_logits = student.lm(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
        student_logits = student_logits.flatten(0, 1)[batch.rows_N]
        domain_N = batch.domain_ids_B[batch.rows_N // batch.input_ids_BL.shape[1]]
        parts = []
        for domain, path in enumerate(paths):
            rows = domain_N == domain
            seen.update([domain] * int(rows.any()))
            told = {} if path is None else {"teacher_logits": logits_of(path, batch)[rows], "alpha": 0.7}
            parts.append(
                inheritance_loss(
                    student_logits[rows], batch.row_labels_N[rows], **told, num_classes=data.vocabulary.size
                )
            )
        out, _ = student(batch, teacher.signal(batch), 0.7)
        (loss, ce, kl, num_rows), teachers = out[:4], out.teachers
        assert loss.item() == pytest.approx(sum(float(part.loss_sum) for part in parts), rel=1e-5)
        assert float(ce) == pytest.approx(sum(float(part.ce_sum) for part in parts), rel=1e-5)
        assert float(kl) == pytest.approx(sum(float(part.kl_sum) for part in parts), rel=1e-3)
        assert int(num_rows) == batch.num_rows
        assert teachers.shape == (2, 4)
        for number, part in enumerate(parts[:2]):
            assert float(teachers[number, 0]) == pytest.approx(float(part.kl_sum), rel=1e-3, abs=1e-7)
            assert int(teachers[number, 2]) == int(part.num_rows)
            assert float(teachers[number, 3]) == pytest.approx(float(part.ce_sum), rel=1e-5)
    assert seen == {0, 1, 2}
    assert [(found.name, found.domains) for found in facts] == [("A", ["A"]), ("B", ["B"])]


def test_a_domain_without_a_teacher_has_exactly_its_self_learning_loss(base, both):
    """Batches of C alone: bit for bit what there would be without any teacher, gradients too."""
    config = config_of(base, both)
    data = load_data(config)
    teacher, _ = make_teachers(config, data, device=CPU)
    student = student_of(config, data)
    ids = [i for i in range(len(data.train)) if data.train.domain_ids(i) == 2][:4]
    batch = collate([data.train.sample(i, seed=1, epoch=0) for i in ids], pad_id=data.train.pad_id, seq_len=32)
    gradients = []
    for signal, alpha in ((teacher.signal(batch), 1.0), (None, 0.0)):
        student.zero_grad()
        (loss, ce, kl, *_), _ = student(batch, signal, alpha)
        loss.backward()
        assert float(kl) == 0
        assert float(loss) == float(ce) > 0
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_average_is_that_of_the_softmaxes(base, sources):
    entries = [{"path": str(base / "mlm_teacher"), "share": 3}, {"path": str(base / "many_teacher")}]
    config = config_of(base, groups_of(base, sources, entries))
    data = load_data(config)
    teacher, facts = make_teachers(config, data, device=CPU)
    student, (batch, *_) = student_of(config, data), batches_of(config, data)
    probs = [
        (logits_of(entry["path"], batch)[:, : data.vocabulary.size] / 2).softmax(-1) * share
        for entry, share in zip(entries, (0.75, 0.25), strict=True)
    ]
    with torch.no_grad():
        logits = student.lm(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    expected = inheritance_loss(
        logits.flatten(0, 1)[batch.rows_N][:, : data.vocabulary.size],
        batch.row_labels_N,
        teacher_logits=sum(probs).log() * 2,
        alpha=0.7,
    )
    found, _ = student(batch, teacher.signal(batch), 0.7)
    assert float(found[0]) == pytest.approx(float(expected.loss_sum), rel=1e-5)
    assert float(found[2]) == pytest.approx(float(expected.kl_sum), rel=1e-3)
    assert [(each.name, each.share, each.domains) for each in facts] == [
        ("mlm_teacher", 3.0, None),
        ("many_teacher", None, None),
    ]


# ---------------------------------------------------------------------------------- who is asked what


class Recorder:
    """A teacher that remembers what it was asked."""

    def __init__(self):
        self.asked, self.freed = [], False

    def signal(self, batch):
        self.asked.append(batch)
        return Head(torch.zeros(batch.num_rows, 2), torch.zeros(5, 2), None)

    def figures(self):
        return {}

    def free(self):
        self.freed = True


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Six sequences of the domains 0, 1, 0, 2, 1, 0."""
    store = write_store(tmp_path_factory.mktemp("many"))
    kinds = [BlockDataset(store, task="mlm", seq_len=64, domain_id=i) for i in range(3)]
    samples = [kinds[domain].sample(place, seed=0, epoch=0) for place, domain in enumerate((0, 1, 0, 2, 1, 0))]
    return collate(samples, pad_id=1, seq_len=64)


def test_each_teacher_runs_on_the_sequences_of_its_domains_alone(mixed):
    teachers = [Recorder() for _ in range(3)]
    signal = ManyTeachers(teachers, Assignment((frozenset({0}), frozenset({7}), frozenset({1})), (1.0,) * 3)).signal(
        mixed
    )
    assert [[batch.sample_ids_B.tolist() for batch in each.asked] for each in teachers] == [[[0, 2, 5]], [], [[1, 4]]]
    assert [part.teacher for part in signal.parts] == [0, 2]
    owners = mixed.rows_N // mixed.input_ids_BL.shape[1]
    for part, sequences in zip(signal.parts, ([0, 2, 5], [1, 4]), strict=True):
        assert part.rows_M.tolist() == torch.isin(owners, torch.tensor(sequences)).nonzero()[:, 0].tolist()
        assert part.num_tokens == int(mixed.lengths[sequences].sum())
        assert len(part.signal.hidden_ND) == len(part.rows_M)


def test_a_teacher_whose_sequences_have_no_labelled_row_is_not_asked(mixed):
    owners = mixed.rows_N // mixed.input_ids_BL.shape[1]
    kept = (owners != 1) & (owners != 4)
    batch = replace(mixed, rows_N=mixed.rows_N[kept], row_labels_N=mixed.row_labels_N[kept])
    teachers = [Recorder(), Recorder()]
    signal = ManyTeachers(teachers, Assignment((frozenset({1}), frozenset({0, 2})), (1.0, 1.0))).signal(batch)
    assert [len(each.asked) for each in teachers] == [0, 1]
    assert [part.teacher for part in signal.parts] == [1]


def test_one_teacher_for_all_domains_is_asked_about_the_batch_as_it_is(mixed):
    teacher = Recorder()
    signal = ManyTeachers([teacher], Assignment((frozenset({0, 1, 2}),), (1.0,))).signal(mixed)
    assert teacher.asked[0].input_ids_BL is mixed.input_ids_BL or torch.equal(teacher.asked[0].rows_N, mixed.rows_N)
    assert signal.parts[0].rows_M.tolist() == list(range(mixed.num_rows))


def test_an_average_asks_every_teacher_about_everything(mixed):
    teachers = [Recorder(), Recorder()]
    many = ManyTeachers(teachers, Assignment(None, (1.0, 2.0)))
    signal = many.signal(mixed)
    assert isinstance(signal, Average)
    assert signal.shares == (1.0, 2.0)
    assert all(torch.equal(each.asked[0].input_ids_BL, mixed.input_ids_BL) for each in teachers)
    assert [number for number, _ in hidden_answers(signal)] == [0, 1]
    many.free()
    assert all(each.freed for each in teachers)
    with pytest.raises(AssertionError, match="freed"):
        many.signal(mixed)


def test_an_assignment_follows_from_the_entries():
    names = ("wb", "cs", "bio")
    routed = Assignment.of([TeacherEntry("a", ["bio", "wb"]), TeacherEntry("b", ["cs"])], names)
    assert routed.domain_ids == (frozenset({0, 2}), frozenset({1}))
    averaged = Assignment.of([TeacherEntry("a", share=2.0), TeacherEntry("b")], names)
    assert (averaged.domain_ids, averaged.shares) == (None, (2.0, 1.0))


def test_hidden_answers_leave_entries_out():
    entries = Sparse(torch.zeros(1, 2).long(), torch.zeros(1, 2), "tail")
    hidden = Head(torch.zeros(1, 2), torch.zeros(3, 2), None)
    rows = torch.zeros(1, dtype=torch.int64)
    assert hidden_answers(entries) == []
    assert hidden_answers(hidden) == [(0, hidden)]
    routed = Routed((Part(0, entries, rows, 1), Part(2, hidden, rows, 1)), 3)
    assert hidden_answers(routed) == [(2, hidden)]


# ---------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def online(base, both):
    return run(base / "many_online", base / "corpus", **both)


def test_a_run_reports_each_teacher_and_counts_what_it_really_saw(online):
    steps = records(online, "train")
    manifest = json.loads((online / "run.json").read_text())
    a, b = (facts["dense_parameters"] for facts in manifest["teachers"])
    flops = 0
    for record in steps[:4]:
        told = record["teachers"]
        flops += 2 * sum(dense * told.get(name, {"tokens": 0})["tokens"] for name, dense in (("A", a), ("B", b)))
        assert record["teacher_flops"] == flops
        rows = sum(each["rows"] for each in told.values())
        total_kl = sum(each["kl"] * each["rows"] for each in told.values())
        assert all(min(each["kl"], each["ce"], each["teacher_ce"]) > 0 for each in told.values())
        assert rows > 0
        assert total_kl / record["kl"] == pytest.approx(round(total_kl / record["kl"]), rel=1e-3)  # the step's rows
        assert total_kl / record["kl"] >= rows - 1e-2
    assert set().union(*(record["teachers"] for record in steps[:4])) == {"A", "B"}
    assert not any("teachers" in record for record in steps[4:])
    assert steps[-1]["teacher_flops"] == flops
    assert 0 < sum(t["tokens"] for r in steps[:4] for t in r["teachers"].values()) < steps[3]["tokens"]
    assert len(records(online, "teacher_freed")) == 1


def test_the_automatic_hand_over_weighs_all_teachers_together(base, both):
    """Two steps of `auto`, with the teachers a micro-batch ahead: taught, and told apart."""
    groups = both | {"inherit": {"schedule": "auto"}, "teacher": {"placement": "overlap"}}
    first, second = records(run(base / "many_auto", base / "corpus", **groups, train={"num_steps": 2}), "train")
    assert first["alpha"] > 0 < second["alpha"]
    assert set(first["teachers"]) | set(second["teachers"]) == {"A", "B"}


def test_that_a_domain_learns_alone_is_said_once(base, both, capsys):
    run(base / "many_said", base / "corpus", **both, train={"num_steps": 1})
    assert capsys.readouterr().out.count("rows of C have no teacher: they learn from their labels alone") == 1


def test_resume_is_bitwise_the_same_run(base, both, online):
    for stop in (1, 3):
        run(base / f"many_part_{stop}", base / "corpus", **both, train={"stop_at_step": stop})
        part = run(base / f"many_part_{stop}", base / "corpus", **both)
        assert figures(part) == figures(online)
        assert weights(part) == weights(online)
        assert [r.get("teachers") for r in records(part, "train")] == [
            r.get("teachers") for r in records(online, "train")
        ]


def test_one_teacher_for_all_domains_is_the_run_with_that_teacher(base, sources):
    path = str(base / "mlm_teacher")
    groups = groups_of(base, sources, [{"path": path, "domains": ["C", "A", "B"]}])
    routed = run(base / "many_one", base / "corpus", **groups)
    alone = run(base / "many_alone", base / "corpus", **groups | {"teachers": None, "teacher": {"path": path}})
    assert figures(routed) == figures(alone)
    assert weights(routed) == weights(alone)
    assert records(routed, "train")[-1]["teacher_flops"] == records(alone, "train")[-1]["teacher_flops"]


def test_the_average_of_twins_is_the_run_with_one_of_them(base, sources):
    path = str(base / "mlm_teacher")
    groups = groups_of(base, sources, [{"path": path, "share": 0.3}, {"path": path, "share": 5}])
    twins = run(base / "many_twins", base / "corpus", **groups)
    alone = run(base / "many_not_twins", base / "corpus", **groups | {"teachers": None, "teacher": {"path": path}})
    for ours, theirs in zip(figures(twins), figures(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    flops = [records(folder, "train")[-1]["teacher_flops"] for folder in (twins, alone)]
    assert flops[0] == 2 * flops[1]
    names = [facts["name"] for facts in json.loads((twins / "run.json").read_text())["teachers"]]
    assert names == ["mlm_teacher_0", "mlm_teacher_1"]


def in_ranks(base, name, groups, *, students, **teacher):
    teacher_ranks = 1 if teacher else 0
    config = tiny_config(base / name, base / "corpus", **groups, teacher=teacher)
    results = train_ranks(write_config(base / f"{name}.yaml", config), world=students + teacher_ranks)
    assert [r.returncode for r in results] == [0] * len(results), [r.stderr[-500:] for r in results]
    return base / name


def check_alike(apart, together):
    assert figures(apart) == figures(together)
    assert weights(apart) == weights(together)
    seen = [[(r["teacher_flops"], r.get("teachers")) for r in records(folder, "train")] for folder in (apart, together)]
    assert seen[0] == seen[1]


def test_ranks_of_their_own_are_bitwise_the_teachers_in_the_process(base, both):
    apart = in_ranks(base, "many_ranks", both, students=1, placement="ranks")
    check_alike(apart, in_ranks(base, "many_together", both, students=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["routed", "averaged"])
def test_ranks_of_their_own_with_two_students(base, sources, both, kind):
    """Every student gets its parts, and a head with the first of them."""
    entries = [{"path": str(base / "mlm_teacher")}, {"path": str(base / "many_teacher"), "share": 2}]
    groups = both if kind == "routed" else groups_of(base, sources, entries)
    apart = in_ranks(base, f"many_{kind}_apart", groups, students=2, placement="ranks")
    check_alike(apart, in_ranks(base, f"many_{kind}_together", groups, students=2))


# ---------------------------------------------------------------------------------- caches


def cache_of(base, groups, number, out, *, kind="hidden", dtype="fp32", steps=None):
    """What one entry's teacher says about the samples of its domains, as tools/cache_teacher.py writes it."""
    config = config_of(base, groups)
    data = load_data(config)
    entry = config.teachers[number]
    questions = Questions.of_run(config, data, steps=steps or range(4))
    questions = questions.of_domains(Assignment.of(config.teachers, data.domains).of_teacher(number))
    teacher, facts = make_teacher(
        configuration.TeacherConfig(entry.path),
        Rows("mlm", 32),
        tokenizer_sha256=data.vocabulary.sha256,
        num_classes=data.vocabulary.size,
        device=CPU,
    )
    recording = record_teacher(teacher, facts, questions, kind=kind, topk=10, dtype=dtype, device=CPU)
    return build_cache(out, questions, recording)


def reading(groups, caches):
    entries = [entry | {"path": str(cache)} for entry, cache in zip(groups["teachers"], caches, strict=True)]
    return groups | {"teachers": entries, "teacher": {"placement": "cache"}}


@pytest.fixture(scope="module")
def caches(base, both, tmp_path_factory):
    """Hidden states of both teachers, each for its own domain's samples."""
    folder = tmp_path_factory.mktemp("many_caches")
    for number, name in enumerate("AB"):
        cache_of(base, both, number, folder / name)
    return [folder / "A", folder / "B"]


def test_caches_of_their_own_samples_are_bitwise_the_teachers(base, both, online, caches):
    cached = run(base / "many_cached", base / "corpus", **reading(both, caches))
    assert figures(cached) == figures(online)
    assert weights(cached) == weights(online)
    records_of = [sum(f[1] for f in json.loads((c / "manifest.json").read_text())["chunks"].values()) for c in caches]
    assert all(records_of)
    assert sum(records_of) < 4 * 8  # of 4 steps of 8 samples, without those of C
    manifest = json.loads((cached / "run.json").read_text())
    assert [facts["cache"]["path"] for facts in manifest["teachers"]] == list(map(str, caches))
    assert [facts["domains"] for facts in manifest["teachers"]] == [["A"], ["B"]]
    assert records(cached, "train")[-1]["teacher_flops"] == records(online, "train")[-1]["teacher_flops"]


def test_entries_are_routed_too_and_beside_hidden_states(base, both, caches, tmp_path):
    """K of the whole vocabulary says what hidden states say; the mixture of both kinds is composed part by part."""
    cache_of(base, both, 1, tmp_path / "B", kind="topk")
    config = config_of(base, reading(both, [caches[0], tmp_path / "B"]))
    data = load_data(config)
    questions = Questions.of_run(config, data, steps=range(4))
    teacher, facts = make_teachers(config, data, device=CPU, questions=questions)
    hidden, _ = make_teachers(config_of(base, both), data, device=CPU)
    student = student_of(config, data)
    assert [found.cache["kind"] for found in facts] == ["hidden", "topk"]
    for number in range(16):
        batch = Questions.micro_batch(questions, number)[3]
        signal, reference = teacher.signal(batch), hidden.signal(batch)
        found, expected = student(batch, signal, 0.7)[0], student(batch, reference, 0.7)[0]
        assert float(found[1]) == pytest.approx(float(expected[1]), rel=1e-6)
        assert torch.allclose(found.teachers[0], expected.teachers[0])
        assert found.teacher_rows_T.tolist() == expected.teacher_rows_T.tolist()
        b_rows = [part for part in signal.parts if part.teacher == 1]
        assert all(isinstance(part.signal, Sparse) for part in b_rows)
        rest = float(found[0] - 0.7 * 4 * found[2])
        assert rest == pytest.approx(float(expected[0] - 0.7 * 4 * expected[2]), rel=1e-5)  # what the labels say
        found[0].backward()
    folder = run(base / "many_kinds", base / "corpus", **reading(both, [caches[0], tmp_path / "B"]))
    told = [record["teachers"] for record in records(folder, "train")[:4]]
    engine = {"ds_config": str(ROOT / "ds_configs" / "zero3.json")}
    sharded = run(base / "many_kinds_3", base / "corpus", **reading(both, [caches[0], tmp_path / "B"]), engine=engine)
    for ours, theirs in zip(figures(sharded), figures(folder), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert next(each["A"].keys() for each in told if "A" in each) == {"kl", "ce", "teacher_ce", "rows", "tokens"}
    assert next(each["B"].keys() for each in told if "B" in each) == {"kl", "ce", "rows", "tokens"}


def test_a_cache_that_lacks_a_sample_of_its_domain_is_refused(base, both, caches, tmp_path):
    """Asked only for its own domain: A's cache will not do for B, and one of fewer steps is not enough."""
    for number, name in enumerate("AB"):
        cache_of(base, both, number, tmp_path / name, steps=range(2))
    with pytest.raises(UserError, match=r"A lacks \d+ of the \d+ records that steps 1 to 4 need"):
        run(base / "many_short", base / "corpus", **reading(both, [tmp_path / "A", caches[1]]))
    with pytest.raises(UserError, match=r"B lacks (\d+) of the \1 records"):
        run(base / "many_crossed", base / "corpus", **reading(both, [caches[1], caches[0]]))


def test_entries_of_a_cache_are_not_averaged(base, sources, tmp_path):
    entries = [{"path": str(base / "mlm_teacher")}, {"path": str(base / "many_teacher")}]
    groups = groups_of(base, sources, entries)
    cache_of(base, groups, 0, tmp_path / "A", kind="topk")
    cache_of(base, groups, 1, tmp_path / "B")
    with pytest.raises(UserError, match=r"teachers\.0\.path=.*A holds K entries a row, which cannot be averaged"):
        run(base / "many_averaged_topk", base / "corpus", **reading(groups, [tmp_path / "A", tmp_path / "B"]))
    cache_of(base, groups, 0, tmp_path / "A_hidden")
    cached = run(base / "many_averaged", base / "corpus", **reading(groups, [tmp_path / "A_hidden", tmp_path / "B"]))
    assert figures(cached) == figures(run(base / "many_average_run", base / "corpus", **groups))


# ---------------------------------------------------------------------------------- what is refused, and remembered


def test_each_teacher_is_checked_by_its_own_name(base, sources):
    bad = groups_of(base, sources, {"A": base / "mlm_teacher", "B": base / "nobody"})
    with pytest.raises(UserError, match=r"teachers\.1\.path=.*nobody cannot be read"):
        run(base / "many_bad", base / "corpus", **bad)
    other = tiny_corpus(base / "many_other", vocab_size=300, seed=1)
    run(base / "many_other_teacher", other, train={"num_steps": 1})
    bad = groups_of(base, sources, {"A": base / "mlm_teacher", "B": base / "many_other_teacher"})
    with pytest.raises(UserError, match=r"teachers\.1\.path=.* has another tokenizer"):
        run(base / "many_bad", base / "corpus", **bad)
    assert not (base / "many_bad" / "checkpoints").exists()


def test_a_run_goes_on_with_its_own_teachers_entry_by_entry(base, sources, both, caches, tmp_path):
    name = base / "many_changed"
    run(name, base / "corpus", **both, train={"stop_at_step": 1})
    moved = shutil.copytree(base / "many_teacher", tmp_path / "moved")
    same = groups_of(base, sources, {"A": base / "mlm_teacher", "B": moved})
    run(name, base / "corpus", **same, train={"stop_at_step": 2})  # the same weights at another place
    other = groups_of(base, sources, {"A": base / "mlm_teacher", "B": base / "mlm_teacher"})
    with pytest.raises(UserError, match=r"teachers\.1\.path=.* has other weights; give the same teacher"):
        run(name, base / "corpus", **other, train={"stop_at_step": 3})
    swapped = groups_of(base, sources, {"B": moved, "A": base / "mlm_teacher"})
    with pytest.raises(UserError, match=r"holds a run with teachers\.0\.domains=\['A'\], now it is \['B'\]"):
        run(name, base / "corpus", **swapped, train={"stop_at_step": 3})
    cache_of(base, both, 1, tmp_path / "B", kind="topk")
    with pytest.raises(UserError, match=r"inherited from the teacher, now it is the cache .*B \(topk"):
        run(name, base / "corpus", **reading(both, [caches[0], tmp_path / "B"]), train={"stop_at_step": 3})
    allow = {"stop_at_step": 3, "changed_config": "allow"}
    folder = run(name, base / "corpus", **other, train=allow)
    manifest = json.loads((folder / "run.json").read_text())
    assert [t["lineage"]["name"] for t in manifest["former_teachers"]] == ["many_teacher"]
    record = json.loads((folder / "checkpoints/step_00000003/hf/lineage.json").read_text())
    assert [(t["lineage"]["name"], t["domains"]) for t in record["teachers"]] == [
        ("many_teacher", ["B"]),
        ("mlm_teacher", ["A"]),
        ("mlm_teacher", ["B"]),
    ]


def test_more_or_fewer_teachers_are_another_run(base, sources):
    entries = [{"path": str(base / "mlm_teacher")}, {"path": str(base / "many_teacher")}]
    run(base / "many_two", base / "corpus", **groups_of(base, sources, entries), train={"stop_at_step": 1})
    with pytest.raises(UserError, match=r"inherited from 2 teachers, now there are 1"):
        run(base / "many_two", base / "corpus", **groups_of(base, sources, entries[:1]))
