import contextlib
import dataclasses
import hashlib
import html
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ki_ds.errors import UserError
from ki_ds.experiments import recipes as experiment
from ki_ds.experiments import reproduce
from ki_ds.experiments.recipes import experiments
from ki_ds.experiments.reproduce import Request, plan
from ki_ds.jobs.chain import local_places
from ki_ds.reports.results import read_run
from tests import forked
from tests.tiny import ROOT, environment, tiny_corpus

FEW_STEPS = {
    "data": {"max_valid_samples": 4},
    "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 32},
    "train": {"num_steps": 3, "global_batch_size": 4, "micro_batch_size": 4, "eval_every": 3, "save_every": 3},
    "inherit": {"steps": 2},
    "monitor": {"progress": "none"},
    "engine": {"num_threads": 1},
}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """Tiny corpora of the three domains with one tokenizer, and the text of one."""
    folder = tmp_path_factory.mktemp("domains")
    made = {"WB": tiny_corpus(folder / "WB", seed=0)}
    for seed, domain in enumerate(("CS", "BIO"), start=1):
        made[domain] = tiny_corpus(folder / domain, seed=seed, tokenizer=made["WB"] / "tokenizer")
    return made


def request(tmp_path, corpora, recipe="fig1a", **values):
    needed = experiment.read_recipe(recipe).domains
    data = {domain: [str(corpora[domain])] for domain in needed}
    return Request(**{"recipe": recipe, "scale": "tiny", "data": data, "out": tmp_path / "tiny"} | values)


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs are trained here, a few steps each with the smallest of models; the names of those that were."""
    from ki_ds import config as configuration
    from ki_ds.jobs.supervisor import is_finished
    from ki_ds.training.loop import train

    trained = []

    def run_jobs(jobs, places, **_):
        for job in jobs:
            if is_finished(job.run_dir):
                continue
            groups = job.groups
            for name, values in FEW_STEPS.items():
                adapts = name == "model" and groups["model"].get("init") == "pretrained"
                unneeded = name == "inherit" and "steps" not in groups.get("inherit", {})
                groups[name] = {**groups.get(name, {}), **({} if adapts or unneeded else values)}
            groups["train"].pop("keep_every", None)
            if "topk" in groups.get("teacher", {}):
                groups["teacher"]["topk"] = min(groups["teacher"]["topk"], 300)  # of 320 ids
            train(configuration.of_groups(groups))
            trained.append(job.name)

    monkeypatch.setattr(reproduce, "run_jobs", run_jobs)
    return trained


@pytest.fixture(scope="session")
def shared_out(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


QUICK = ["fig1a", "fig1c", "fig2a", "tab3"]  # every kind of run there is; the others are the same in other numbers


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in experiments()]
)
def test_an_experiment_trains_a_few_steps_and_is_reported(name, shared_out, corpora, in_this_process, monkeypatch):
    monkeypatch.setattr(reproduce, "_run_tool", lambda *_: None)
    planned = plan(request(shared_out, corpora, name))
    reproduce.reproduce(planned, local_places())
    for job in planned.jobs:
        found = read_run(job.run_dir)
        assert found.curve[-1].costs.steps == 3
        assert len(found.teachers) == len(planned.recipe.runs[job.run_dir.name].teachers)
    for page in planned.recipe.report or {""} if planned.jobs else ():
        path = shared_out / "tiny" / "reports" / f"{'_'.join(filter(None, (name, page)))}.html"
        assert html.escape(planned.recipe.title) in path.read_text()


def test_experiments_share_their_runs(tmp_path, corpora, in_this_process):
    reproduce.reproduce(plan(request(tmp_path, corpora, "fig1a")), local_places())
    assert in_this_process == ["seed1/base", "seed1/large", "seed1/base_to_large"]
    in_this_process.clear()
    reproduce.reproduce(plan(request(tmp_path, corpora, "fig2b", baselines=False)), local_places())
    assert in_this_process == ["seed1/base_to_base_plus", "seed1/base_to_base_plus_to_large"]


def test_texts_are_prepared_with_the_first_domains_tokenizer(tmp_path, corpora, in_this_process):
    data = {domain: [str(path.with_suffix(".txt"))] for domain, path in corpora.items()}
    scale = experiment.Scale(vocab_size={"mlm": 300}, valid_fraction=0.1)
    planned = plan(request(tmp_path, corpora, "fig3b", data={"WB": data["WB"], "CS": data["CS"]}))
    reproduce._prepare(dataclasses.replace(planned, scale=scale))
    made = [planned.corpora[domain] / "tokenizer" / "tokenizer.json" for domain in ("WB", "CS")]
    assert made[0].read_bytes() == made[1].read_bytes()
    assert len(planned.texts["WB"]) == 1


def test_a_prepared_corpus_lends_its_tokenizer_to_texts(tmp_path, corpora):
    data = {"WB": [str(corpora["WB"])], "CS": [str(corpora["CS"].with_suffix(".txt"))]}
    planned = plan(request(tmp_path, corpora, "fig3b", data=data))
    reproduce._prepare(planned)
    own, lent = corpora["WB"] / "tokenizer", planned.corpora["CS"] / "tokenizer"
    assert (own / "tokenizer.json").read_bytes() == (lent / "tokenizer.json").read_bytes()


def test_without_text_the_tiny_scale_reads_the_demos(tmp_path):
    pytest.importorskip("gensim")
    planned = plan(Request(recipe="fig1a", scale="tiny", data={}, out=tmp_path))
    assert [path.name for path in planned.texts["WB"]] == [reproduce.gensim_dump_path().name]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"data": {}, "scale": "paper"},
            "fig1a reads the domain WB, and scale paper brings no text of it; give --data WB",
        ),
        ({"data": {"CS": ["x"]}}, "--data CS: fig1a reads WB only; leave it out"),
        ({"data": {"WB": ["/nowhere/*.txt"]}}, "--data WB=/nowhere/.*: no such file"),
        ({"baselines": False}, "fig1a has no runs that could be left out; leave the option out"),
        ({"downstream": "sets"}, "--downstream sets: fig1a fine-tunes nothing; leave it out"),
        ({"tokenizer": "gpt2"}, "--tokenizer gpt2: no text is tokenized"),
        ({"recipe": "fig1z"}, "fig1z is no experiment"),
        ({"scale": "huge"}, "huge is no scale; take one of one_gpu, paper, tiny"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_in_a_line(tmp_path, corpora, values, message):
    given = {"recipe": "fig1a", "scale": "tiny", "data": {"WB": [str(corpora["WB"])]}, "out": tmp_path} | values
    with pytest.raises(UserError, match=message):
        plan(Request(**given))


# --- commands for afterwards --------------------------------------------------------------------------------------


def then(planned, monkeypatch, command):
    """The words that a command of `then` becomes."""
    seen = []
    monkeypatch.setattr(reproduce, "run_group", lambda words, _: seen.append(words[1:]) or (0, None))
    reproduce._run_tool(planned, "label", command)
    return seen[0] if seen else None


def test_names_in_a_command_become_folders(tmp_path, corpora, monkeypatch):
    planned = plan(request(tmp_path, corpora, "glue", downstream="sets", seeds=2))
    words = then(planned, monkeypatch, "tools/x.py {large} {data:WB} {seq_len} {downstream}/cola --out {out}.json")
    out = tmp_path / "tiny"
    assert words == [
        str(ROOT / "tools/x.py"),
        *(str(out / "seed1" / "large"), str(corpora["WB"]), "64", "sets/cola"),
        *("--out", str(out / "reports" / "glue_label.json")),
    ]
    with pytest.raises(UserError, match=r"\{nobody\} in `then` names no run"):
        then(planned, monkeypatch, "tools/x.py {nobody}")


def test_a_command_that_needs_downstream_sets_is_left_out_with_a_line(tmp_path, corpora, monkeypatch, capsys):
    assert then(plan(request(tmp_path, corpora)), monkeypatch, "tools/x.py {downstream}") is None
    assert "label: left out, it needs downstream sets (--downstream FOLDER)" in capsys.readouterr().out


def test_texts_in_a_command_are_those_given(tmp_path, corpora, monkeypatch):
    data = {domain: [str(path.with_suffix(".txt"))] for domain, path in corpora.items()}
    words = then(plan(request(tmp_path, corpora, "tab9", data=data)), monkeypatch, "tools/x.py {texts}")
    assert words[1:] == [f"{domain}={paths[0]}" for domain, paths in data.items()]
    with pytest.raises(UserError, match="is a corpus; tab9 needs its text"):
        then(plan(request(tmp_path, corpora, "tab9")), monkeypatch, "tools/x.py {texts}")


def test_a_command_that_fails_is_named(tmp_path, corpora, monkeypatch):
    monkeypatch.setattr(reproduce, "run_group", lambda *_: (3, None))
    with pytest.raises(UserError, match="forgetting ended with exit code 3"):
        reproduce._run_tool(plan(request(tmp_path, corpora)), "forgetting", "tools/x.py")


@pytest.mark.parametrize("name", experiments())
def test_every_command_of_every_recipe_can_be_filled(name, tmp_path, corpora, monkeypatch):
    data = {domain: [str(path.with_suffix(".txt"))] for domain, path in corpora.items()}
    needed = {domain: data[domain] for domain in experiment.read_recipe(name).domains}
    downstream = "sets" if name in ("glue", "tab2", "tab3") else None
    planned = plan(request(tmp_path, corpora, name, data=needed, downstream=downstream))
    for command in planned.recipe.then.values():
        words = then(planned, monkeypatch, command)
        assert Path(words[0]).exists()
        assert not any("{" in word for word in words)


# --- the command line ---------------------------------------------------------------------------------------------


def tool(*words):
    command = ["bash", str(ROOT / "launchers" / words[0]), *map(str, words[1:])]
    env = environment(PYTHON=sys.executable)
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)


def forked_tool(*words):
    """What the launchers come to."""
    command = [sys.executable, "tools/reproduce.py", *words]
    return forked.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    done = tool("chain_gpt_73m_to_1b.sh", "--scale", "tiny", "--dry_run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "seed1/gpt_73m_124m_209m_354m_773m_1b" in done.stdout
    assert "seed1/gpt_1b" not in done.stdout
    assert not (tmp_path / "out").exists()
    done = forked_tool("fig2a", "--scale", "tiny", "--dry_run", "--out", tmp_path / "out")
    assert "seed1/gpt_1b" in done.stdout


def test_the_papers_scale_is_planned_without_any_corpus(tmp_path):
    done = forked_tool("fig2b", "--dry_run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("│ 125,000 │") == 7
    assert done.stdout.count("best teacher.placement") == 4
    assert done.stdout.count("optimizer states") == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fig1a"], "--data WB=TEXT"),
        (["fig1a", "--seeds", "0"], "--seeds 0 is too small; give at least 1"),
        (["fig1a", "--data", "WB"], "--data WB is not DOMAIN=PATH"),
        (["fig0"], "fig0 is no experiment"),
        (["fig1a", "--scale", "tiny", "--hostfile", "/none"], "/none is no file; give a hostfile"),
    ],
)
def test_bad_input_is_one_line(words, message):
    done = forked_tool(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# --- killed and called again --------------------------------------------------------------------------------------

SCALE = """
vocab_size: {mlm: 320, causal: 320}
inherit_share: 0.5
settings:
  mlm:
    data: {seq_len: 32, num_workers: 0, max_valid_samples: 8}
    model: {num_positions: 32}
    engine: {ds_config: ds_configs/zero0.json, precision: fp32}
    train: {num_steps: 12, global_batch_size: 4, micro_batch_size: 4, eval_every: 6, save_every: 3, keep_every: 6}
models:
"""
SIZE = "{model: {num_layers: 1, hidden_size: %d, num_heads: 2, ffn_size: 32}, optim: {lr: 1.0e-3}}\n"


def weights(out):
    """SHA-256 of the best weights of every run."""
    files = sorted(out.glob("seed*/*/best/model.safetensors"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_chain_killed_anywhere_and_called_again_ends_with_the_same_models(tmp_path, corpora):
    """G1 -> G2 -> G3; SIGKILL to the whole tree of processes at six random moments."""
    scale = tmp_path / "small.yaml"
    names = ("roberta_base", "roberta_base_plus", "roberta_large")
    scale.write_text(
        SCALE + "".join(f"  {name}: {SIZE % width}" for name, width in zip(names, (8, 16, 24), strict=True))
    )
    words = ["--scale", scale, "--data", f"WB={corpora['WB']}", "--no_baselines"]
    whole = tool("chain_roberta_g1_g2_g3.sh", *words, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    choose, kills = random.Random(0), 0
    command = [
        "bash",
        str(ROOT / "launchers/chain_roberta_g1_g2_g3.sh"),
        *map(str, words),
        "--out",
        str(tmp_path / "cut"),
    ]
    for _ in range(6):
        process = subprocess.Popen(command, env=environment(PYTHON=sys.executable), cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=choose.uniform(8, 40))
            break
        except subprocess.TimeoutExpired:
            kills += 1
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in tree:
                with contextlib.suppress(psutil.Error):
                    each.kill()
            process.wait()
    done = tool("chain_roberta_g1_g2_g3.sh", *words, "--out", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    assert kills >= 3
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert len(weights(tmp_path / "cut")) == 3
    assert (tmp_path / "cut" / "reports" / "fig2b.html").exists()
