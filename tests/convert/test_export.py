"""tools/convert_to_hf.py from end to end: what is written, that it is checked, and that nothing else is left."""

import contextlib
import importlib.util
import io
import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from ki_ds.checkpoints.lineage import read
from ki_ds.convert import export, sources
from ki_ds.convert.export import Options, convert, made_up_rows
from ki_ds.data.corpora import Document
from ki_ds.data.store import SpecialIds, StoreWriter
from ki_ds.data.tokenize import load_tokenizer, train_tokenizer
from ki_ds.errors import UserError
from ki_ds.models.presets import weights_sha256
from tests import forked
from tests.convert.fairseq_files import PAD, Gpt, Roberta, rows, save
from tests.tiny import ROOT, environment

FAIRSEQ = {"mlm": Roberta, "causal": Gpt}
AUTO = {"mlm": hf.AutoModelForMaskedLM, "causal": hf.AutoModelForCausalLM}


def converted(path, output, **options):
    """The lines that a conversion says."""
    lines = []
    convert(Path(path), Path(output), Options(**options), say=lines.append)
    return lines


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "tokenizer"
    train_tokenizer([Document("one", ["the cat sees a dog in the garden"] * 5)], 280, out_dir=folder)
    return folder


@pytest.mark.parametrize("task", FAIRSEQ)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_fairseq_file_becomes_a_folder(tmp_path, tokenizer, task, dtype):
    model = FAIRSEQ[task](len(load_tokenizer(tokenizer))).float().double()
    path, out = save(tmp_path / "model.pt", model), tmp_path / "new" / "out"
    lines = converted(path, out, tokenizer=tokenizer, dtype=dtype, license="mit")
    figures = [float(line.split(" by ")[1].split()[0]) for line in lines if "direct evaluation" in line]
    assert 0 < figures[0] < 1e-4
    assert figures[1] < 1e-10
    assert any(f"weights in {dtype} change logits" in line for line in lines) is (dtype != "fp32")
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names |= {"generation_config.json"} if task == "causal" else set()
    assert {file.name for file in out.iterdir()} == names
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in out.iterdir())
    assert {p.name for p in out.parent.iterdir()} == {"out"}
    loaded = AUTO[task].from_pretrained(out)
    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {stored}
    assert loaded.dtype == stored  # as config.json says
    ids = rows(model)
    with torch.no_grad():
        found = loaded.float()(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        difference = float((found - model.logits(ids))[ids != PAD].abs().max())
    assert difference < (1e-4 if dtype == "fp32" else 1.0)
    assert "license: mit" in (out / "README.md").read_text()


def test_pipelines_take_the_folders(tmp_path, tokenizer):
    size = len(load_tokenizer(tokenizer))
    for task, model in (("mlm", Roberta(size)), ("causal", Gpt(size))):
        converted(save(tmp_path / f"{task}.pt", model), tmp_path / task, tokenizer=tokenizer)
    fill = hf.pipeline("fill-mask", str(tmp_path / "mlm"))
    answers = fill("the cat <mask> a dog", top_k=3)
    assert [set(answer) for answer in answers] == [{"score", "token", "token_str", "sequence"}] * 3
    generate = hf.pipeline("text-generation", str(tmp_path / "causal"))
    (text,) = generate("the cat", max_new_tokens=4, do_sample=False)
    assert text["generated_text"].startswith("the cat")


@pytest.mark.parametrize("task", FAIRSEQ)
def test_a_run_of_ours(base, tmp_path, task):
    run = base / f"{task}_teacher"
    lines = converted(run, tmp_path / "best")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "best", run / "best"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert f"{len(found)} of {len(found)} tensors are the source's by name, bit for bit" in lines
    record = read(tmp_path / "best", weights_sha256(str(tmp_path / "best")))
    assert record["name"] == f"{task}_teacher"
    card = (tmp_path / "best" / "README.md").read_text()
    assert "## Lineage" in card
    assert f"{task}_teacher ({task}," in card
    converted(run, tmp_path / "last", step=8, dtype="bf16")
    assert AUTO[task].from_pretrained(tmp_path / "last").dtype == torch.bfloat16


def test_a_deepspeed_folder(base, tmp_path):
    step = base / "mlm_teacher" / "checkpoints" / "step_00000008"
    lines = converted(step / "engine", tmp_path / "out", config=step / "hf" / "config.json")
    assert any("read with torch.load(weights_only=True)" in line for line in lines)
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", step / "hf"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_rows_of_a_token_file(tmp_path):
    path, special = save(tmp_path / "model.pt", Gpt()), SpecialIds(bos=0, pad=1, eos=2, unk=3)
    for name, largest in (("valid", 101), ("other", 900)):
        with StoreWriter(
            tmp_path / name, vocab_size=1000, special_ids=special, tokenizer_hash=None, source={}
        ) as store:
            store.add_document([[i % largest for i in range(4, 400)]])
    assert "4 rows of data" in "".join(converted(path, tmp_path / "beside"))
    with pytest.raises(UserError, match=r"the token file has id \d+, the model 101; give its own with --data"):
        converted(path, tmp_path / "out", data=tmp_path / "other")
    with pytest.raises(UserError, match="nothing"):
        converted(path, tmp_path / "out", data=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["body", "written", "float64"])
def test_a_wrong_conversion_is_noticed_and_leaves_nothing(tmp_path, monkeypatch, part):
    right, path = sources.to_hf, save(tmp_path / "model.pt", Roberta())

    def wrong(model, dtype):
        made = right(model, dtype)
        if part == "body" or (part == "float64" and dtype == torch.float64):
            with torch.no_grad():
                made.roberta.encoder.layer[1].output.dense.bias[0] += 1e-2 if part == "body" else 1e-8
        return made

    monkeypatch.setattr(sources, "to_hf", wrong)
    if part == "written":
        monkeypatch.setattr(export, "load_lm", lambda *_, **__: right_but_shifted(right, path))
    with pytest.raises(UserError, match=r"logits differ from the source's by .*nothing was left"):
        converted(path, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"model.pt"}


def right_but_shifted(right, path):
    made = right(sources.read_fairseq(path), torch.float32)
    made.lm_head.bias.data += 1e-3
    return made


def test_weights_that_fp16_cannot_hold(tmp_path):
    model = Gpt()
    state = model.state()
    state["decoder.layers.0.fc1.bias"] += 1e6
    path = save(tmp_path / "model.pt", model, state=state)
    with pytest.raises(UserError, match="--dtype=fp16 cannot hold these weights"):
        converted(path, tmp_path / "out", dtype="fp16")
    state["decoder.layers.0.fc1.bias"] += torch.nan
    with pytest.raises(UserError, match="differ from the source's by nan"):
        converted(save(tmp_path / "nan.pt", model, state=state), tmp_path / "out")


def test_random_rows_have_full_length_padding_and_every_id():
    full, padded = made_up_rows(50, 512, 1)
    assert full.shape == (1, 512)
    assert set(full.flatten().tolist()) == set(range(50)) - {1}
    assert [(row != 1).sum().item() for row in padded] == [32, 16, 1]
    assert made_up_rows(50, None, None)[0].shape == (1, 128)


# --- the command ------------------------------------------------------------------------------------------------


def command(*arguments, **settings):
    """The tool in a process of its own, where neither fairseq nor DeepSpeed can be imported."""
    blocked = "import sys, runpy; sys.modules.update(fairseq=None, deepspeed=None); sys.argv = sys.argv[1:]; "
    code = blocked + "runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tools" / "convert_to_hf.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        **settings,
    )


def test_the_command_needs_neither_fairseq_nor_deepspeed(tmp_path):
    path = save(tmp_path / "model.pt", Gpt())
    done = command(path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "direct evaluation" in done.stdout
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_positions == 20


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def test_the_command_on_bad_input_is_one_line(tmp_path, tokenizer):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("a", "b")
    torch.save({"args": Evil(tmp_path / "ran"), "model": {}}, tmp_path / "evil.pt")
    torch.save({"args": Evil(tmp_path / "ran")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    good = save(tmp_path / "good.pt", Gpt())
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "taken").mkdir()
    whole, name = Gpt().state(), "decoder.layers.1.fc2.bias"
    save(tmp_path / "lacking.pt", Gpt(), state={other: tensor for other, tensor in whole.items() if other != name})
    save(tmp_path / "more.pt", Gpt(), state=whole | {"decoder.layers.1.attn_ln.weight": torch.zeros(3)})
    save(tmp_path / "wrong.pt", Gpt(), state=whole | {name: torch.zeros(3)})
    torch.save({"args": {"arch": "bart_large"}, "model": {"encoder.x": torch.zeros(1)}}, tmp_path / "bart.pt")
    before = {p.name for p in tmp_path.iterdir()}
    for words, *arguments in (
        ("pickles posix.system", tmp_path / "evil.pt", tmp_path / "out"),
        ("pickles posix.system", tmp_path / "old.pt", tmp_path / "out"),
        ("zip file without data.pkl", tmp_path / "empty.zip", tmp_path / "out"),
        ("cut.pt", tmp_path / "cut.pt", tmp_path / "out"),
        ("exists already", good, tmp_path / "taken"),
        ("exists already", good, good),
        (f"lacks {name} [24]", tmp_path / "lacking.pt", tmp_path / "out"),
        ("has decoder.layers.1.attn_ln.weight [3]", tmp_path / "more.pt", tmp_path / "out"),
        (f"{name} is [3], not [24]", tmp_path / "wrong.pt", tmp_path / "out"),
        ("arch=bart_large", tmp_path / "bart.pt", tmp_path / "out"),
        ("ids, the model's embedding 101", good, tmp_path / "out", "--tokenizer", tokenizer),
        ("INPUT and OUTPUT are needed", good),
        ("stands alone", good, tmp_path / "out", "--from_hf", tmp_path),
        ("--step=3 has no meaning", good, tmp_path / "out", "--step", "3"),
    ):
        ended = called(arguments)
        assert ended[0] == 2, words
        assert ended[1].startswith("error: ")
        assert words in ended[1]
        assert ended[1].count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == before


def called(arguments):
    """(exit code, stderr) of the tool's main, in this process."""
    spec = importlib.util.spec_from_file_location("convert_to_hf", ROOT / "tools" / "convert_to_hf.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    said, before = io.StringIO(), sys.argv
    sys.argv = ["convert_to_hf.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return tool.main(), said.getvalue()
    finally:
        sys.argv = before


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    path = save(tmp_path / "model.pt", Gpt(4129))

    small = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    small += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [ROOT / "tools" / "convert_to_hf.py", path, tmp_path / "out"]
    done = forked.run([sys.executable, "-c", small, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"model.pt"}


def test_a_folder_that_cannot_be_written(tmp_path):
    path = save(tmp_path / "model.pt", Gpt())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        converted(path, tmp_path / "file" / "out")


def test_what_an_interrupted_conversion_left_is_replaced(tmp_path):
    path = save(tmp_path / "model.pt", Gpt())
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "model-00001-of-00002.safetensors").write_text("old")
    converted(path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    assert not list((tmp_path / "out").glob("model-*"))
