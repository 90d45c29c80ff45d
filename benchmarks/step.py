"""Whole training steps next to what else one could run: tokens/s, utilisation, memory, shares; one table last.

    python -m benchmarks.step --size cpu --out step.json              # two cores, the paper's way in small
    python -m benchmarks.step --size cpu --released KI                # with the paper's own trainer beside it
    python -m benchmarks.step --size gpt_354m                         # a GPU

Every row trains in a process of its own on the same random text (ids of a vocabulary of 50,265 in full rows). The
rows take turns of a few steps, A B C A B C ..., while the others wait, so that all of them see the same machine;
times are medians over the turns with the fastest and slowest, and ratios are taken turn by turn before their median.
A row that cannot run here is skipped by name.

A step is data, teacher, student forward, loss, backward, optimizer and all that lies between. FLOPs are counted as
they are computed: bodies on all tokens, attention on the pairs it sees, output projections on labelled rows alone
(15% of the tokens for mlm); a backward is twice its forward. Utilisation is those FLOPs over time, against the
product of two square matrices in the same turns or --peak_tflops. Rows that compute more than they need (all logits)
are credited with what is needed. "Nominal" FLOPs are the 6 P and 2 P a token of the paper's accounts.

`--released PATH` (or KI_DS_RELEASED) is a checkout of thunlp/Knowledge-Inheritance whose fairseq, with the two
extensions of fairseq/data built, can be imported by this Python; its own data, task, criterion and trainer then run,
on the same files. `--profile FOLDER` leaves a torch trace of some steps of each row there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import MIB, ROOT, check_at_least, heading, markdown, parser, ratios, show, spread, write_results
from benchmarks.step_rows import GEMM_WIDTH, NUM_WARM_STEPS, ROWS, Job, work
from benchmarks.text import SPECIAL_IDS, VOCAB_SIZE, write_splits
from ki_ds.cli import ends_cleanly
from ki_ds.config import ModelConfig
from ki_ds.errors import UserError
from ki_ds.models.presets import build_lm, count_parameters, quieten
from ki_ds.objective.chunks import default_chunk_rows
from ki_ds.training.profiling import OTHER, PARTS

OURS, ALONE, GEMM = "ours, inheriting", "ours, self-learning", "bare GEMM"
GEMMS_A_STEP, MASKED = 4, 0.15


@dataclass(frozen=True)
class Size:
    """Student, teacher (as fields of ModelConfig) and the rows they see."""

    task: str
    student: dict[str, Any]
    teacher: dict[str, Any]
    seq_len: int
    micro_batch_size: int
    vocab_size: int = VOCAB_SIZE
    dropout: float = 0.1
    precision: str = "fp32"
    num_tokens: int = 2_000_000

    def shape(self, model: dict[str, Any]) -> dict[str, Any]:
        """The fields of ModelConfig."""
        dropout = {"dropout": self.dropout, "attention_dropout": self.dropout}
        return {**model, "num_positions": self.seq_len, **dropout}


def _shape(name: str, layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    return {"name": name, "num_layers": layers, "hidden_size": hidden, "num_heads": heads, "ffn_size": ffn}


SIZES = {
    "tiny": Size(
        *("mlm", _shape("roberta_base", 2, 32, 2, 64), _shape("roberta_base", 1, 16, 2, 32), 32, 4),
        **{"vocab_size": 640, "dropout": 0.0, "num_tokens": 20_000},  # type: ignore[arg-type]
    ),
    "cpu": Size("mlm", _shape("roberta_base", 4, 256, 4, 1024), _shape("roberta_base", 2, 128, 2, 512), 128, 16),
    "cpu_causal": Size("causal", _shape("gpt_124m", 4, 256, 4, 1024), _shape("gpt_124m", 2, 128, 2, 512), 128, 16),
    "gpt_354m": Size("causal", {"name": "gpt_354m"}, {"name": "gpt_209m"}, 512, 16, precision="bf16"),
    "roberta_large": Size("mlm", {"name": "roberta_large"}, {"name": "roberta_base"}, 512, 16, precision="bf16"),
}
GPU_SIZES = ("gpt_354m", "roberta_large")


# ------------------------------------------------------------------------------------------------ accounts


@dataclass(frozen=True)
class Account:
    """Arithmetic of one forward of a model over a micro-batch, in FLOPs, and its parameters."""

    body: float
    attention: float
    head: float
    dense_parameters: int
    bytes: int

    @property
    def forward(self) -> float:
        """All of it."""
        return self.body + self.attention + self.head


def account(lm: Any, size: Size) -> Account:
    """The forward of a model: 2 FLOPs a parameter and token in the body, and a labelled row in the head."""
    tokens = size.micro_batch_size * size.seq_len
    rows = tokens * (1.0 if size.task == "causal" else MASKED)
    looked_up = {id(p) for m in lm.base_model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    body = sum(p.numel() for p in lm.base_model.parameters() if id(p) not in looked_up)
    dense = count_parameters(lm)["dense_parameters"]
    pairs = tokens * size.seq_len * (0.5 if size.task == "causal" else 1.0)
    attention = 4.0 * lm.config.num_hidden_layers * lm.config.hidden_size * pairs  # scores, and the mean of the values
    num_bytes = sum(p.numel() * p.element_size() for p in lm.parameters())
    return Account(2.0 * body * tokens, attention, 2.0 * (dense - body) * rows, dense, num_bytes)


def build(size: Size, model: dict[str, Any], *, seed: int) -> Any:
    """A model of random weights."""
    fields = ModelConfig(**size.shape(model))
    specials = SPECIAL_IDS.__class__(bos=0, pad=1, eos=2, unk=3, mask=size.vocab_size - 1)
    return build_lm(fields, size.task, num_classes=size.vocab_size, special_ids=specials, seed=seed)  # type: ignore[arg-type]


def make_inputs(size: Size, folder: Path) -> tuple[Any, Any]:
    """Text and a teacher of random weights in `folder`; the student and that teacher."""
    quieten()
    write_splits(folder / "text", size.num_tokens, vocab_size=size.vocab_size)
    student, teacher = build(size, size.student, seed=1), build(size, size.teacher, seed=2)
    teacher.save_pretrained(folder / "teacher")
    return student, teacher


def teacher_memory(teacher: Account, student: Any, size: Size) -> tuple[float, float]:
    """MiB of an online teacher's weights in its dtype, and of one chunk of its logits."""
    element = 2 if torch.cuda.is_available() else 4
    rows = round(size.micro_batch_size * size.seq_len * (1.0 if size.task == "causal" else MASKED))
    width = student.get_output_embeddings().weight.shape[0]
    like = torch.empty(0, dtype=torch.float16 if element == 2 else torch.float32)
    chunk = default_chunk_rows(rows, width, like.cuda() if torch.cuda.is_available() else like) * width * element
    return teacher.bytes / 4 * element / MIB, chunk / MIB


# ------------------------------------------------------------------------------------------------ processes


@dataclass
class Row:
    """A line of the table: what each turn took."""

    name: str
    seconds: list[float] = field(default_factory=list)  # a step
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: float = 0.0  # a step
    peak_mib: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the first steps
    parts: dict[str, float] = field(default_factory=dict)  # seconds of a profiled step

    @property
    def second(self) -> float:
        """Median seconds a step."""
        return statistics.median(self.seconds)


class Worker:
    """The process of a row."""

    def __init__(self, name: str, job: Job, **environment: str):
        self.row = Row(name)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in ranks}
        env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": str(job["num_threads"])}
        env |= environment
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        command = [sys.executable, "-m", "benchmarks.step", "--row", name, "--job", json.dumps(job)]
        self._process = subprocess.Popen(command, env=env, text=True, **pipes)

    def answer(self) -> dict[str, Any]:
        """What the process says next. Raises UserError with its last words when it has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        words = [text for text in self._log.read().splitlines() if text.strip()] or ["no word"]
        raise UserError(words[-1].strip()[:300])

    def order(self, **command: Any) -> None:
        """Give a command, whose answer will come."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def tell(self, **command: Any) -> dict[str, Any]:
        """Give a command and wait for the answer."""
        self.order(**command)
        return self.answer()

    def turn(self, steps: int) -> None:
        """So many steps, timed."""
        if self.row.name == GEMM:
            steps *= GEMMS_A_STEP
        found = self.tell(do="steps", steps=steps)
        self.row.seconds.append(found["seconds"] / steps)
        self.row.cpu_seconds.append(found["cpu_seconds"] / steps)
        self.row.tokens = found["tokens"] / steps

    def profile(self, steps: int, folder: Path | None) -> None:
        """So many steps under the profiler."""
        trace = str(folder / f"{self.row.name.replace(', ', '_').replace(' ', '_')}.json") if folder else ""
        found = self.tell(do="profile", steps=steps, trace=trace)
        self.row.parts = {name: seconds / steps for name, seconds in found["parts"].items()}

    def end(self) -> None:
        """Ask for the peak of its memory, and let it go."""
        self.row.peak_mib = self.tell(do="end")["peak_mib"]
        self._process.wait(30)

    def kill(self) -> None:
        """End it whatever it does."""
        self._process.kill()
        self._process.wait()


def job_of(size: Size, folder: Path, *, num_threads: int, num_workers: int, ds_config: str) -> Job:
    """What the processes of a size are told; 0 threads are all cores."""
    return {
        **{name: getattr(size, name) for name in ("task", "seq_len", "micro_batch_size", "vocab_size", "precision")},
        "student": size.shape(size.student),
        "teacher": size.shape(size.teacher),
        "folder": str(folder),
        "num_threads": num_threads or len(os.sched_getaffinity(0)),
        "num_workers": num_workers,
        "ds_config": ds_config,
    }


def unavailable(name: str, size: Size, checkout: Path | None) -> str | None:
    """Why a row cannot run, as far as can be said before it is tried."""
    if name == "released trainer":
        if checkout is None:
            return "--released PATH takes a checkout of thunlp/Knowledge-Inheritance"
        if torch.cuda.is_available() or size.task != "mlm" or size.precision != "fp32":
            return "compared on a CPU, for mlm in fp32"
    if name == "PyTorch loop, masked rows" and size.task == "causal":
        return "every row of a causal model is labelled"
    return None


def start_workers(names: list[str], job: Job, size: Size, checkout: Path | None) -> list[Worker]:
    """The rows that run here, warmed up, one after another."""
    workers = []
    for name in names:
        reason = unavailable(name, size, checkout)
        if reason is None:
            worker = Worker(name, job)
            try:
                worker.row.losses = worker.answer()["losses"]
                workers.append(worker)
                print(f"ready: {name}", flush=True)
            except UserError as error:
                worker.kill()
                reason = str(error)
        if reason is not None:
            print(f"skipped: {name} ({reason})", flush=True)
    return workers


# ------------------------------------------------------------------------------------------------ tables


def both(first: Row, second: Row, digits: int) -> str:
    """The ratio in wall time and in CPU time, which suffers less from a busy machine."""
    time, cpu = ratios(first.seconds, second.seconds), ratios(first.cpu_seconds, second.cpu_seconds)
    return f"time {spread(time, digits)}, CPU {spread(cpu, digits)}"


def share_table(rows: list[Row]) -> str:
    """Milliseconds and shares of each part of a profiled step."""
    columns = ["ms (share) of a profiled step", *PARTS, OTHER]

    def cells(row: Row) -> list[str]:
        whole = sum(row.parts.values())
        return [row.name, *(f"{1e3 * row.parts[p]:.1f} ({row.parts[p] / whole:.0%})" for p in (*PARTS, OTHER))]

    return markdown(columns, (cells(row) for row in rows if sum(row.parts.get(name, 0.0) for name in PARTS[1:])))


def ratio_lines(rows: dict[str, Row], student: Account, teacher: Account) -> list[str]:
    """What inheriting costs over self-learning, in time and in FLOPs, and what the others cost over ours."""
    lines = []
    if OURS in rows and ALONE in rows:
        nominal = 1 + 2 * teacher.dense_parameters / (6 * student.dense_parameters)
        exact = 1 + teacher.forward / (3 * student.forward)
        lines.append(f"inheriting over self-learning: {both(rows[OURS], rows[ALONE], 3)}")
        lines.append(f"  FLOPs, nominal 1 + 2 P_T / 6 P_S: {nominal:.3f}; times 1.05: {1.05 * nominal:.3f}")
        lines.append(f"  FLOPs, as computed (heads on labelled rows): {exact:.3f}; times 1.05: {1.05 * exact:.3f}")
    if OURS in rows:
        others = [row for row in rows.values() if row.name not in (OURS, ALONE, GEMM)]
        lines += [f"{row.name} over ours, inheriting: {both(row, rows[OURS], 2)}" for row in others]
    return lines


def table(rows: list[Row], student: Account, teacher: Account, peak_flops: float | None) -> str:
    """One line a row; ratios of speed against ours, inheriting."""
    base = next((row for row in rows if row.name == OURS), None)
    columns = ["row", "ms a step", "CPU ms", "tokens/s", "speed of ours", "of peak, student", "and teacher", "MiB"]
    own, taught = 3 * student.forward, 3 * student.forward + teacher.forward

    def cells(row: Row) -> list[str]:
        speed, used, used_with_teacher = f"{row.tokens / row.second:,.0f}", "", ""
        relative = f"{statistics.median(ratios(base.seconds, row.seconds)):.2f}" if base is not None else ""
        if row.name == GEMM:
            speed, relative = f"{2 * GEMM_WIDTH**3 / row.second / 1e12:.3f} TFLOP/s", ""
        elif peak_flops:
            used = f"{own / row.second / peak_flops:.1%}"
            used_with_teacher = "" if row.name == ALONE else f"{taught / row.second / peak_flops:.1%}"
        milliseconds = spread([1e3 * seconds for seconds in row.seconds], 1)
        cpu = f"{1e3 * statistics.median(row.cpu_seconds):,.1f}"
        return [row.name, milliseconds, cpu, speed, relative, used, used_with_teacher, f"{row.peak_mib:,.0f}"]

    return markdown(columns, map(cells, rows))


# ------------------------------------------------------------------------------------------------ the whole


def options() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__)
    on_gpu = torch.cuda.is_available()
    options.add_argument("--size", choices=sorted(SIZES), default="gpt_354m" if on_gpu else "cpu")
    options.add_argument("--precision", choices=("fp32", "bf16"), help="of the student; default: the size's")
    options.add_argument("--turns", type=int, default=10 if on_gpu else 5, help="turns a row")
    options.add_argument("--steps", type=int, default=10 if on_gpu else 3, help="steps a turn")
    options.add_argument("--profile_steps", type=int, default=2, help="steps a row under the profiler; 0 for none")
    options.add_argument("--only", default="", help="rows whose name contains one of these, e.g. 'ours|GEMM'")
    options.add_argument("--num_threads", type=int, default=0, help="of the CPU; 0 takes all cores")
    options.add_argument("--num_workers", type=int, default=1 if on_gpu else 0, help="loader processes a row")
    options.add_argument(
        "--ds_config", help="of our rows, one rank each; default: ZeRO 0 in fp32, else 1, as 0 refuses halves"
    )
    options.add_argument("--peak_tflops", type=float, help="what utilisation is measured by, e.g. 989 for an H100")
    released = os.environ.get("KI_DS_RELEASED")
    options.add_argument("--released", type=Path, metavar="PATH", default=Path(released) if released else None)
    options.add_argument("--profile", type=Path, metavar="FOLDER", help="leave a torch trace of each row here")
    options.add_argument("--row", choices=sorted(ROWS), help=argparse.SUPPRESS)
    options.add_argument("--job", help=argparse.SUPPRESS)
    return options


def check(args: argparse.Namespace) -> list[str]:
    """The names of the wanted rows. Raises UserError for values that make no sense."""
    check_at_least(args, turns=1, steps=1, profile_steps=0, num_threads=0, num_workers=0)
    if args.released is not None and not (args.released / "fairseq/trainer.py").is_file():
        raise UserError(f"{args.released} has no fairseq/trainer.py; name a checkout of thunlp/Knowledge-Inheritance")
    names = [name for name in ROWS if any(part in name for part in args.only.split("|"))]
    if not names:
        raise UserError(f"no row has {args.only!r} in its name; take of {', '.join(ROWS)}")
    return names


def measure(args: argparse.Namespace, size: Size, names: list[str], folder: Path) -> tuple[list[Row], Account, Account]:
    """All rows in turns, and the accounts of student and teacher."""
    student, teacher = make_inputs(size, folder)
    accounts = account(student, size), account(teacher, size)
    weights, chunk = teacher_memory(accounts[1], student, size)
    print(f"an online teacher's memory: {weights:.1f} MiB of weights + {chunk:.1f} MiB, a chunk of its logits")
    del student, teacher
    ds_config = args.ds_config or f"ds_configs/zero{0 if size.precision == 'fp32' else 1}.json"
    job = job_of(size, folder, num_threads=args.num_threads, num_workers=args.num_workers, ds_config=ds_config)
    job["released"] = str(args.released.resolve()) if args.released else None
    workers = start_workers(names, job, size, args.released)
    try:
        for turn in range(args.turns):
            for worker in workers:
                worker.turn(args.steps)
            print(f"turn {turn + 1}/{args.turns}", flush=True)
        for worker in workers:
            if args.profile_steps and worker.row.name != GEMM:
                worker.profile(args.profile_steps, args.profile)
            worker.end()
    finally:
        for worker in workers:
            worker.kill()
    return [worker.row for worker in workers], *accounts


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    args = options().parse_args()
    if args.row:
        work(args.row, json.loads(args.job))
        return
    names = check(args)
    if args.size in GPU_SIZES and not torch.cuda.is_available():
        print(f"skipped: {args.size} (needs a GPU)")
        return
    size = SIZES[args.size]
    if args.precision:
        size = Size(**{**asdict(size), "precision": args.precision})
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
    threads = args.num_threads or len(os.sched_getaffinity(0))
    shape = f"{args.size}, {size.precision}, micro-batch {size.micro_batch_size} x {size.seq_len}"
    head = heading(threads=threads, size=shape)
    with tempfile.TemporaryDirectory(prefix="bench_step_") as folder:
        rows, student, teacher = measure(args, size, names, Path(folder))
    by_name = {row.name: row for row in rows}
    peak = 1e12 * args.peak_tflops if args.peak_tflops else None
    if peak is None and GEMM in by_name:
        peak = 2 * GEMM_WIDTH**3 / by_name[GEMM].second
    accounts = {"student": asdict(student), "teacher": asdict(teacher), "num_warm_steps": NUM_WARM_STEPS}
    write_results(args.out, head | accounts, rows=rows)
    shares = [share_table(rows)] if args.profile_steps else []
    show(head, *shares, "\n".join(ratio_lines(by_name, student, teacher)), table(rows, student, teacher, peak))


if __name__ == "__main__":
    sys.exit(main())
