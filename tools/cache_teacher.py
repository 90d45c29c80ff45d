#!/usr/bin/env python3
"""Write down what a teacher says about the samples of a run, for `--teacher.placement cache --teacher.path OUT`.

Give the run's own arguments after the tool's: samples, masks and temperature are the run's. Called again it goes on.

  python tools/cache_teacher.py --out CACHE --topk 10 --config RUN.yaml [--inherit.steps 40000]
  torchrun --nproc_per_node 2 tools/cache_teacher.py --out CACHE --kind hidden --dtype fp16 --config RUN.yaml
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ki_ds import config as configuration
from ki_ds.cli import ends_cleanly
from ki_ds.config import RunConfig
from ki_ds.errors import UserError, common_to_all_ranks

if TYPE_CHECKING:
    import torch

    from ki_ds.data.datasets import Datasets
    from ki_ds.teachers.teacher import Teacher, TeacherFacts

TOPK = 10  # as many as the paper caches


def parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    """The tool's own arguments, and the run that the others describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, help="folder of the cache")
    parser.add_argument("--kind", choices=("topk", "hidden"), default="topk", help="K entries a row, or hidden states")
    parser.add_argument("--topk", type=int, help="K (10)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "int8"), help="of stored hidden states (fp16)")
    parser.add_argument("--teacher", help="run or Hugging Face folder; teacher.path where that names one")
    parser.add_argument(
        "--domains", nargs="+", help="cache the samples of these domains alone, for one of several teachers"
    )
    parser.add_argument("--steps", type=int, help="cache the samples of so many updates (those with alpha above 0)")
    parser.add_argument("--epochs", type=int, help="cache the samples of so many epochs instead")
    parser.add_argument("--chunk_mb", type=int, default=64, help="size of a chunk: what a crash can cost a rank")
    parser.add_argument("--export_requests", type=Path, metavar="FILE", help="write what is to be asked, as JSON lines")
    parser.add_argument("--import_answers", type=Path, metavar="FILE", help="read the answers, as JSON lines")
    parser.add_argument("--answers_tau", type=float, help="temperature of the answers' probabilities (1)")
    parser.add_argument("--teacher_parameters", type=int, help="parameters behind the answers, for FLOPs (0: unknown)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    args, rest = parser.parse_known_args(argv)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", args.local_rank)
    _check(args)
    return args, configuration.parse(rest)


def _check(args: argparse.Namespace) -> None:
    """UserError for arguments that cannot go together."""
    if (args.out is None) == (args.export_requests is None):
        raise UserError("give --out CACHE to write a cache, or --export_requests FILE to write what is to be asked")
    foreign = {
        "--topk": args.topk is not None and (args.kind == "hidden" or args.export_requests is not None),
        "--dtype": args.dtype is not None and args.kind == "topk",
        "--kind hidden": args.kind == "hidden" and (args.import_answers or args.export_requests),
        "--teacher": args.teacher is not None and (args.import_answers or args.export_requests),
        "--answers_tau": args.answers_tau is not None and not args.import_answers,
        "--teacher_parameters": args.teacher_parameters is not None and not args.import_answers,
        "--import_answers": args.import_answers is not None and args.export_requests is not None,
        "--epochs": args.epochs is not None and args.steps is not None,
    }
    for name, refused in foreign.items():
        if refused:
            raise UserError(f"{name} has no meaning with the other arguments; leave it out (see --help)")
    for name in ("topk", "steps", "epochs", "chunk_mb", "answers_tau"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value} is not positive; change it")


@ends_cleanly
def run(argv: list[str]) -> None:
    """Command line; see --help."""
    with common_to_all_ranks():
        args, config = parse(argv)
    from ki_ds.engine.student import start

    with common_to_all_ranks():
        _work(args, config, start(config.engine))


def _work(args: argparse.Namespace, config: RunConfig, device: "torch.device") -> None:
    from ki_ds.config.schedules import taught_steps
    from ki_ds.data.datasets import Datasets, open_datasets
    from ki_ds.ranks.world import on_main, say
    from ki_ds.teachers import answers, cache_build
    from ki_ds.teachers.questions import Questions

    taught = taught_steps(config)
    if not taught:
        raise UserError("inherit.schedule=none asks no teacher; give the run's own --config with its schedule")
    elsewhere = (args.out or args.export_requests.parent) / "index"

    def open_data() -> Datasets:
        return open_datasets(config.data, config.task, other_index_dir=elsewhere)

    data = on_main(open_data) or open_data()
    steps = range(taught.start, taught.start + args.steps) if args.steps else taught
    questions = Questions.of_run(config, data, steps=steps).of_domains(_domain_ids(args, config, data))
    if args.epochs is not None:
        questions = questions.of_epochs(args.epochs)
    elif args.steps is None and len(taught) < config.train.num_steps:
        which = f"the first {len(taught):,}" if not taught.start else f"{taught.start + 1:,} to {taught.stop:,}"
        say(f"of {config.train.num_steps:,} steps {which} have alpha above 0: only these are cached")
    if args.export_requests is not None:
        on_main(lambda: answers.export_requests(args.export_requests, questions, data.vocabulary.tokenizer))
        say(f"{args.export_requests}: what to ask, one masked sample a line; its answers go into --import_answers")
        return
    if args.import_answers is not None:
        if args.teacher_parameters is None:
            say("the teacher's size is not known: its FLOPs count as 0 (--teacher_parameters)")
        recording = answers.record_answers(
            args.import_answers,
            questions,
            topk=args.topk or TOPK,
            answers_tau=args.answers_tau or 1.0,
            num_parameters=args.teacher_parameters or 0,
            tokenizer=data.vocabulary.tokenizer,
        )
    else:
        teacher, facts = _teacher(args, config, data, device)
        recording = cache_build.record_teacher(
            teacher,
            facts,
            questions,
            kind=args.kind,
            topk=args.topk or TOPK,
            dtype=args.dtype or "fp16",
            device=device,
        )
    if not any(len(ids) for _, _, ids in questions.blocks()):
        raise UserError(f"no sample of the domains comes in {len(questions.steps):,} steps; cache more (--steps)")
    manifest = cache_build.build_cache(args.out, questions, recording, chunk_bytes=args.chunk_mb << 20)
    num_bytes, num_records, num_rows, _ = map(sum, zip(*manifest.chunks.values(), strict=True))
    where = f"--teacher.path {args.out}" if config.teachers is None else f"and {args.out} as its entry's path"
    say(
        f"{args.out}: {num_records:,} records, {num_rows:,} rows, {num_bytes / 1e6:,.2f} MB "
        f"({num_bytes / max(num_rows, 1):.1f} bytes a row); "
        f"train with --teacher.placement cache {where}"
    )


def _domain_ids(args: argparse.Namespace, config: RunConfig, data: "Datasets") -> "frozenset[int] | None":
    """The domains whose samples are asked about: --domains, or those of the run's entry that --teacher names."""
    taught = args.domains
    if taught is None and config.teachers is not None:
        entries = [entry for entry in config.teachers if entry.path == args.teacher]
        if args.teacher is None and not args.import_answers and not args.export_requests:
            raise UserError("the run has several teachers; say with --teacher which one, and give each its own --out")
        taught = entries[0].domains if entries else None
        if taught is None and config.teachers[0].domains is not None:
            raise UserError("the run's teachers have domains; say with --domains which of them this cache is for")
    for domain in taught or ():
        if domain not in data.trained_domains:
            raise UserError(
                f"--domains {domain} is no domain that the run trains on; take of {', '.join(data.trained_domains)}"
            )
    return None if taught is None else frozenset(data.domains.index(domain) for domain in taught)


def _teacher(
    args: argparse.Namespace, config: RunConfig, data: "Datasets", device: "torch.device"
) -> "tuple[Teacher, TeacherFacts]":
    """The running teacher, from --teacher or from the run's configuration."""
    from ki_ds.models.presets import rows_of
    from ki_ds.teachers.factory import make_teacher

    if args.teacher is None and config.teacher.placement == "cache":
        raise UserError("teacher.placement=cache names no teacher that could run; give --teacher FOLDER")
    path = args.teacher or config.teacher.path
    return make_teacher(
        dataclasses.replace(config.teacher, placement="online", path=path),
        rows_of(config, data),
        tokenizer_sha256=data.vocabulary.sha256,
        num_classes=data.vocabulary.size,
        device=device,
    )


def main() -> None:
    """End the process with the command's exit code."""
    code = run(sys.argv[1:])
    if "ki_ds.ranks.world" in sys.modules:
        from ki_ds.ranks.world import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
