"""The commands: a cache from a run's own arguments, requests and answers, the benchmark; and every wrong argument."""

import importlib.util
import json
import sys

import pytest

from ki_ds.errors import UserError
from ki_ds.teachers.cache_files import Manifest
from tests.teachers.cache_cases import config_of, reading, teacher_of
from tests.tiny import ROOT, tiny_corpus


def tool_of(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(base, capsys):
    """The tool on the tiny run: (exit code, stdout, stderr)."""

    def call(*arguments, **groups):
        config_of(base, **groups)  # writes the configuration
        code = tool_of("cache_teacher").run([*map(str, arguments), "--config", str(base / "cached.yaml")])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_a_cache_from_the_runs_own_arguments(base, command, tmp_path):
    out = tmp_path / "cache"
    code, said, _ = command("--out", out, "--topk", "4", "--inherit.tau", "3", "--local_rank", "0")
    assert code == 0
    assert "of 6 steps the first 4 have alpha above 0: only these are cached" in said
    assert f"train with --teacher.placement cache --teacher.path {out}" in said
    assert "bytes a row" in said
    key = Manifest.read(out).key
    assert (key["topk"], key["inherit.tau"], key["teacher.dtype"]) == (4, 3.0, "fp32")
    run = config_of(base, inherit={"schedule": "linear", "steps": 4, "tau": 3.0})
    teacher_of(reading(run, out))
    # the same configuration that will train may name the cache already: then the tool wants to know the teacher
    later = {"teacher": {"placement": "cache", "path": str(out)}}
    code, _, err = command("--out", out, "--topk", "4", "--inherit.tau", "3", **later)
    assert (code, err.count("\n")) == (2, 1)
    assert "names no teacher that could run; give --teacher FOLDER" in err
    again = ["--out", out, "--topk", "4", "--inherit.tau", "3", "--teacher", base / "mlm_teacher", "--steps", "2"]
    code, said, _ = command(*again, **later)
    assert (code, "all records for steps 1 to 2 are there" in said) == (0, True)


def test_a_cache_for_one_of_several_teachers(base, command, tmp_path):
    """Only the samples of its domains, found by the entry that --teacher names, or given with --domains."""
    other = base / "tool_other"
    if not other.exists():
        tiny_corpus(other, seed=9, num_documents=60, tokenizer=base / "corpus" / "tokenizer")
    path = str(base / "mlm_teacher")
    sources = [{"path": str(base / "corpus"), "domain": "A"}, {"path": str(other), "domain": "B"}]
    run = {
        "data": {"corpus": "", "sources": sources},
        "teacher": {"path": None},
        "teachers": [{"path": path, "domains": ["B"]}],
    }
    counts = {}
    for name, arguments in {"B": ["--teacher", path], "A": ["--teacher", path, "--domains", "A"]}.items():
        code, said, _ = command("--out", tmp_path / name, *arguments, **run)
        assert (code, f"and {tmp_path / name} as its entry's path" in said) == (0, True)
        counts[name] = sum(chunk[1] for chunk in Manifest.read(tmp_path / name).chunks.values())
    assert counts["A"] > 0 < counts["B"]
    assert sum(counts.values()) == 4 * 8  # every sample of the four taught steps is in one of the two
    asked = tmp_path / "asked.jsonl"
    assert command("--export_requests", asked, "--domains", "B", **run)[0] == 0
    assert len(asked.read_text().splitlines()) == counts["B"]
    for arguments, message in {
        (): "the run has several teachers; say with --teacher which one",
        ("--teacher", "elsewhere"): "the run's teachers have domains; say with --domains",
        ("--teacher", path, "--domains", "X"): "--domains X is no domain that the run trains on; take of A, B",
    }.items():
        code, _, err = command("--out", tmp_path / "none", *arguments, **run)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    rare = [sources[0] | {"weight": 1}, sources[1] | {"weight": 1000}]
    arguments = ("--teacher", path, "--domains", "A", "--steps", "1")
    code, _, err = command("--out", tmp_path / "none", *arguments, **run | {"data": {"corpus": "", "sources": rare}})
    assert (code, "no sample of the domains comes in 1 steps" in err) == (2, True)
    assert not list((tmp_path / "none").glob("*.json"))


def test_hidden_states_of_an_epoch(base, command, tmp_path):
    out = tmp_path / "cache"
    code, _, _ = command("--out", out, "--kind", "hidden", "--dtype", "int8", "--epochs", "1", "--chunk_mb", "1")
    manifest = Manifest.read(out)
    assert (code, manifest.key["dtype"]) == (0, "int8")
    assert sum(chunk[1] for chunk in manifest.chunks.values()) == -(-manifest.key["num_samples"] // 8) * 8


def test_requests_and_answers(base, command, tmp_path):
    asked, answers, out = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl", tmp_path / "cache"
    assert command("--export_requests", asked)[0] == 0
    with answers.open("w") as file:
        for line in asked.read_text(encoding="utf-8").splitlines():
            request = json.loads(line)
            rows = [{"ids": [5, 6, 7], "log_probs": [-0.7, -1.2, -3.0]} for _ in request["positions"]]
            file.write(json.dumps({"sample_id": request["sample_id"], "mask": request["mask"], "rows": rows}) + "\n")
    code, said, _ = command("--import_answers", answers, "--out", out, "--topk", "3", "--teacher_parameters", "7000")
    assert (code, "bytes a row" in said) == (0, True)
    _, facts = teacher_of(reading(config_of(base), out))
    assert (facts.dense_parameters, facts.path) == (7000, str(answers))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --out CACHE to write a cache, or --export_requests FILE"),
        (["--out", "{tmp}/c", "--export_requests", "{tmp}/r"], "give --out CACHE to write a cache, or"),
        (["--out", "{tmp}/c", "--kind", "hidden", "--topk", "4"], "--topk has no meaning with the other arguments"),
        (["--out", "{tmp}/c", "--dtype", "fp16"], "--dtype has no meaning with the other arguments"),
        (["--out", "{tmp}/c", "--answers_tau", "1"], "--answers_tau has no meaning"),
        (["--out", "{tmp}/c", "--teacher_parameters", "1"], "--teacher_parameters has no meaning"),
        (["--out", "{tmp}/c", "--import_answers", "a", "--teacher", "b"], "--teacher has no meaning"),
        (["--out", "{tmp}/c", "--import_answers", "a", "--kind", "hidden"], "--kind hidden has no meaning"),
        (["--out", "{tmp}/c", "--steps", "1", "--epochs", "1"], "--epochs has no meaning with the other arguments"),
        (["--out", "{tmp}/c", "--topk", "0"], "--topk 0 is not positive; change it"),
        (["--out", "{tmp}/c", "--chunk_mb", "-1"], "--chunk_mb -1 is not positive; change it"),
        (["--out", "{tmp}/c", "--topk", "400"], "--topk 400 is outside [1, 320]"),
        (["--out", "{tmp}/c", "--teacher", "{tmp}/nobody"], "nobody cannot be read as a model"),
        (["--out", "{tmp}/c", "--inherit.stepz", "4"], "inherit.stepz"),
        (["--out", "{tmp}/c", "--import_answers", "{tmp}/nothing"], "nothing cannot be read"),
        (["--export_requests", "/dev/null/asked"], "/dev/null/asked cannot be written (File exists)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, arguments, message):
    code, _, err = command(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not list(tmp_path.glob("c/*.safetensors"))


def test_a_run_without_a_teacher_asks_nothing(command, tmp_path):
    code, _, err = command("--out", tmp_path / "c", inherit={"schedule": "none"}, teacher={"path": None})
    assert (code, "inherit.schedule=none asks no teacher" in err) == (2, True)


def test_top_k_semantics_belong_to_a_cache(base):
    with pytest.raises(UserError, match=r"topk_semantics=tail has no meaning without teacher.topk or"):
        config_of(base, teacher={"topk_semantics": "tail"})
    with pytest.raises(UserError, match=r"inherit.schedule=linear needs a teacher"):
        config_of(base, teacher={"placement": "cache", "path": None})
    with pytest.raises(UserError, match=r"teacher.placement=cache needs a folder"):
        config_of(base, teacher={"placement": "cache", "path": None}, inherit={"schedule": "none"})
