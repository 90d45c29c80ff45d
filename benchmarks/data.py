"""Loader and start-up: samples per second, seconds and memory to the first batch; one table last.

    python -m benchmarks.data --out data.json               # stores of 20 and 200 MB
    python -m benchmarks.data --big --only start            # and of 2 GB
    python -m benchmarks.data --released KI --only "mlm 512"

The text is random: ids of a vocabulary of 50,265, line lengths and documents as in prose. Every measurement is a
process of its own with one torch thread; rows take turns, so that all of them see the same machine, and show the
median with the smallest and largest. Loader rows count real tokens of batches of 16 samples, after a warm-up, in the
training process or with one loader process; tokens per second of CPU time suffer less from a busy machine. Start-up
rows go from the start of Python to the first batch of training, the files in the page cache: with no index of the
blocks on disk, and with the one that the first start left.

`--released PATH` puts the iterator of the paper's code beside ours, on the same files: PATH is a checkout of
thunlp/Knowledge-Inheritance whose fairseq/data, extensions included, can be imported by this Python.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.harness import heading, in_turns, markdown, parser, run_ranks, show, spread, write_results
from benchmarks.text import SEED, SPECIAL_IDS, VOCAB_SIZE, write_text
from ki_ds.cli import ends_cleanly
from ki_ds.data.store import open_store
from ki_ds.errors import UserError

MICRO_BATCH_SIZE, NUM_WARM_BATCHES = 16, 20
LOADER_TOKENS = 10_000_000
START_TOKENS = {"20 MB": 10_000_000, "200 MB": 100_000_000, "2 GB": 1_000_000_000}
RELEASED = "released"


@dataclass
class Row:
    """A line of the table: `job` is what its processes measure; `results` are theirs, one a repeat."""

    name: str
    job: dict[str, Any]
    results: list[dict[str, float]] = field(default_factory=list)

    def values(self, key: str) -> list[float]:
        """What the repeats say of one figure."""
        return [result[key] for result in self.results if key in result]


# --------------------------------------------------------------------------------- what a process measures


def our_batches(folder: Path, task: Any, seq_len: int, num_workers: int) -> Iterator[tuple[int, int]]:
    """(samples, tokens) of each batch of the training stream."""
    from ki_ds.data.batches import TrainBatches
    from ki_ds.data.samples import BlockDataset, Mixture

    dataset = BlockDataset(
        open_store(folder / "train"), task=task, seq_len=seq_len, vocab_size=VOCAB_SIZE, special_ids=SPECIAL_IDS
    )
    batches = TrainBatches(
        Mixture([dataset]),
        seed=SEED,
        micro_batch_size=MICRO_BATCH_SIZE,
        global_batch_size=MICRO_BATCH_SIZE,
        num_workers=num_workers,
    )
    for (batch,) in batches:
        yield len(batch.input_ids_BL), batch.num_tokens


def released_batches(folder: Path, checkout: Path, seq_len: int, num_workers: int) -> Iterator[tuple[int, int]]:
    """(samples, tokens) of each batch of the released masked-LM task, put together of its own data sets."""
    give_numpy_its_old_names()
    # the package itself would import every model: its data modules need none
    package: Any = types.ModuleType("fairseq")
    package.__path__ = [str(checkout / "fairseq")]
    package.utils = types.ModuleType("fairseq.utils")
    sys.modules |= {"fairseq": package, "fairseq.utils": package.utils}
    from fairseq import data
    from fairseq.data import data_utils

    vocabulary = data.Dictionary.load(str(folder / "dict.txt"))
    mask = vocabulary.add_symbol("<mask>")
    lines = data_utils.load_indexed_dataset(str(folder / "train"), vocabulary, "mmap", combine=True)
    eos, pad = vocabulary.eos(), vocabulary.pad()
    blocks = data.TokenBlockDataset(lines, lines.sizes, seq_len - 1, pad=pad, eos=eos, break_mode="complete")
    blocks = data.PrependTokenDataset(blocks, vocabulary.bos())
    inputs, targets = data.MaskTokensDataset.apply_mask(blocks, vocabulary, pad_idx=pad, mask_idx=mask, seed=SEED)
    fields = {
        "id": data.IdDataset(),
        "net_input": {
            "src_tokens": data.PadDataset(inputs, pad_idx=pad, left_pad=False),
            "src_lengths": data.NumelDataset(inputs, reduce=False),
        },
        "target": data.PadDataset(targets, pad_idx=pad, left_pad=False),
        "nsentences": data.NumSamplesDataset(),
        "ntokens": data.NumelDataset(inputs, reduce=True),
    }
    samples = data.NestedDictionaryDataset(fields, sizes=[inputs.sizes])
    shuffle = np.random.default_rng(SEED).permutation(len(inputs))
    samples = data.SortDataset(samples, sort_order=[shuffle, inputs.sizes])
    samples.set_epoch(0)
    order = data_utils.filter_by_size(samples.ordered_indices(), samples, seq_len)
    plan = data_utils.batch_by_size(order, samples.num_tokens, max_sentences=MICRO_BATCH_SIZE)
    iterator = data.EpochBatchIterator(
        dataset=samples, collate_fn=samples.collater, batch_sampler=plan, seed=SEED, num_workers=num_workers
    )
    while True:
        for batch in iterator.next_epoch_itr(shuffle=True):
            yield int(batch["nsentences"]), int(batch["ntokens"])


def give_numpy_its_old_names() -> None:
    """The names that the released code uses and NumPy has dropped since."""
    for name, kind in {"float": float, "int": int, "bool": bool, "object": object, "long": int}.items():
        if name not in np.__dict__:
            setattr(np, name, kind)


def speed(batches: Iterator[tuple[int, int]], seconds: float) -> dict[str, float]:
    """Samples and tokens per second of the batches after the first ones, and tokens per second of CPU time."""
    for _ in range(NUM_WARM_BATCHES):
        next(batches)
    processes = [psutil.Process(), *psutil.Process().children()]
    cpu_before, start = cpu_seconds(processes), time.perf_counter()
    samples, tokens, now = 0, 0, start
    while now - start < seconds:
        batch_samples, batch_tokens = next(batches)
        samples, tokens, now = samples + batch_samples, tokens + batch_tokens, time.perf_counter()
    return {
        "samples_per_second": samples / (now - start),
        "tokens_per_second": tokens / (now - start),
        "tokens_per_cpu_second": tokens / (cpu_seconds(processes) - cpu_before),
    }


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU time of this process and its loader so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def start(folder: Path, *, imports_only: bool) -> dict[str, float]:
    """Seconds since this process began, and its memory, at the first batch of training."""
    from ki_ds.config import DataConfig
    from ki_ds.data.batches import TrainBatches
    from ki_ds.data.datasets import open_datasets

    if not imports_only:
        data = DataConfig(corpus=str(folder), index_dir=str(folder / "index"))
        datasets = open_datasets(data, "mlm", other_index_dir=folder / "index")
        size = MICRO_BATCH_SIZE
        next(iter(TrainBatches(datasets.train, seed=SEED, micro_batch_size=size, global_batch_size=size)))
    process = psutil.Process()
    memory = process.memory_info()
    return {
        "seconds": time.time() - process.create_time(),
        "resident_mib": memory.rss / 2**20,
        "private_mib": (memory.rss - memory.shared) / 2**20,  # without pages of mapped files
    }


def measure(job: dict[str, Any]) -> dict[str, float]:
    """What a job says, in this process."""
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    if job["what"] == "start":
        return start(folder, imports_only=job["imports_only"])
    if job["what"] == RELEASED:
        batches = released_batches(folder, Path(job["checkout"]), job["seq_len"], job["num_workers"])
    else:
        batches = our_batches(folder, job["task"], job["seq_len"], job["num_workers"])
    return speed(batches, job["seconds"])


def measure_apart(job: dict[str, Any]) -> dict[str, float]:
    """What a job says, in a process of its own."""
    if job.get("forget"):
        shutil.rmtree(Path(job["folder"]) / "index", ignore_errors=True)
    ((said, _),) = run_ranks(["-m", "benchmarks.data", "--job", json.dumps(job)])
    result: dict[str, float] = json.loads(said)
    return result


# ---------------------------------------------------------------------------------------------------- rows


def loader_rows(folder: Path, seconds: float, checkout: Path | None) -> list[Row]:
    """Ours for each task, length and way of loading; the released iterator where it has a counterpart."""
    rows = []
    for task in ("mlm", "causal"):
        for seq_len in (512, 128):
            for num_workers, where in ((0, "in process"), (1, "one worker")):
                job = {"folder": str(folder), "seq_len": seq_len, "num_workers": num_workers, "seconds": seconds}
                rows.append(Row(f"{task} {seq_len}, {where}", job | {"what": "ours", "task": task}))
                if checkout is not None and (task, seq_len) == ("mlm", 512):
                    name = f"{task} {seq_len}, {where}, {RELEASED}"
                    rows.append(Row(name, job | {"what": RELEASED, "checkout": str(checkout)}))
    return rows


def start_rows(folder: Path, sizes: list[str]) -> list[Row]:
    """The imports alone, then a first and a second start for each size of store."""
    rows = [Row("start, imports alone", {"what": "start", "folder": str(folder), "imports_only": True})]
    for size in sizes:
        job = {"what": "start", "folder": str(folder / size.replace(" ", "_")), "imports_only": False}
        rows.append(Row(f"start, {size}, no index", job | {"forget": True}))
        rows.append(Row(f"start, {size}, again", job))
    return rows


def write_stores(folder: Path, rows: list[Row], sizes: list[str]) -> None:
    """The text that the rows need."""
    if any(row.job["what"] != "start" for row in rows):
        write_text(folder / "loader", LOADER_TOKENS)
    for size in sizes:
        place = folder / size.replace(" ", "_")
        if any(row.job["folder"] == str(place) for row in rows):
            print(f"writing {size}", flush=True)
            write_text(place, START_TOKENS[size])
            write_text(place, 100_000, split="valid")


def table(rows: list[Row]) -> str:
    """One line a row; the ratio is that of the medians, to the released iterator in the same setting."""
    columns = ["row", "tokens/s", "of released", "tokens/CPU s", "samples/s", "seconds", "MiB resident", "MiB private"]
    speeds = {row.name: statistics.median(row.values("tokens_per_second") or [0.0]) for row in rows}

    def cells(row: Row) -> list[str]:
        released = speeds.get(f"{row.name}, {RELEASED}")
        return [
            row.name,
            spread(row.values("tokens_per_second"), 0),
            f"{speeds[row.name] / released:.1f}" if released else "",
            spread(row.values("tokens_per_cpu_second"), 0),
            spread(row.values("samples_per_second"), 0),
            spread(row.values("seconds"), 2),
            spread(row.values("resident_mib"), 0),
            spread(row.values("private_mib"), 0),
        ]

    return markdown(columns, map(cells, rows))


def options() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3, help="measurements a row")
    options.add_argument("--seconds", type=float, default=2.0, help="length of a measurement of the loader")
    options.add_argument("--only", default="", help="rows whose name contains this, e.g. start, mlm, 512")
    options.add_argument("--big", action="store_true", help="start from a store of 2 GB as well")
    options.add_argument("--released", type=Path, metavar="PATH", help="checkout of the paper's code to compare with")
    options.add_argument("--folder", type=Path, help="where the stores are written for the time being")
    options.add_argument("--job", help=argparse.SUPPRESS)
    return options


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    args = options().parse_args()
    if args.job:
        print(json.dumps(measure(json.loads(args.job))))
        return
    if args.repeats < 1 or args.seconds <= 0:
        raise UserError(f"repeats={args.repeats} and seconds={args.seconds} must be above 0")
    if args.released is not None and not (args.released / "fairseq/data").is_dir():
        raise UserError(f"{args.released} has no fairseq/data; name a checkout of thunlp/Knowledge-Inheritance")
    head = heading(python=platform.python_version(), numpy=np.__version__)
    sizes = [size for size in START_TOKENS if args.big or size != "2 GB"]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench_data_") as temporary:
        folder = Path(temporary)
        rows = [*loader_rows(folder / "loader", args.seconds, args.released), *start_rows(folder, sizes)]
        rows = [row for row in rows if args.only in row.name]
        if not rows:
            raise UserError(f"no row has {args.only!r} in its name; take e.g. start, mlm or 512")
        write_stores(folder, rows, sizes)
        for _, row in in_turns(rows, args.repeats):
            row.results.append(measure_apart(row.job))
            write_results(args.out, head, rows=rows)
    if args.released is None:
        print("skipped: the released iterator (--released PATH takes a checkout of thunlp/Knowledge-Inheritance)")
    show(head, table(rows))


if __name__ == "__main__":
    sys.exit(main())
