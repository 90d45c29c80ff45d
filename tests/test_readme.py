"""Every command of the README runs, in a copy of the tree with smaller recipes."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from tests import forked
from tests.tiny import ROOT, environment, run_ranks, tiny_corpus

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
TOLD = {"capture_output": True, "text": True}
BY_CI = {"make demo", "make test", "make check", "source .venv/bin/activate"}  # .ci/run runs these


def commands():
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [line for block in blocks for line in block.splitlines() if line not in BY_CI]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The tree without its tests, with a demo of four steps whose teacher and self-learner are finished."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("launchers", "ds_configs", "tools", "ki_ds"):
        shutil.copytree(ROOT / name, root / name)
    for recipe in (root / "launchers" / "recipes").glob("demo_mlm*.yaml"):
        values = yaml.safe_load(recipe.read_text())
        if "train" in values:
            values["train"] |= {"num_steps": 4, "eval_every": 2, "save_every": 2}
        if "data" in values:
            values["data"]["max_valid_samples"] = 16
        if "inherit" in values:
            values["inherit"]["steps"] = 2
        recipe.write_text(yaml.safe_dump(values))
    scale = root / "launchers" / "recipes" / "scales" / "tiny.yaml"
    values = yaml.safe_load(scale.read_text()) | {"texts": {"WB": "my_text.txt"}, "valid_fraction": 0.1}
    values["vocab_size"] = dict.fromkeys(("mlm", "causal"), 400)
    for groups in values["settings"].values():
        groups["train"] |= {"num_steps": 4, "eval_every": 2, "save_every": 2, "keep_every": None}
    scale.write_text(yaml.safe_dump(values))
    tiny_corpus(root / "runs" / "demo_mlm" / "corpus")
    shutil.move(root / "runs" / "demo_mlm" / "corpus.txt", root / "my_text.txt")
    train = "launchers/train_ki.sh --config launchers/recipes/demo_mlm.yaml"
    for overlay in ("", " --config launchers/recipes/demo_mlm_teacher.yaml"):
        run = forked.run([sys.executable, *(train + overlay).split()], cwd=root, env=environment(), **TOLD)
        assert run.returncode == 0, run.stderr[-2000:]
    return root


def test_the_readme_has_the_main_entry():
    assert "deepspeed launchers/train_ki.sh" in commands()
    assert len(commands()) == 12


def start(command, tree):
    """The results of its processes: DeepSpeed's launcher is used once as typed; else what it and `python` start."""
    name, *words = shlex.split(command)
    if name == "python":
        return [forked.run([sys.executable, *words], cwd=tree, env=environment(), **TOLD)]
    if name == "deepspeed" and words[0] == "--num_gpus":
        return run_ranks(words[2:], world=int(words[1]), cwd=tree)
    env = environment(PYTHONPATH=str(tree))  # the copy, not the package that is installed
    return [subprocess.run([name, *words], cwd=tree, env=env, **TOLD)]


def runs(command, tree):
    for run in start(command, tree):
        assert run.returncode == 0, f"{command}\n{run.stdout[-1500:]}{run.stderr[-1500:]}"
        assert "Traceback" not in run.stdout + run.stderr, command


def test_commands_run_in_their_order(tree):
    for command in commands():
        if "chain_" not in command:  # tested elsewhere, planned and a few steps long
            runs(command, tree)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in commands() if "chain_" in command])
def test_chain(command, tree):
    runs(command, tree)
