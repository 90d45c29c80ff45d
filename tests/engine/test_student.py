import dataclasses
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from ki_ds.checkpoints import checkpoint
from ki_ds.config import parse
from ki_ds.data.batches import TrainBatches
from ki_ds.data.store import SpecialIds
from ki_ds.engine import student as engine
from ki_ds.errors import UserError
from ki_ds.files import write_json
from ki_ds.models.presets import build_lm
from ki_ds.training.setup import load_data
from tests import forked
from tests.tiny import ROOT, environment, run, run_ranks, tiny_config, tiny_corpus, write_config
from tests.workers.split_gradients import run_config

BASE = ["--run_dir", "r", "--data.corpus", "c", "--train.global_batch_size", "32", "--train.micro_batch_size", "4"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("engine") / "corpus")


def plain_gradients(corpus_dir):
    """The same global batch in one piece, in float64, without DeepSpeed and without our loss."""
    run = run_config(str(corpus_dir), "0", 8)
    data = load_data(run)
    special = {"num_classes": data.vocabulary.size, "special_ids": data.vocabulary.special_ids}
    student = build_lm(run.model, "mlm", **special, seed=1).double().eval()
    teacher = build_lm(dataclasses.replace(run.model, hidden_size=16), "mlm", **special, seed=2).double().eval()
    ((batch,),) = list(TrainBatches(data.train, seed=5, micro_batch_size=8, global_batch_size=8, num_steps=1))
    z_s, z_t = (
        lm(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits.flatten(0, 1)[batch.rows_N][
            :, : data.vocabulary.size
        ]
        for lm in (student, teacher)
    )
    kl = torch.nn.functional.kl_div((z_s / 2).log_softmax(-1), (z_t / 2).softmax(-1), reduction="sum")
    ce = torch.nn.functional.cross_entropy(z_s, batch.row_labels_N, reduction="sum")
    ((0.4 * ce + 0.6 * 4 * kl) / batch.num_rows).backward()
    return {f"lm.{name}": p.grad.float() for name, p in student.named_parameters()}


def test_gradients_are_equal_for_every_split_of_a_global_batch(corpus, tmp_path):
    expected = plain_gradients(corpus)
    seen = 0
    for world in (1, 2):
        out = tmp_path / f"{world}.pt"
        results = run_ranks(
            ["-m", "tests.workers.split_gradients", str(corpus), str(out), "0", "1", "2", "3"], world=world
        )
        assert [r.returncode for r in results] == [0] * world, results[0].stderr[-3000:]
        for (stage, accumulation), found in torch.load(out).items():
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                case = f"ranks {world}, accumulation {accumulation}, ZeRO {stage}: {name}"
                torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=case)
            seen += 1
    assert seen == 2 * 3 * 4


def test_the_engine_fills_in_what_the_run_decides():
    run = parse([*BASE, "--engine.precision", "bf16", "--optim.max_grad_norm", "1.5"])
    filled = engine.complete_ds_config({"zero_optimization": {"stage": 2}}, run, world=2)
    assert filled["train_batch_size"] == 32
    assert filled["gradient_accumulation_steps"] == 4
    assert filled["gradient_clipping"] == 1.5
    assert filled["bf16"] == {"enabled": True}
    assert filled["fp16"] == {"enabled": False}
    assert filled["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"train_batch_size": 64}, [], "train_batch_size=64, the run needs 32"),
        ({"gradient_clipping": 1.0}, [], "gradient_clipping=1.0, the run needs 0.0"),
        ({"optimizer": {"type": "Adam"}}, [], "sets optimizer, which optim"),
        ({"torch_autocast": {"enabled": True}}, [], "torch_autocast, which engine.precision"),
        ({"checkpoint": {"writer": {"type": "fast"}}}, [], "sets checkpoint, which train.save_in_background"),
        ({"datastates_ckpt": {}}, [], "datastates_ckpt, which train.save_in_background decides"),
        ({"fp16": {"enabled": True}}, [], "fp16.enabled=True, engine.precision=fp32"),
        ({}, ["--engine.precision", "fp16"], "fp16 with ZeRO stage 0"),
        ({"zero_optimization": {"stage": 0}}, ["--engine.precision", "bf16"], "bf16 with ZeRO stage 0"),
        ({}, ["--train.micro_batch_size", "32"], "x 2 ranks"),
        ({"fp16": {"loss_scale": 128}}, [], r"fp16.loss_scale=128, which has no meaning with engine.precision=fp32"),
        ({"zero_optimization": {"stage": 0, "overlap_comm": True}}, [], "overlap_comm=true, .* with ZeRO stage 0"),
        ({"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 9}}, [], "parameters=9, .* ZeRO stage 2"),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, [], "offload_param=.* ZeRO stage 1"),
        (
            {"zero_optimization": {"stage": 1}, "fp16": {"loss_scale": 0, "initial_scale_power": 12}},
            ["--engine.precision", "bf16"],
            "fp16.loss_scale=0, which has no meaning with engine.precision=bf16",
        ),
    ],
)
def test_conflicts_and_settings_that_train_wrongly_are_refused(settings, arguments, words):
    with pytest.raises(UserError, match=words):
        engine.complete_ds_config(settings, parse([*BASE, *arguments]), world=2)


def test_values_that_agree_and_auto_are_taken():
    settings = {"train_batch_size": 32, "gradient_accumulation_steps": "auto", "fp16": {"loss_scale_window": 500}}
    settings |= {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto", "check_grad_overflow": "auto"}}
    filled = engine.complete_ds_config(settings, parse([*BASE, "--engine.precision", "fp16"]), world=2)
    assert filled["fp16"] == {"loss_scale_window": 500, "enabled": True}


def test_a_broken_json_is_one_line(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            engine.read_ds_config(str(tmp_path / name))


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_configs_hold_zero_and_communication_only(path):
    settings = engine.read_ds_config(str(path))
    assert settings.keys() == {"zero_optimization"}
    engine.complete_ds_config(settings, parse([*BASE, "--engine.ds_config", str(path)]), world=2)


def test_weight_decay_spares_norms_and_biases_only_when_asked():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    everything = engine.make_optimizer(model, parse(BASE).optim)
    assert [(len(g["params"]), g["weight_decay"]) for g in everything.param_groups] == [(4, 0.01)]
    spared = engine.make_optimizer(model, parse([*BASE, "--optim.decay_norms_and_biases", "false"]).optim)
    assert [(len(g["params"]), g["weight_decay"]) for g in spared.param_groups] == [(1, 0.01), (3, 0.0)]


@pytest.mark.parametrize(
    ("precision", "zeros"),
    [
        ("fp32", ["zero0", "zero2", "zero3_offload"]),
        pytest.param("fp32", ["zero0", "zero3", "zero2_offload"], marks=pytest.mark.slow),
        ("bf16", ["zero1", "zero3"]),
        ("fp16", ["zero1", "zero3"]),
    ],
)
def test_every_stage_trains_alike(precision, zeros, corpus, tmp_path):
    """Two ranks; the final validation cross-entropy by ZeRO stage, offload and activation checkpointing."""
    if not engine.supports(precision):
        pytest.skip(f"DeepSpeed has no {precision} on this device")
    teacher = write_config(tmp_path / "t.yaml", tiny_config(tmp_path / "teacher", corpus, train={"num_steps": 1}))
    files = [str(teacher)]
    for zero in zeros:
        config = tiny_config(
            tmp_path / zero,
            corpus,
            teacher={"path": str(tmp_path / "teacher")},
            inherit={"schedule": "linear", "steps": 4},
            model={"dropout": 0.0, "attention_dropout": 0.0},
            engine={"ds_config": str(ROOT / f"ds_configs/{zero}.json"), "activation_checkpointing": "zero3" in zero},
        )
        files.append(str(write_config(tmp_path / f"{zero}.yaml", config)))
    results = run_ranks(["-m", "tests.workers.train_many", "--engine.precision", precision, *files], world=2)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-3000:]
    final = {}
    for zero in zeros:
        records = [json.loads(line) for line in (tmp_path / zero / "metrics.jsonl").read_text().splitlines()]
        assert records[-1]["ppl"] < 0.95 * records[0]["ppl"]
        final[zero] = records[-1]["ce"]
    assert max(final.values()) - min(final.values()) < (1e-5 if precision == "fp32" else 5e-2), final


def test_a_second_precision_in_one_process_is_refused(corpus):
    script = (
        "from ki_ds.engine.student import StudentEngine; StudentEngine._precisions_used.add('bf16')\n"
        "from ki_ds.config import parse\n"
        "try: StudentEngine(None, parse(['--run_dir', 'r', '--data.corpus', 'c']), device=None)\n"
        "except ValueError as error: print(error)"
    )
    result = forked.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert "engine.precision=fp32 after ['bf16'] in one process" in result.stdout, result.stderr[-2000:]


def test_compiled_are_the_layers_and_a_model_without_any_is_refused(monkeypatch):
    model = torch.nn.Module()
    special_ids = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=9)
    shape = parse([*BASE, "--model.num_layers", "2", "--model.hidden_size", "8", "--model.num_heads", "2"]).model
    model.lm = build_lm(shape, "mlm", num_classes=10, special_ids=special_ids, seed=1)
    engine._compile_layers(model)
    compiled = [name for name, module in model.lm.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["roberta.encoder.layer.0", "roberta.encoder.layer.1"]
    model.lm = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="no layers in Linear"):
        engine._compile_layers(model)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs no-such-compiler on a CPU"):
        engine._compile_layers(model)


@pytest.mark.parametrize(("seen", "local_rank", "expected"), [(1, "3", "0"), (4, "3", "3"), (1, "0", "0")])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees(seen, local_rank, expected, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert engine._own_device() == torch.device("cuda", int(expected))
    assert os.environ["LOCAL_RANK"] == expected


class OnNvme:
    """A parameter whose part DeepSpeed has put on NVMe: what stands in memory is one element of a shared buffer."""

    def __init__(self, values):
        self.ds_tensor = torch.zeros(1)
        self.ds_tensor.ds_numel, self.ds_tensor.status = len(values), engine.PartitionedParamStatus.NOT_AVAILABLE
        self.nvme_swapper, self._values = self, values

    def swap_into_buffer(self, parameter, buffer):
        assert parameter is self
        buffer.copy_(self._values)


def student_with(parameters, device="cpu"):
    student = engine.StudentEngine.__new__(engine.StudentEngine)
    student.device = torch.device(device)
    student.model = torch.nn.Module()
    student.model.parameters = lambda: iter(parameters)
    return student


def test_weights_are_judged_wherever_they_are_kept():
    offloaded = torch.nn.Parameter(torch.zeros(0))
    offloaded.ds_tensor = torch.ones(3)
    good = [torch.nn.Parameter(torch.ones(2)), offloaded, OnNvme(torch.ones(5))]
    assert student_with(good).weights_are_finite()
    bad = torch.nn.Parameter(torch.zeros(0))
    bad.ds_tensor = torch.tensor([1.0, float("inf")])
    for parameter in (torch.nn.Parameter(torch.tensor([float("nan")])), bad, OnNvme(torch.tensor([1.0, float("nan")]))):
        assert not student_with([*good, parameter]).weights_are_finite()


def test_what_the_ranks_add_up_is_on_the_device_though_the_weights_are_not(monkeypatch):
    """NCCL refuses a tensor of the host; a device without a host's memory stands for a GPU."""

    def nccl(tensor):
        if tensor.device.type == "cpu":
            raise RuntimeError("No backend type associated with device type cpu")
        return torch.zeros(tensor.shape)

    monkeypatch.setattr(engine, "all_sum", nccl)
    offloaded = torch.nn.Parameter(torch.zeros(0))
    offloaded.ds_tensor = torch.ones(3)
    assert student_with([offloaded], device="meta").weights_are_finite()


class Makes:
    """Pickled as a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_names_what_no_training_saves_is_refused_and_not_run(corpus, tmp_path):
    """Its manifest is made anew, as whoever may write the folder can."""
    train = {"num_steps": 2, "stop_at_step": 1}
    folder = run(tmp_path / "run", corpus, train=train)
    (saved,) = (folder / "checkpoints").glob("step_*")
    states = sorted((saved / "engine").glob("*.pt"))
    assert len(states) == 2
    for file in states:
        whole, content = file.read_bytes(), torch.load(file, weights_only=False)
        content["ds_version"] = Makes(tmp_path / "made")
        torch.save(content, file)
        listed = [path for path in saved.rglob("*") if path.name != "manifest.json"]
        write_json(saved / "manifest.json", {"files": checkpoint._sync_and_hash(saved, listed)})
        with pytest.raises(UserError, match=rf"{file.name} pickles posix\.mkdir, which no training of ours has saved"):
            run(tmp_path / "run", corpus, train=train)
        file.write_bytes(whole)
    assert not (tmp_path / "made").exists()


def test_an_architectures_own_loss_counts_as_its_average_over_micro_batches_and_ranks(monkeypatch):
    """Two ranks of two micro-batches with unlike rows: sum(loss) / rows + mean(aux), in gradients and for the guard."""
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    weight = torch.ones((), requires_grad=True)
    seen = torch.zeros(())
    for _ in range(2):  # a rank
        fake = object.__new__(engine.StudentEngine)
        fake._loss = torch.zeros(())
        fake._engine = SimpleNamespace(
            gradient_accumulation_steps=lambda: 2, backward=lambda loss, scale_wrt_gas: loss.backward()
        )
        for loss_sum, aux_loss in ((3.0, 1.0), (9.0, 5.0)):
            fake.backward(weight * loss_sum, torch.tensor(8.0), weight * aux_loss)
        seen += fake._loss
    expected = 2 * (3.0 + 9.0) / 8.0 + (1.0 + 5.0) / 2
    assert float(weight.grad) / 2 == pytest.approx(expected)  # DeepSpeed averages over the two ranks
    assert float(seen) == pytest.approx(expected)
