#!/usr/bin/env python3
"""Reading a teacher's signals from a cache beside running the teacher: bytes a row, time a micro-batch; a table last.

    python -m benchmarks.cache                              # RoBERTa medium, 512 tokens, 50,265 ids
    python -m benchmarks.cache --size tiny --repeats 2

Text and weights are random. Each cache is written first (which is not timed), then all rows take turns on the same
micro-batches; the figures are medians with the fastest and slowest. A read is what training waits for: the records
found, compared with the masked input and their CRC32, and made a signal on the device. The files are in the page cache,
as they are where they fit into memory; they are read in their order on disk. The teacher's time is its forward up to
the hidden states of the labelled rows; the loss then multiplies them with the head, which top-K records save as well.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from benchmarks.harness import check_at_least, heading, markdown, parser, show, spread, write_results
from ki_ds.cli import ends_cleanly
from ki_ds.data.samples import BlockDataset, Mixture
from ki_ds.data.store import SpecialIds, StoreWriter, open_store
from ki_ds.models.presets import count_parameters
from ki_ds.teachers.cache import CachedTeacher
from ki_ds.teachers.cache_build import build_cache, record_teacher
from ki_ds.teachers.cache_files import CacheFiles
from ki_ds.teachers.online import OnlineTeacher
from ki_ds.teachers.questions import Questions
from ki_ds.teachers.teacher import Teacher, TeacherFacts

LINE_TOKENS = 30


@dataclass(frozen=True)
class Size:
    """A teacher and its rows."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    vocab_size: int
    seq_len: int


SIZES = {
    "tiny": Size(2, 64, 2, 256, 2_000, 128),
    "medium": Size(9, 576, 12, 3072, 50_265, 512),  # the paper's teacher of its base model
}
CACHES = {  # name: (kind, dtype of hidden states)
    "top-10": ("topk", "fp16"),
    "hidden states, int8": ("hidden", "int8"),
    "hidden states, fp16": ("hidden", "fp16"),
    "hidden states, fp32": ("hidden", "fp32"),
}


@dataclass
class Row:
    """A line of the table; `seconds` has one figure a micro-batch and repeat."""

    name: str
    bytes_per_row: float | None
    seconds: list[float] = field(default_factory=list)


def write_text(prefix: Path, size: Size, num_samples: int) -> Mixture:
    """Random ids in lines, as the samples of a masked language model."""
    specials = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=size.vocab_size - 1)
    num_lines = num_samples * (size.seq_len - 1) // LINE_TOKENS + 1
    tokens = np.random.default_rng(0).integers(4, size.vocab_size - 1, num_lines * LINE_TOKENS)
    with StoreWriter(prefix, vocab_size=size.vocab_size, special_ids=specials) as writer:
        writer.add_items(tokens, np.full(num_lines, LINE_TOKENS))
        writer.end_document()
    return Mixture([BlockDataset(open_store(prefix), task="mlm", seq_len=size.seq_len)])


def make_online(size: Size, device: torch.device) -> tuple[OnlineTeacher, TeacherFacts]:
    """A teacher of random weights, in fp16 on a GPU and fp32 on a CPU as in training, and its facts."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.ffn_size,
        max_position_embeddings=size.seq_len + 2,
    )
    lm: PreTrainedModel = RobertaForMaskedLM(config)
    if device.type == "cuda":
        lm = lm.half()
    parameters = count_parameters(lm)
    facts = TeacherFacts(
        "random", "0" * 64, parameters["num_parameters"], parameters["dense_parameters"], True, None, None
    )
    return OnlineTeacher(lm, device=device), facts


def measure(
    folder: Path, size: Size, *, micro_batch_size: int, num_batches: int, repeats: int, device: torch.device
) -> list[Row]:
    """The rows, timed in turns."""
    train = write_text(folder / "text", size, micro_batch_size * num_batches + 1)
    questions = Questions(
        train=train,
        seed=1,
        key={"num_classes": size.vocab_size, "num_samples": len(train), "seq_len": size.seq_len},
        tau=2.0,
        steps=range(num_batches),
        global_batch_size=micro_batch_size,
        micro_batch_size=micro_batch_size,
    )
    online, facts = make_online(size, device)
    teachers: list[tuple[Row, Teacher]] = [(Row("the teacher, online", None), online)]
    for name, (kind, dtype) in CACHES.items():
        out = folder / f"{kind}_{dtype}"
        recording = record_teacher(online, facts, questions, kind=kind, topk=10, dtype=dtype, device=device)
        manifest = build_cache(out, questions, recording)
        num_bytes, _, num_rows, _ = map(sum, zip(*manifest.chunks.values(), strict=True))
        files = CacheFiles.open(out, manifest)
        cached = CachedTeacher(files, manifest, folder=out, semantics="renormalise", device=device)
        teachers.append((Row(f"cache, {name}", num_bytes / num_rows), cached))
    batches = [questions.micro_batch(number)[3].to(device) for number in range(num_batches)]
    for repeat in range(repeats + 1):  # the first one warms up
        for batch in batches:
            for row, teacher in teachers:
                started = time.perf_counter()
                teacher.signal(batch)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:
                    row.seconds.append(time.perf_counter() - started)
    return [row for row, _ in teachers]


def table(rows: list[Row]) -> str:
    """One line a row, times as median (fastest-slowest), the first row's forward as the measure."""
    forward = median(rows[0].seconds)
    lines = (
        [
            row.name,
            "" if row.bytes_per_row is None else f"{row.bytes_per_row:,.1f}",
            spread([1e3 * seconds for seconds in row.seconds], 3),
            f"{median(row.seconds) / forward:.4f}",
        ]
        for row in rows
    )
    return markdown(["signals from", "bytes a row", "ms a micro-batch", "of the forward"], lines)


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    options = parser(__doc__)
    options.add_argument("--size", choices=sorted(SIZES), default="medium", help="of the teacher and its rows")
    options.add_argument("--micro_batch_size", type=int, default=8, help="samples of a micro-batch")
    options.add_argument("--num_batches", type=int, default=4, help="different micro-batches")
    options.add_argument("--repeats", type=int, default=3, help="timings of each")
    options.add_argument("--num_threads", type=int, default=1, help="of the CPU")
    args = options.parse_args()
    check_at_least(args, micro_batch_size=1, num_batches=1, repeats=1, num_threads=1)
    torch.set_num_threads(args.num_threads)
    with tempfile.TemporaryDirectory(prefix="bench_cache_") as folder:
        rows = measure(
            Path(folder),
            SIZES[args.size],
            micro_batch_size=args.micro_batch_size,
            num_batches=args.num_batches,
            repeats=args.repeats,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
    size = f"{args.size}, micro-batch {args.micro_batch_size} x {SIZES[args.size].seq_len}"
    head = heading(threads=args.num_threads, size=size)
    write_results(args.out, head, rows=rows)
    show(head, table(rows))


if __name__ == "__main__":
    sys.exit(main())
