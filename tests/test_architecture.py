"""The order of the house: who may import whom, who may import deepspeed, how long things may get, who is tested."""

import ast
from pathlib import Path

import pytest

from tests.tiny import ROOT

# A module imports only what stands before it here. A new module is put where its imports allow.
ORDER = [
    "ranks",
    "errors",
    "devices",
    "memory",
    "profiling",
    "ranges",
    "operational",
    "conditions",
    "teacher_entries",
    "config",
    "paper",
    "schedules",
    "distributed",
    "handover",
    "bridge",
    "data.token_index",
    "data.store",
    "data.processes",
    "data.packings",
    "data.json_records",
    "data.sources",
    "data.mediawiki",
    "data.wikitext",
    "data.corpora",
    "data.sentencepieces",
    "data.fairseq_bpe",
    "data.tokenize",
    "data.tokenizer_files",
    "data.randomness",
    "data.view",
    "data.blocks",
    "data.samples",
    "data.mixture",
    "data.batches",
    "data.words",
    "data.index_cache",
    "data.pieces",
    "data.selection",
    "data.prepare",
    "data.datasets",
    "data.describe",
    "data.proximity",
    "kernels.rows",
    "kernels.reference",
    "kernels.triton_rows",
    "kernels.triton_scale",
    "kernels.triton_dense",
    "kernels.triton_topk",
    "kernels.backend",
    "kernels.linear",
    "kernels.ops",
    "kernels.arguments",
    "loss",
    "signals",
    "objective",
    "probe",
    "rows",
    "models",
    "guard",
    "engine_state",
    "engine_monitors",
    "checkpoint",
    "convert.safe_pickle",
    "engine",
    "preflight",
    "lineage",
    "teachers.questions",
    "teachers.topk",
    "teachers.cache_files",
    "teachers.cache",
    "teachers.online",
    "teachers.overlap",
    "teachers.many",
    "teachers.factory",
    "teachers.ranks",
    "sizes",
    "communication",
    "planner",
    "saver",
    "metrics",
    "preemption",
    "watchdog",
    "stragglers",
    "intervals",
    "results",
    "savings",
    "tables",
    "figures",
    "page",
    "report",
    "teachers.cache_build",
    "teachers.answers",
    "evaluation.perplexity",
    "evaluation.measure",
    "evaluation.scores",
    "evaluation.tasks",
    "evaluation.reading",
    "evaluation.finetune",
    "evaluation.trials",
    "evaluation.downstream",
    "evaluation.along",
    "convert.fairseq",
    "convert.fairseq_to_hf",
    "convert.direct",
    "convert.zero",
    "convert.unpadded",
    "convert.sources",
    "convert.vocabulary",
    "convert.card",
    "convert.export",
    "convert.student",
    "convert.starting_point",
    "run",
    "train",
    "supervisor",
    "dry_run",
    "launcher",
    "chain",
    "demo",
    "experiment",
    "reproduce",
    "forecast",
]

# Heavy or optional packages, and the only modules that may name them.
OWNERS = {
    "deepspeed": ["engine"],
    "triton": ["kernels.triton_"],
    "pyarrow": ["data.corpora"],
    "mwparserfromhell": ["data.wikitext"],
    "sentencepiece": ["data.sentencepieces"],
    "matplotlib": ["figures"],
    "sklearn": ["evaluation.scores"],
    "scipy": ["evaluation.scores", "intervals"],
}

MAX_FUNCTION_LINES = 80
MAX_MODULE_LINES = 600


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `ki_ds.`; packages themselves end in nothing."""
    package = ROOT / "ki_ds"
    paths = {".".join(p.relative_to(package).with_suffix("").parts): p for p in sorted(package.rglob("*.py"))}
    return {name: path for name, path in paths.items() if not name.endswith("__init__")}


MODULES = modules()
PACKAGES = {str(p.parent.relative_to(ROOT)).replace("/", "."): p for p in sorted((ROOT / "ki_ds").rglob("__init__.py"))}


def imported(path: Path) -> set[str]:
    """Full names that a file imports anywhere in it: at its head, in functions, for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(names: set[str]) -> set[str]:
    """The modules of ki_ds among imported names; `from ki_ds.loss import LossOutput` imports `loss`."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "ki_ds":
            candidates = [".".join(parts[1:end]) for end in range(2, len(parts) + 1)]
            found |= {candidate for candidate in candidates if candidate in MODULES}
    return found


def test_the_imports_are_really_seen():
    """Of each kind one: `from ki_ds import x`, `from ki_ds.x import y`, `from ki_ds.x.y import z`, in a function."""
    seen = ours(imported(MODULES["train"]))
    assert {"checkpoint", "schedules", "engine", "data.batches", "evaluation.perplexity"} <= seen
    assert "transformers.AutoTokenizer" in imported(MODULES["data.tokenize"])


def test_every_module_has_its_place():
    assert len(ORDER) == len(set(ORDER))
    assert set(ORDER) == MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_only_one_way(name):
    allowed = set(ORDER[: ORDER.index(name)])
    assert ours(imported(MODULES[name])) <= allowed


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_import_no_module_from_outside_themselves(name):
    inside = name.removeprefix("ki_ds").lstrip(".")
    for module in ours(imported(PACKAGES[name])):
        assert inside
        assert module.startswith(f"{inside}.")


@pytest.mark.parametrize("package", OWNERS)
def test_a_heavy_package_has_one_owner(package):
    users = {name for name, path in MODULES.items() if any(i.split(".")[0] == package for i in imported(path))}
    assert users
    for user in users:
        assert any(user.startswith(owner) for owner in OWNERS[package]), f"{user} imports {package}"


@pytest.mark.parametrize("name", MODULES)
def test_functions_and_modules_stay_short(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_its_test_file(name):
    *folders, last = name.split(".")
    assert ROOT.joinpath("tests", *folders, f"test_{last}.py").exists()
