"""Every command of the README runs, in a copy of the tree with smaller recipes."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.tiny import ROOT, environment, tiny_corpus

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
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
    base = ["launchers/train_ki.sh", "--config", "launchers/recipes/demo_mlm.yaml"]
    for overlay in ([], ["--config", "launchers/recipes/demo_mlm_teacher.yaml"]):
        run = subprocess.run(
            [sys.executable, *base, *overlay], cwd=root, env=environment(), capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-2000:]
    return root


def test_the_readme_has_the_main_entry():
    assert "deepspeed launchers/train_ki.sh" in commands()
    assert len(commands()) == 12


def slow(command):
    """Whether it trains many runs: those are tested a few steps long elsewhere, by default."""
    return "chain_" in command and "--dry_run" not in command


@pytest.mark.parametrize("command", [pytest.param(c, marks=pytest.mark.slow) if slow(c) else c for c in commands()])
def test_command(command, tree):
    env = environment(PYTHONPATH=str(tree))  # the copy, not the package that is installed
    run = subprocess.run(command, shell=True, cwd=tree, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-1500:]
    assert "Traceback" not in run.stdout + run.stderr
