"""A teacher that is read: the same losses and weights as online, and never a signal that is not the batch's own."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ki_ds.data.batches import Sample, TrainBatches, collate
from ki_ds.data.tokenize import former_tokenizer_hash
from ki_ds.errors import UserError
from ki_ds.loss import inheritance_loss, topk_inheritance_loss
from ki_ds.objective.types import PLAIN, Head, LogitForm, Sparse
from ki_ds.teachers.cache import CachedTeacher, encode
from ki_ds.teachers.cache_build import build_cache
from ki_ds.teachers.cache_files import LOGIT_FORM, Manifest
from ki_ds.teachers.online import OnlineTeacher
from tests.teachers.cache_cases import cache_of, config_of, data_of, questions_of, reading, recording_of, teacher_of
from tests.tiny import inherit, records, tiny_corpus

LONG = {"train": {"num_steps": 20}, "inherit": {"schedule": "linear", "steps": 20}}


@pytest.fixture(scope="module")
def caches(base, tmp_path_factory):
    """Caches of the samples of 20 steps, each made once: get(task, kind, ...)."""
    folder, made = tmp_path_factory.mktemp("caches"), {}

    def get(task="mlm", **spec):
        name = "_".join([task, *map(str, spec.values())])
        if name not in made:
            cache_of(config_of(base, task, **LONG), folder / name, **spec)
            made[name] = folder / name
        return made[name]

    return get


def batches_of(config, num_steps=4):
    """The run's micro-batches."""
    loader = TrainBatches(
        data_of(config).train, seed=config.seed, micro_batch_size=2, global_batch_size=8, num_steps=num_steps
    )
    return [batch for step in loader for batch in step]


def logits_of(signal):
    return torch.nn.functional.linear(signal.hidden_ND, signal.weight_VD, signal.bias_V).float()


# ---------------------------------------------------------------------------------- the same signals


@pytest.mark.parametrize("task", ["mlm", "causal"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 5e-4), ("int8", 4e-3)])
def test_hidden_states_are_the_teachers(base, caches, task, dtype, tolerance):
    config = config_of(base, task, **LONG)
    online, facts = teacher_of(config)
    cached, cached_facts = teacher_of(reading(config, caches(task, kind="hidden", dtype=dtype)))
    for batch in batches_of(config):
        expected, found = online.signal(batch), cached.signal(batch)
        assert isinstance(found, Head)
        assert torch.equal(found.weight_VD, expected.weight_VD)
        assert found.hidden_ND.dtype == expected.hidden_ND.dtype
        largest = float(expected.hidden_ND.abs().max())
        torch.testing.assert_close(found.hidden_ND, expected.hidden_ND, rtol=0, atol=tolerance * largest)
    assert replace(cached_facts, cache=None) == facts  # lineage and parameters are the real teacher's
    assert cached_facts.cache["kind"] == "hidden"


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_top_k_is_the_teachers_softmax_at_tau(base, caches, task):
    config = config_of(base, task, **LONG)
    online, _ = teacher_of(config)
    cached, _ = teacher_of(reading(config, caches(task, kind="topk", topk=10)))
    for batch in batches_of(config):
        probs_NV = (logits_of(online.signal(batch))[:, :320] / config.inherit.tau).softmax(-1)
        signal = cached.signal(batch)
        assert isinstance(signal, Sparse)
        assert signal.ids_NK.dtype == torch.int64
        assert (signal.ids_NK.shape, signal.semantics) == ((batch.num_rows, 10), "renormalise")
        torch.testing.assert_close(signal.probs_NK, probs_NV.gather(1, signal.ids_NK), rtol=4e-3, atol=0)
        # those of the K largest: the rest is below the smallest
        rest_NV = probs_NV.scatter(1, signal.ids_NK, 0.0)
        assert (rest_NV.amax(-1) <= signal.probs_NK[:, -1] * 1.005).all()


@pytest.mark.parametrize("semantics", ["renormalise", "tail"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_k_of_the_whole_vocabulary_is_the_dense_loss(base, tmp_path, semantics, tau):
    config = config_of(base, inherit={"schedule": "linear", "steps": 2, "tau": tau})
    cache_of(config, tmp_path / "cache", topk=320)
    online, _ = teacher_of(config)
    cached, _ = teacher_of(reading(config, tmp_path / "cache", topk_semantics=semantics))
    torch.manual_seed(0)
    for batch in batches_of(config, 2):
        student = torch.randn(batch.num_rows, 320, requires_grad=True)
        given = {"alpha": 0.7, "tau": tau, "num_classes": 320}
        signal = cached.signal(batch)
        topk = {"topk_ids": signal.ids_NK, "topk_probs": signal.probs_NK, "semantics": signal.semantics}
        found = topk_inheritance_loss(student, batch.row_labels_N, **topk, **given)
        dense = {"teacher_logits": logits_of(online.signal(batch))[:, :320]}
        expected = inheritance_loss(student, batch.row_labels_N, **dense, **given)
        torch.testing.assert_close(found.loss_sum, expected.loss_sum, rtol=2e-3, atol=2e-3)
        gradients = [torch.autograd.grad(out.loss_sum, student)[0] for out in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=2e-4)


def test_packed_rows_and_batches_of_another_make_up(base, tmp_path):
    """A record is found by its sample, whatever stands beside it."""
    config = config_of(base, "causal", data={"packing": True, "break_mode": "eos"})
    cache_of(config, tmp_path / "cache", kind="hidden", dtype="fp32", epochs=1)
    teacher, _ = teacher_of(reading(config, tmp_path / "cache"))
    online, _ = teacher_of(config)
    train = data_of(config).train
    for ids in ([5], [3, 0, 8], [len(train) - 1, 2]):
        batch = collate([train.sample(i, seed=9, epoch=4) for i in ids], pad_id=train.pad_id, seq_len=32)
        torch.testing.assert_close(teacher.signal(batch).hidden_ND, online.signal(batch).hidden_ND)


def test_too_large_hidden_states_do_not_become_infinite_in_silence(base):
    signal = Head(torch.full((2, 4), 7e4), torch.zeros(5, 4), None)
    with pytest.raises(UserError, match="hidden states reach 70000, too much for float16; take --dtype fp32"):
        encode(signal, {"kind": "hidden", "dtype": "fp16"})
    assert (
        encode(signal, {"kind": "hidden", "dtype": "int8"})["scales"].tolist()
        == [np.float32(7e4) / np.float32(127)] * 2
    )


def test_the_form_of_the_teachers_logits_is_kept_and_tells_caches_apart(base, tmp_path, monkeypatch):
    """A cache without one, as all were, is of plain logits; only what is not plain stands in the key."""
    config, form = config_of(base, **LONG), LogitForm(0.5, 3.0)
    plain = cache_of(config, tmp_path / "plain", kind="hidden", dtype="fp32", epochs=1)
    assert LOGIT_FORM not in plain.key
    cached, _ = teacher_of(reading(config, tmp_path / "plain"))
    (batch,) = batches_of(config, 1)[:1]
    assert cached.signal(batch).form == PLAIN
    answer = OnlineTeacher.signal
    monkeypatch.setattr(OnlineTeacher, "signal", lambda self, batch: replace(answer(self, batch), form=form))
    for kind in ("hidden", "topk"):
        manifest = cache_of(config, tmp_path / kind, kind=kind, dtype="fp32", topk=10)
        assert Manifest.read(tmp_path / kind).key[LOGIT_FORM] == manifest.key[LOGIT_FORM] == [0.5, 3.0]
    hidden, topk = (teacher_of(reading(config, tmp_path / kind))[0].signal(batch) for kind in ("hidden", "topk"))
    assert hidden.form == form
    logits_NV = 3.0 * torch.tanh((0.5 * hidden.hidden_ND @ hidden.weight_VD.T + _bias(hidden)) / 3.0)
    probs_NV = (logits_NV[:, :320] / config.inherit.tau).softmax(-1)
    torch.testing.assert_close(topk.probs_NK, probs_NV.gather(1, topk.ids_NK), rtol=4e-3, atol=0)
    with pytest.raises(UserError, match=r"made with teacher.logit_form=nothing, the run has .*=\[0.5, 3.0\]"):
        cache_of(config, tmp_path / "plain", kind="hidden", dtype="fp32")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"made with teacher.logit_form=\[0.5, 3.0\], the run has .*=None"):
        cache_of(config, tmp_path / "hidden", kind="hidden", dtype="fp32")


def _bias(signal):
    return 0.0 if signal.bias_V is None else signal.bias_V


# ---------------------------------------------------------------------------------- the same training


def weights(run_dir):
    from safetensors.torch import load_file

    return load_file(run_dir / "checkpoints" / "step_00000020" / "hf" / "model.safetensors")


def losses(run_dir):
    return [(r["loss"], r["ce"], r["kl"], r["teacher_flops"]) for r in records(run_dir, "train")]


def train_from(base, name, cache, task="mlm", **groups):
    teacher = {"path": str(cache), "placement": "cache"}
    settings = {"num_steps": 20, "eval_every": 20, "save_every": 10} | groups.pop("train", {})
    return inherit(base, name, task, teacher=teacher, inherit=LONG["inherit"], train=settings, **groups)


@pytest.fixture(scope="module")
def online_runs(base):
    """{task: a run of 20 steps with the teacher online}."""
    train = {"num_steps": 20, "eval_every": 20, "save_every": 10}
    tasks = ("mlm", "causal")
    return {t: inherit(base, f"online_{t}", t, inherit=LONG["inherit"], train=train) for t in tasks}


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_20_steps_from_hidden_states_are_bitwise_those_of_the_online_teacher(base, caches, online_runs, task):
    found = train_from(base, f"from_fp32_{task}", caches(task, kind="hidden", dtype="fp32"), task)
    assert losses(found) == losses(online_runs[task])
    expected = weights(online_runs[task])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(found).items())


def test_a_run_that_began_online_goes_on_from_a_cache(base, caches, online_runs):
    train = {"num_steps": 20, "eval_every": 20, "save_every": 10}
    inherit(base, "began_online", inherit=LONG["inherit"], train=train | {"stop_at_step": 10})
    found = train_from(base, "began_online", caches(kind="hidden", dtype="fp32"))
    assert losses(found) == losses(online_runs["mlm"])
    expected = weights(online_runs["mlm"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(found).items())


def test_float16_states_and_the_whole_vocabulary_train_nearly_the_same(base, caches, online_runs):
    expected = losses(online_runs["mlm"])
    for name, spec in {"fp16": {"kind": "hidden", "dtype": "fp16"}, "k320": {"kind": "topk", "topk": 320}}.items():
        found = losses(train_from(base, f"from_{name}", caches(**spec)))
        np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-4)


def test_a_run_that_reads_goes_on_bitwise_and_needs_no_weights(base, caches, tmp_path):
    """Stopped at step 7 of 20 and called again, with the teacher's folder gone: one and the same run."""
    cache = shutil.copytree(caches(kind="topk", topk=10), tmp_path / "cache")
    whole = train_from(base, "from_topk", cache)
    (base / "mlm_teacher").rename(base / "gone")
    try:
        train_from(base, "from_topk_twice", cache, train={"stop_at_step": 7})
        moved = cache.rename(tmp_path / "moved")
        twice = train_from(base, "from_topk_twice", moved)
    finally:
        (base / "gone").rename(base / "mlm_teacher")
    assert losses(whole) == losses(twice)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(twice).items())
    manifest = json.loads((twice / "run.json").read_text())
    assert manifest["teachers"][0]["lineage"]["name"] == "mlm_teacher"
    assert manifest["teachers"][0]["cache"]["key_sha256"] == Manifest.read(moved).key_sha256
    flops = records(twice, "train")[-1]["teacher_flops"]
    # each token's forward counts as it would online; the cache says what it has cost once
    assert flops == manifest["teachers"][0]["cache"]["forward_flops"] == Manifest.read(moved).forward_flops


def test_a_run_does_not_change_caches_by_itself(base, caches):
    train_from(base, "switching", caches(kind="topk", topk=10), train={"stop_at_step": 3})
    other = caches(kind="topk", topk=4)
    with pytest.raises(UserError, match=r"inherited from the cache .* \(topk, key .* now it is the cache"):
        train_from(base, "switching", other, train={"stop_at_step": 4})
    train_from(base, "switching", other, train={"stop_at_step": 4, "changed_config": "allow"})


# ---------------------------------------------------------------------------------- what does not belong


def refused(config, cache, match):
    with pytest.raises(UserError, match=match) as caught:
        teacher_of(reading(config, cache))
    assert "\n" not in str(caught.value)


OTHER_RUNS = {
    "data.seq_len=32, the run has data.seq_len=24": {"data": {"seq_len": 24}},
    "data.break_mode=complete, the run has data.break_mode=eos": {"data": {"break_mode": "eos"}},
    "data.long_lines=split, the run has data.long_lines=drop": {"data": {"long_lines": "drop"}},
    "data.mask_probability=0.15, the run has data.mask_probability=0.2": {"data": {"mask_probability": 0.2}},
    "data.keep_probability=0.1, the run has data.keep_probability=0.0": {"data": {"keep_probability": 0.0}},
    "data.random_probability=0.1, the run has data.random_probability=0.3": {"data": {"random_probability": 0.3}},
    "data.whole_words=False, the run has data.whole_words=True": {"data": {"whole_words": True}},
    "data.mask_variants=0, the run has data.mask_variants=3": {"data": {"mask_variants": 3}},
    "seed=1, the run has seed=2": {"seed": 2},
    "inherit.tau=2.0, the run has inherit.tau=3.0": {"inherit": {"schedule": "linear", "steps": 4, "tau": 3.0}},
    "teacher.dtype=fp32, the run has teacher.dtype=bf16": {"teacher": {"dtype": "bf16"}},
}


@pytest.mark.parametrize("words", OTHER_RUNS)
def test_a_cache_of_another_run_is_refused_by_the_field(base, caches, words):
    refused(config_of(base, **OTHER_RUNS[words]), caches(kind="topk", topk=10), f"was made with {words}; give the run")


def test_a_cache_of_another_held_out_part_is_refused(base, tmp_path):
    """What is held out of a corpus without a validation part is not trained on."""
    tokens = {"corpus": str(base / "corpus" / "train"), "tokenizer": str(base / "corpus" / "tokenizer")}
    cache_of(config_of(base, data={**tokens, "valid_fraction": 0.2}), tmp_path / "cache", topk=10)
    words = "was made with data.valid_fraction=0.2, the run has data.valid_fraction=0.1; give the run"
    refused(config_of(base, data={**tokens, "valid_fraction": 0.1}), tmp_path / "cache", words)
    words = "was made with data.subset_seed=0, the run has data.subset_seed=4; give the run"
    other = {**tokens, "valid_fraction": 0.2, "subset_seed": 4}
    refused(config_of(base, data=other), tmp_path / "cache", words)


def test_a_cache_of_other_data_is_refused(base, caches):
    cache = caches(kind="topk", topk=10)
    sources = [{"path": str(base / "corpus"), "fraction": 0.5}]
    refused(config_of(base, data={"sources": sources}), cache, "was made with data.sources=.*'fraction': 1.0.* the run")
    refused(config_of(base, "causal"), cache, "was made with task=mlm, the run has task=causal")
    packed = {"packing": True, "break_mode": "eos"}
    refused(
        config_of(base, "causal", data=packed), caches("causal", kind="topk", topk=10), "data.break_mode=none, the run"
    )
    changed = {"train_sha256": "another text", "num_samples": "other", "vocabulary_sha256": "others"}
    assert changed.keys() <= Manifest.read(cache).key.keys()
    other = tiny_corpus(base / "other_text" / "corpus", seed=5, tokenizer=base / "corpus" / "tokenizer")
    refused(config_of(base, data={"corpus": str(other)}), cache, "was made with train_sha256=[0-9a-f]{12}, the run")
    small = tiny_corpus(base / "other_vocabulary" / "corpus", vocab_size=300)
    refused(
        config_of(base, data={"corpus": str(small)}), cache, "was made with vocabulary_sha256=[0-9a-f]{12}, the run"
    )


def test_a_cache_that_knows_the_tokenizer_by_its_former_hash_is_read(base, tmp_path):
    """Token files without a manifest do not tell by which hash their vocabulary was known."""
    tokens = {"corpus": str(base / "corpus" / "train"), "tokenizer": str(base / "corpus" / "tokenizer")}
    config = config_of(base, data={**tokens, "valid_fraction": 0.15})
    data = data_of(config)
    before = replace(data, vocabulary=replace(data.vocabulary, names=data.vocabulary.names[::-1]))
    questions = questions_of(config, before)
    former = former_tokenizer_hash(data.vocabulary.tokenizer)
    assert questions.key["vocabulary_sha256"] == former != questions_of(config).key["vocabulary_sha256"]
    build_cache(tmp_path / "cache", questions, recording_of(config, questions))
    _, facts = teacher_of(reading(config, tmp_path / "cache"))
    assert facts.cache["kind"] == "topk"


def test_every_field_of_the_key_counts(base, caches, tmp_path):
    """A manifest that was forged with all of its hashes does not fit the run, or not its own chunks."""
    config, cache = config_of(base), caches(kind="topk", topk=10)
    honest = Manifest.read(cache)
    for name, value in honest.key.items():
        copy = shutil.copytree(cache, tmp_path / name)
        forged = {"topk": 9, "kind": "hidden"}.get(name, f"not {value}")
        extra = {"hidden_size": 4, "dtype": "fp16"} if name == "kind" else {}
        replace(honest, key=honest.key | {name: forged} | extra).write(copy)
        refused(config, copy, r"was made with |belongs to the cache of key|columns|damaged")


def test_a_run_that_needs_more_is_refused_before_its_first_step(base, caches, tmp_path):
    cache = caches(kind="topk", topk=10)  # 20 steps
    more = config_of(base, train={"num_steps": 400}, inherit={"schedule": "linear", "steps": 21})
    refused(more, cache, r"lacks 8 of the 168 records that steps 1 to 21 need; call tools/cache_teacher\.py again")
    epochs = config_of(base, train={"num_steps": 400}, inherit={"schedule": "linear", "steps": 200})
    refused(
        epochs,
        cache,
        r"lacks 1,440 of the 1,600 records .* \(masks of 3 epochs are needed, it has 1\); .*mask_variants",
    )
    teacher = {"path": str(cache), "placement": "cache"}
    with pytest.raises(UserError, match="lacks 8 of the 168"):
        inherit(base, "hungry", teacher=teacher, inherit={"schedule": "linear", "steps": 21}, train={"num_steps": 21})
    assert not (base / "hungry" / "checkpoints").exists()
    assert not (base / "hungry" / "metrics.jsonl").exists()


def test_static_variants_serve_any_number_of_epochs(base, tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", num_documents=20, tokenizer=base / "corpus" / "tokenizer")
    data = {"corpus": str(corpus), "mask_variants": 2}
    groups = {"data": data, "train": {"num_steps": 60}, "inherit": {"schedule": "constant"}}
    config = config_of(base, **groups)
    manifest = cache_of(config, tmp_path / "cache", epochs=2)
    assert sum(chunk[1] for chunk in manifest.chunks.values()) == 2 * len(data_of(config).train)
    online, _ = teacher_of(config)
    cached, _ = teacher_of(reading(config, tmp_path / "cache"))
    assert 4 * len(data_of(config).train) < 60 * 8
    for batch in batches_of(config, 60)[-4:]:  # of the fifth epoch or later
        probs_NV = (logits_of(online.signal(batch))[:, :320] / 2.0).softmax(-1)
        signal = cached.signal(batch)
        torch.testing.assert_close(signal.probs_NK, probs_NV.gather(1, signal.ids_NK), rtol=4e-3, atol=0)


def test_sources_are_numbered_behind_one_another_and_weights_only_choose(base, tmp_path):
    other = tiny_corpus(tmp_path / "other", num_documents=30, seed=4, tokenizer=base / "corpus" / "tokenizer")

    def weighted(*weights):
        paths = (str(base / "corpus"), str(other))
        return config_of(
            base, data={"sources": [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]}
        )

    config = weighted(1, 1)
    cache_of(config, tmp_path / "cache", kind="hidden", dtype="fp32")
    online, _ = teacher_of(config)
    cached, _ = teacher_of(reading(config, tmp_path / "cache"))
    for batch in batches_of(config):
        assert torch.equal(cached.signal(batch).hidden_ND, online.signal(batch).hidden_ND)
    assert max(int(batch.sample_ids_B.max()) for batch in batches_of(config)) >= 615  # of the second source
    refused(weighted(1, 4), tmp_path / "cache", r"lacks \d+ of the 32 records that steps 1 to 4 need")
    cache_of(weighted(1, 4), tmp_path / "cache", kind="hidden", dtype="fp32")  # makes it larger
    for both in (weighted(1, 1), weighted(1, 4)):
        teacher_of(reading(both, tmp_path / "cache"))


def test_a_damaged_record_ends_the_run_at_once(base, caches, tmp_path):
    cache = shutil.copytree(caches(kind="topk", topk=10), tmp_path / "cache")
    path = next(cache.glob("chunk_*"))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"chunk_0+\.safetensors: the record of sample \d+ (is damaged|answers)"):
        train_from(base, "damaged", cache)
    steps = [record["step"] for record in records(base / "damaged", "train")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < 20


def test_a_masked_input_that_is_not_the_runs_is_noticed(base, caches):
    config = config_of(base)
    teacher, _ = teacher_of(reading(config, caches(kind="topk", topk=10)))
    train = data_of(config).train
    (sample_id, *_) = batches_of(config)[0].sample_ids_B.tolist()
    good = train.sample(sample_id, seed=1, epoch=0)
    teacher.signal(collate([good], pad_id=1, seq_len=32))
    for other in (
        train.sample(sample_id, seed=1, epoch=1),
        train.sample(sample_id, seed=2, epoch=0),
        Sample(sample_id, good.input_ids_T, good.positions_N, good.labels_N + 1),
    ):
        with pytest.raises(UserError, match=f"the record of sample {sample_id} answers another masked input"):
            teacher.signal(collate([other], pad_id=1, seq_len=32))


@pytest.mark.parametrize("path", ["nowhere", "mlm_teacher"])
def test_what_is_no_cache(base, path):
    refused(
        config_of(base), base / path, r"is no teacher cache \(no manifest.json\); make one with tools/cache_teacher"
    )


def test_semantics_that_a_cache_cannot_give(base, caches):
    config = reading(config_of(base), caches(kind="hidden", dtype="fp32"), topk_semantics="tail")
    with pytest.raises(UserError, match=r"topk_semantics=tail has no meaning for .*, a cache of hidden states"):
        teacher_of(config)


def test_a_freed_teacher_is_not_asked(base, caches):
    teacher, _ = teacher_of(reading(config_of(base), caches(kind="hidden", dtype="fp32")))
    assert isinstance(teacher, CachedTeacher)
    teacher.free()
    with pytest.raises(AssertionError, match="freed"):
        teacher.signal(batches_of(config_of(base))[0])
