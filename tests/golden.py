"""The demo at its smallest, whole and in figures: losses, metrics and checkpoints that no change of structure moves.

`python -m tests.golden FOLDER` runs it in FOLDER and lays its figures over those in golden.json, where each class of
machine (which differ in the last bits) has its own. A change that is meant to move them says so and makes them anew.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import torch
import yaml

from ki_ds.data.corpora import gensim_dump_path
from ki_ds.data.prepare import TokenizerSpec, build_store
from ki_ds.experiments.demo import VALID_FRACTION, VOCAB_SIZES, demo_jobs
from tests.tiny import train_ranks

GOLDEN = Path(__file__).with_name("golden.json")
NUM_STEPS = 20
CASES = [("teacher", 1), ("inherit", 1), ("inherit", 2)]
# what no two runs share: times, and the memory of a process
TIMES = ("seconds", "tokens_per_second", "bytes_before", "bytes_after")


def platform_class() -> str:
    """What the last bits of a float depend on: torch's release and the processor, whose kernels it chooses."""
    said = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", said, re.M))
    processor = " ".join(facts.get(name, "?") for name in ("model name", "cpu family", "model"))
    return f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {processor}"


def prepare(task: str, folder: Path) -> Path:
    """The demo's corpus for a task."""
    corpus = folder / task / "corpus"
    spec = TokenizerSpec(vocab_size=VOCAB_SIZES[task])
    build_store([gensim_dump_path()], spec, corpus, num_workers=0, valid_fraction=VALID_FRACTION, show_progress=False)
    return corpus


def train(task: str, name: str, world: int, folder: Path) -> Path:
    """Train one of the demo's runs for 20 steps on `world` ranks; its folder."""
    job = next(job for job in demo_jobs(task, "smoke", 1) if job.name == name)
    fields = job.fields | {"data.corpus": folder / task / "corpus", "run_dir": folder / task / f"{name}_{world}"}
    if name == "inherit":
        fields["teacher.path"] = folder / task / "teacher_1"
        fields["inherit.steps"] = 16
    fields |= {"train.num_steps": NUM_STEPS, "train.save_every": 10, "train.log_every": 1}
    fields |= {"engine.num_threads": 1, "monitor.progress": "none"}
    arguments = [part for recipe in job.recipes for part in ("--config", f"launchers/recipes/{recipe}")]
    arguments += [part for key, value in fields.items() for part in (f"--{key}", str(value))]
    config = folder / task / "empty.yaml"
    config.write_text(yaml.safe_dump({}))
    for rank in train_ranks(config, *arguments, world=world):
        assert rank.returncode == 0, rank.stderr
    return fields["run_dir"]


def figures(run_dir: Path) -> dict:
    """What must stay of a run: its losses, and a hash of all its metrics and of each file of weights and states."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    kept = [line for line in kept if line["kind"] != "straggler"]  # a rank was slow: that is of the machine
    files = [*(run_dir / "best").glob("*.safetensors"), *(run_dir / "checkpoints").rglob("*")]
    files = [path for path in files if path.suffix in (".safetensors", ".pt")]
    return {
        "losses": [line["loss"] for line in lines if line["kind"] == "train"],
        "perplexities": [line["ppl"] for line in lines if line["kind"] == "valid"],
        "metrics": _short_hash(json.dumps(kept).encode()),
        "files": {str(path.relative_to(run_dir)): _short_hash(path.read_bytes()) for path in sorted(files)},
    }


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def measure(task: str, folder: Path) -> dict:
    """The figures of every case of a task, made in a folder."""
    prepare(task, folder)
    return {f"{task} {name} {world}": figures(train(task, name, world, folder)) for name, world in CASES}


def main(folder: Path) -> None:
    """Run everything and write the figures of this class of machine."""
    found = {case: values for task in VOCAB_SIZES for case, values in measure(task, folder).items()}
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    GOLDEN.write_text(json.dumps({**known, platform_class(): found}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
