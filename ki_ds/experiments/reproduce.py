"""An experiment of the paper from one command: corpora, runs, what follows them, report."""

from __future__ import annotations

import glob
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ki_ds.data.corpora import gensim_dump_path
from ki_ds.data.prepare import TokenizerSpec, build_store
from ki_ds.errors import UserError
from ki_ds.experiments.recipes import ROOT, Recipe, Scale, configuration_of, plan_runs, read_recipe, read_scale
from ki_ds.jobs.chain import Job, Place, run_jobs
from ki_ds.jobs.supervisor import run_group
from ki_ds.reports.report import text_table, write_report


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be reproduced.

    Args:
        recipe, scale: their names.
        seeds: students of each.
        data: {domain: texts, or a prepared corpus}.
        tokenizer: of texts; null trains one on those of the first domain.
        downstream: folder of downstream sets, for commands that need them.
        baselines: false leaves out runs that are there for comparison alone.
        out: where everything goes; experiments of one scale share their runs there.
    """

    recipe: str
    scale: str = "paper"
    seeds: int = 1
    data: Mapping[str, Sequence[str]]
    tokenizer: str | None = None
    downstream: str | None = None
    baselines: bool = True
    out: Path


@dataclass(frozen=True)
class PlannedExperiment:
    """A request with everything resolved, before anything is written."""

    request: Request
    recipe: Recipe
    scale: Scale
    task: str
    corpora: dict[str, Path]
    texts: dict[str, list[Path]]  # of the corpora that are to be prepared
    jobs: list[Job]


def plan(request: Request, *, num_ranks: int = 1, dry: bool = False) -> PlannedExperiment:
    """The plan of a request for jobs of so many ranks; `dry` allows that corpora are missing.

    Raises:
        UserError: an unknown recipe or scale, or missing corpora.
    """
    recipe, scale = read_recipe(request.recipe), read_scale(request.scale)
    if not request.baselines and not any(arm.baseline for arm in recipe.runs.values()):
        raise UserError(f"--no_baselines: {request.recipe} has no runs that could be left out; leave the option out")
    if request.downstream is not None and "{downstream}" not in " ".join(recipe.then.values()):
        raise UserError(f"--downstream {request.downstream}: {request.recipe} fine-tunes nothing; leave it out")
    if not request.baselines:
        recipe = recipe.without_baselines()
    task = "mlm" if recipe.family == "roberta" else "causal"
    if unknown := [domain for domain in request.data if domain not in recipe.domains]:
        raise UserError(f"--data {unknown[0]}: {request.recipe} reads {', '.join(recipe.domains)} only; leave it out")
    corpora, texts = {}, {}
    for domain in recipe.domains:
        given = list(request.data.get(domain, ())) or _own_texts(scale, domain)
        if not given and not dry:
            raise UserError(
                f"{request.recipe} reads the domain {domain}, and scale {request.scale} brings no text of it; give "
                f"--data {domain}=TEXT or a prepared corpus"
            )
        if len(given) == 1 and _is_corpus(given[0]):
            corpora[domain] = Path(given[0])
        else:
            corpora[domain] = request.out / "corpora" / task / domain
            texts[domain] = [path for each in given for path in _files(domain, each)]
    if request.tokenizer is not None and not (texts and recipe.runs):
        raise UserError(f"--tokenizer {request.tokenizer}: no text is tokenized, a corpus brings its own; leave it out")
    seeds = range(1, request.seeds + 1)
    jobs = plan_runs(recipe, scale, corpora=corpora, seeds=seeds, out=request.out, num_ranks=num_ranks)
    return PlannedExperiment(request, recipe, scale, task, corpora, texts, jobs)


def _own_texts(scale: Scale, domain: str) -> list[str]:
    text = scale.texts.get(domain)
    return [str(gensim_dump_path())] if text == "demo" else [text] if text else []


def _is_corpus(path: str) -> bool:
    folder = Path(path)
    is_folder = (folder / "corpus.json").exists() or (folder / "dict.txt").exists()
    return is_folder or Path(f"{path}.idx").exists()


def _files(domain: str, pattern: str) -> list[Path]:
    found = [Path(path) for path in sorted(glob.glob(pattern))]
    if not found:
        raise UserError(f"--data {domain}={pattern}: no such file; give text, or a prepared corpus")
    return found


def reproduce(planned: PlannedExperiment, places: Sequence[Place], *, max_restarts: int = 0) -> None:
    """Do what the plan says; what is finished is not done again.

    Raises:
        UserError, ResumableError: a part could not be done; called again, it goes on there.
    """
    _prepare(planned)
    run_jobs(planned.jobs, places, max_restarts=max_restarts)
    for label, command in planned.recipe.then.items():
        _run_tool(planned, label, command)
    for page, names in (planned.recipe.report or {"": list(planned.recipe.runs)}).items():
        _report(planned, [job for job in planned.jobs if job.run_dir.name in names], page)


def _report(planned: PlannedExperiment, compared: Sequence[Job], page: str) -> None:
    if not compared:
        return
    name = "_".join(part for part in (planned.request.recipe, page) if part)
    path = planned.request.out / "reports" / f"{name}.html"
    specs = [f"{job.run_dir.name}={job.run_dir}" for job in compared]
    sections = write_report(specs, path, title=planned.recipe.title)
    Console(width=None if sys.stdout.isatty() else 160).print(text_table(sections))
    print(f"report: {path}", flush=True)


def _prepare(planned: PlannedExperiment) -> None:
    """Corpora of the texts: the first one's tokenizer is that of all."""
    if not planned.jobs:
        return
    known = [path / "tokenizer" for path in planned.corpora.values() if (path / "tokenizer").is_dir()]
    tokenizer: str | Path | TokenizerSpec = TokenizerSpec(vocab_size=planned.scale.vocab_size[planned.task])
    tokenizer = planned.request.tokenizer or (known[0] if known else tokenizer)
    for domain, texts in planned.texts.items():
        folder = planned.corpora[domain]
        print(f"corpus of {domain}: {folder}", flush=True)
        made = build_store(list(texts), tokenizer, folder, valid_fraction=planned.scale.valid_fraction)
        tokenizer = made.tokenizer_dir


def _run_tool(planned: PlannedExperiment, label: str, command: str) -> None:
    """One command of `then`: {NAME} is the folder of the run NAME with the first seed, {data:WB} a corpus,
    {texts} all texts as DOMAIN=FILE, {seq_len} that of the runs, {out} where its files go, {downstream} the folder of
    downstream sets."""
    request = planned.request
    folders = {job.run_dir.name: str(job.run_dir) for job in reversed(planned.jobs)}
    values = folders | {f"data:{domain}": str(path) for domain, path in planned.corpora.items()}
    if planned.jobs:
        values["seq_len"] = str(configuration_of(planned.jobs[0]).data.seq_len)
    values["out"] = str(request.out / "reports" / f"{request.recipe}_{label}")
    if "{downstream}" in command:
        if request.downstream is None:
            print(f"{label}: left out, it needs downstream sets (--downstream FOLDER)", flush=True)
            return
        values["downstream"] = request.downstream
    if "{texts}" in command:
        command = command.replace("{texts}", shlex.join(_texts(planned)))
    words = [_filled(word, values, request.recipe) for word in shlex.split(command)]
    print(f"{label}: {shlex.join(words)}", flush=True)
    code, stopped_by = run_group([sys.executable, str(ROOT / words[0]), *words[1:]], dict(os.environ))
    if code or stopped_by:
        raise UserError(f"{label} ended with exit code {code}; its own line says why")


def _texts(planned: PlannedExperiment) -> list[str]:
    for domain in planned.corpora.keys() - planned.texts.keys():
        raise UserError(
            f"--data {domain}={planned.corpora[domain]} is a corpus; {planned.request.recipe} needs its text"
        )
    return [f"{domain}={path}" for domain, paths in planned.texts.items() for path in paths]


def _filled(word: str, values: Mapping[str, str], where: str) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    if "{" in word:
        raise UserError(f"{where}: {word} in `then` names no run or corpus; mend the recipe")
    return word
