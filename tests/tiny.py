"""A tiny corpus of real words and a tiny run on it, for tests that train."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import yaml

from ki_ds.data.prepare import TokenizerSpec, build_store
from ki_ds.ranks.world import free_port
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = "the cat|a dog|one old man|her sister|the tall tree|every child|our teacher|some student|the small model"
VERBS = "sees|likes|follows|teaches|never meets|has found|will remember|inherits from|asks"
ENDS = "in the garden|at night|before winter|with great care|for ever|on the hill|without a word|again|too late"


def tiny_corpus(
    folder: Path, *, num_documents: int = 120, vocab_size: int = 320, seed: int = 0, tokenizer: Path | None = None
) -> Path:
    """A corpus folder of made-up sentences with a byte-level BPE tokenizer (or a given one); a few thousand tokens."""
    choose = random.Random(seed)
    parts = [text.split("|") for text in (SUBJECTS, VERBS, SUBJECTS, ENDS)]
    lines = []
    for _ in range(num_documents):
        lines += [" ".join(choose.choice(part) for part in parts) + "." for _ in range(6)] + [""]
    folder.parent.mkdir(parents=True, exist_ok=True)
    text = folder.with_suffix(".txt")
    text.write_text("\n".join(lines), encoding="utf-8")
    spec = TokenizerSpec(vocab_size=vocab_size)
    build_store([text], tokenizer or spec, folder, num_workers=0, valid_fraction=0.1, show_progress=False)
    return folder


def tiny_config(run_dir: Path, corpus: Path, *, task: str = "mlm", **groups: dict) -> dict:
    """A configuration, as a dict for YAML, of a run that takes a second; `groups` are laid over it."""
    config: dict = {
        "run_dir": str(run_dir),
        "task": task,
        "data": {"corpus": str(corpus), "seq_len": 32, "num_workers": 0, "max_valid_samples": 16},
        "model": {
            "name": "roberta_base" if task == "mlm" else "gpt_124m",
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "ffn_size": 64,
            "num_positions": 32,
        },
        "optim": {"lr": 3e-3},
        "engine": {"ds_config": str(ROOT / "ds_configs" / "zero1.json"), "num_threads": 1},
        "train": {
            "num_steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "eval_every": 3,
            "save_every": 2,
            "log_every": 1,
        },
        "monitor": {"progress": "none"},
    }
    for name, values in groups.items():
        config[name] = {**config.get(name, {}), **values} if isinstance(values, dict) else values
    return config


def write_config(path: Path, config: dict) -> Path:
    """The configuration as a YAML file."""
    path.write_text(yaml.safe_dump(config))
    return path


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process that must not see this one's ranks."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in ranks}
    binaries = str(Path(sys.executable).parent)
    return {**kept, "PATH": f"{binaries}:{kept['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def run_ranks(
    command: list[str], *, world: int, timeout: float = 300, cwd: Path = ROOT
) -> list[subprocess.CompletedProcess]:
    """Run `python command...` once a rank, connected, and wait for all; the results by rank."""
    port = free_port()
    processes = []
    for rank in range(world):
        env = environment(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        processes.append(
            forked.Popen(
                [sys.executable, *command], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


def train_ranks(config: Path, *arguments: str, world: int = 1) -> list[subprocess.CompletedProcess]:
    """Train a configuration file on `world` ranks of this host."""
    return run_ranks(["launchers/train_ki.sh", "--config", str(config), *arguments], world=world)


def run(run_dir: Path, corpus: Path, **groups) -> Path:
    """Train a tiny run in this process; its folder."""
    from ki_ds import config as configuration
    from ki_ds.training.loop import train

    config = tiny_config(run_dir, corpus, **groups)
    path = write_config(run_dir.with_suffix(".yaml"), config)
    train(configuration.load(path))
    return run_dir


def inherit(base: Path, name: str, task: str = "mlm", **groups) -> Path:
    """Train a tiny student of the teacher in `base`; its folder."""
    groups.setdefault("teacher", {"path": str(base / f"{task}_teacher")})
    groups.setdefault("inherit", {"schedule": "linear", "steps": 4})
    return run(base / name, base / "corpus", task=task, **groups)


def records(run_dir: Path, kind: str) -> list[dict]:
    """The records of one kind in a run's metrics."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]
