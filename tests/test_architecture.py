"""What the import contracts do not hold: how long things may get, how many rooms there are, who is tested."""

import ast

import pytest

from tests.tiny import ROOT

PACKAGE = ROOT / "ki_ds"
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
FACES = {"loss", "__main__"}  # of one line each

# Heavy or optional packages, and the only modules that may name them.
OWNERS = {
    "triton": ["objective.triton_"],
    "pyarrow": ["data.corpora"],
    "mwparserfromhell": ["data.wikitext"],
    "sentencepiece": ["data.sentencepieces"],
    "matplotlib": ["reports.figures"],
    "sklearn": ["evaluation.scores"],
    "scipy": ["evaluation.scores", "reports.intervals"],
}

MAX_FUNCTION_LINES = 80
MAX_MODULE_LINES = 600
MAX_ROOMS = 20


def imported_packages(name: str) -> set[str]:
    """First parts of the names that a module imports anywhere in it: at its head, in functions, for types only."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            assert node.module is not None
            found.add(node.module.partition(".")[0])
    return found


def test_the_rooms_can_be_counted_at_a_glance():
    rooms = {name.partition(".")[0] for name in MODULES} - {"__init__"}
    assert len(rooms) <= MAX_ROOMS


@pytest.mark.parametrize("package", OWNERS)
def test_a_heavy_package_has_one_owner(package):
    users = {name for name in MODULES if package in imported_packages(name)}
    assert users
    for user in users:
        assert any(user.startswith(owner) for owner in OWNERS[package]), f"{user} imports {package}"


@pytest.mark.parametrize("name", MODULES)
def test_functions_and_modules_stay_short(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("name", [name for name in MODULES if "__init__" not in name and name not in FACES])
def test_every_module_has_its_test_file(name):
    *folders, last = name.split(".")
    assert ROOT.joinpath("tests", *folders, f"test_{last}.py").exists()
