#!/usr/bin/env python3
"""The paper's larger pairs on many GPUs, on paper: communication against compute, and when teacher ranks pay.

  python tools/plan_scale.py [--gpus 8 64 512] [--peak_tflops 989] [--mfu 0.4] [--nvlink_gb 450] [--infiniband_gb 50]

Models, global batch (2,048 x 512 tokens), micro-batch (16, or less where a GPU gets less), precision and placements are
those of launchers/recipes/; FLOPs and memory are the planner's, bytes those of its room `communication`. Two Markdown
tables. Nothing is measured: MFU and links are assumptions, the same for every row.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ki_ds import config as configuration
from ki_ds.cli import ends_cleanly
from ki_ds.config import ModelConfig, RunConfig, Task
from ki_ds.engine.student import accumulation_steps, read_ds_config
from ki_ds.errors import UserError
from ki_ds.planning.communication import GPUS_A_NODE, INFINIBAND, NVLINK, Traffic, ranks_pay, step_seconds, traffic
from ki_ds.planning.planner import Plan, plan
from ki_ds.planning.sizes import Size, size_of
from ki_ds.teachers.cache_files import bytes_per_row

ROOT = Path(__file__).resolve().parent.parent
PAIRS: list[tuple[Task, str, str]] = [
    ("mlm", "roberta_large", "roberta_base"),
    ("causal", "gpt_354m", "gpt_209m"),
    ("causal", "gpt_1b", "gpt_773m"),
]
NUM_CLASSES, HALF, STAGES = 50_265, 2, (1, 2, 3)
RECOMPUTED = 4 / 3  # the step of a student whose activations are computed again


def config_of(task: Task, student: str, num_ranks: int, *extra: str) -> RunConfig:
    """The paper's run of a student, with as much of a micro-batch as a GPU gets."""
    recipe = ROOT / f"launchers/recipes/{'gpt' if task == 'causal' else 'roberta'}.yaml"
    words = ["--config", str(recipe), "--run_dir", "run", "--data.corpus", "corpus", "--model.name", student]
    words += ["--teacher.path", "teacher", "--inherit.schedule", "linear", "--inherit.steps", "1000", *extra]
    config = configuration.parse(words)
    share, rest = divmod(config.train.global_batch_size, num_ranks)
    if rest:
        raise UserError(
            f"--gpus {num_ranks} does not divide {config.train.global_batch_size} sequences; give 2, 4, 8, ..."
        )
    size = min(config.train.micro_batch_size, share)
    return configuration.parse([*words, "--train.micro_batch_size", str(size)])


def planned(config: RunConfig, teacher: Size, num_ranks: int) -> Plan:
    """The plan of that run on GPUs."""
    return plan(config, num_ranks=num_ranks, num_classes=NUM_CLASSES, teachers=[teacher], on_gpu=True)


def traffics(config: RunConfig, num_parameters: int, num_ranks: int) -> list[Traffic]:
    """A step's traffic at each of STAGES, with ds_configs/."""
    micro_steps = accumulation_steps(config, num_ranks)
    files = [read_ds_config(str(ROOT / f"ds_configs/zero{stage}.json")) for stage in STAGES]
    return [traffic(file, num_parameters, element_bytes=HALF, micro_steps=micro_steps) for file in files]


def three(values: list[float], digits: int) -> str:
    """One figure a stage."""
    return " / ".join(f"{value:,.{digits}f}" for value in values)


def communication_rows(args: argparse.Namespace) -> Iterator[str]:
    """A line for each pair and number of GPUs."""
    rate = 1e12 * args.mfu * args.peak_tflops
    for task, student, teacher in PAIRS:
        for gpus in args.gpus:
            config = config_of(task, student, gpus)
            found = planned(config, size_of(ModelConfig(name=teacher), task, NUM_CLASSES), gpus)
            flops = found.student_flops_per_step + found.teachers[0].flops_per_step
            compute = flops / gpus / rate
            links = {"nvlink": 1e9 * args.nvlink_gb, "infiniband": 1e9 * args.infiniband_gb}
            moved = traffics(config, found.parameters, gpus)
            seconds = [each.seconds(gpus, **links) for each in moved]
            hidden, bare = zip(*(step_seconds(compute, each) for each in seconds), strict=True)
            even = seconds[0] * rate / (flops / (config.train.global_batch_size * config.data.seq_len))
            cells = [f"{student} <- {teacher}", str(gpus)]
            sequences = config.train.global_batch_size // gpus
            cells.append(f"{sequences} = {accumulation_steps(config, gpus)} x {config.train.micro_batch_size}")
            cells += [f"{1e3 * compute:,.0f}", three([each.sent(gpus) / 1e9 for each in moved], 1)]
            cells += [three([1e3 * each for each in seconds], 0), three([1e3 * each for each in hidden], 0)]
            cells += [three([1e3 * each for each in bare], 0)]
            cells += [three([100 * (1 - compute / each) for each in bare], 0), f"{even:,.0f}"]
            yield f"| {' | '.join(cells)} | {found.total_memory / 2**30:.1f} |"


def teacher_rows(args: argparse.Namespace) -> Iterator[str]:
    """A line for each pair: what the teacher costs in the student's ranks and in ranks of its own."""
    topk = bytes_per_row({"kind": "topk", "topk": 10, "num_classes": NUM_CLASSES})
    for task, student, teacher in PAIRS:
        taught = size_of(ModelConfig(name=teacher), task, NUM_CLASSES)
        config = config_of(task, student, GPUS_A_NODE)
        ranks = ["--teacher.placement", "ranks", "--teacher.num_ranks", "1"]
        apart = planned(config_of(task, student, GPUS_A_NODE, *ranks), taught, GPUS_A_NODE + 1)
        online = planned(config, taught, GPUS_A_NODE)
        share = online.teachers[0].flops_per_step / online.student_flops_per_step
        head = share * taught.vocab_size * taught.hidden_size / taught.dense_parameters
        labelled = config.data.mask_probability if task == "mlm" else 1.0
        rows = 1e12 * args.mfu * args.peak_tflops / (6 * online.dense_parameters) * labelled  # a second and GPU
        costs = {k: ranks_pay(teacher_share=share, head_share=head, split=k / (GPUS_A_NODE + k), slowdown=1.0)
                 for k in range(1, GPUS_A_NODE + 1)}  # fmt: skip
        best = min(costs, key=lambda k: costs[k][1])
        cost, link = costs[best][1], 1e9 * args.infiniband_gb
        hidden = HALF * taught.hidden_size
        sent = hidden * rows * GPUS_A_NODE / best  # by each teacher
        cells = [f"{student} <- {teacher}", f"{share:.3f} ({head:.3f})"]
        cells += [f"{hidden * labelled:,.0f} / {topk * labelled:,.0f} / {HALF * NUM_CLASSES * labelled:,.0f}"]
        cells += [f"{hidden * rows / 1e6:,.0f}", f"{sent / link:.1%}"]
        cells += [f"{online.total_memory / 2**30:.1f}", f"{apart.total_memory / 2**30:.1f}"]
        cells += [f"{costs[best][0]:.3f}", f"{cost:.3f} ({best})", f"{cost - share:.3f}"]
        yield f"| {' | '.join(cells)} | {'yes' if RECOMPUTED + share > cost else 'no'} |"


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="powers of two")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of a GPU in bf16 (an H100)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that compute reaches")
    parser.add_argument("--nvlink_gb", type=float, default=NVLINK / 1e9, help="GB/s of a GPU, one direction, in a node")
    parser.add_argument("--infiniband_gb", type=float, default=INFINIBAND / 1e9, help="GB/s of a GPU between nodes")
    args = parser.parse_args()
    for name in ("peak_tflops", "mfu", "nvlink_gb", "infiniband_gb"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name):g} must be above 0")
    if args.mfu > 1 or any(each < 1 or each & (each - 1) for each in args.gpus):
        raise UserError(f"--mfu {args.mfu:g} --gpus {args.gpus}: a share of at most 1, and powers of two")
    communication, teachers = list(communication_rows(args)), list(teacher_rows(args))
    print(
        f"Assumed: {args.peak_tflops:g} TFLOP/s at {args.mfu:.0%}, {args.nvlink_gb:g} GB/s in nodes of {GPUS_A_NODE}, "
        f"{args.infiniband_gb:g} GB/s a GPU between them; bf16; three figures are ZeRO 1 / 2 / 3\n"
    )
    print(
        "| student <- teacher | GPUs | sequences a GPU | compute ms | GB sent a GPU | communication ms "
        "| step ms, all hidden | none hidden | % lost, none hidden | tokens a GPU, ZeRO-1, where both are equal "
        "| GiB, ZeRO-1 |\n" + "|---" * 11 + "|"
    )
    print("\n".join(communication))
    print(
        "\n| student <- teacher | teacher's share (head) | bytes a token: hidden / top-10 / logits "
        "| MB/s a student, hidden | of a teacher's link | GiB online | GiB with ranks | cost online | cost of ranks "
        f"(to {GPUS_A_NODE} students) | pays from a slow-down of | pays against recomputation |\n" + "|---" * 11 + "|"
    )
    print("\n".join(teachers))


if __name__ == "__main__":
    sys.exit(main())
