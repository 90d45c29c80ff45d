"""Every command by its name: `ki-ds COMMAND ...` or `python -m ki_ds COMMAND ...`; without one, the list of them."""

from __future__ import annotations

import ast
import os
import runpy
import sys
from pathlib import Path

from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "train": "launchers/train_ki.sh",
    "prepare": "tools/prepare_data.py",
    "inspect": "tools/inspect_data.py",
    "proximity": "tools/domain_proximity.py",
    "cache": "tools/cache_teacher.py",
    "report": "tools/report.py",
    "lineage": "tools/lineage.py",
    "evaluate": "tools/evaluate.py",
    "convert": "tools/convert_to_hf.py",
    "preflight": "tools/preflight.py",
    "plan-scale": "tools/plan_scale.py",
    "demo": "tools/demo.py",
    "reproduce": "launchers/reproduce.sh",
    "chain-roberta": "launchers/chain_roberta_g1_g2_g3.sh",
    "chain-gpt": "launchers/chain_gpt_73m_to_1b.sh",
    "bench": "benchmarks",
}


@ends_cleanly
def main() -> int:
    """Run the command that the command line names, as its file does; its exit code."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print("usage: ki-ds COMMAND ...          ki-ds COMMAND --help says more\n")
        for command, file in COMMANDS.items():
            print(f"  {command:14} {_first_line(ROOT / file)}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"{name!r} is no command; take one of {', '.join(COMMANDS)}")
    path = ROOT / COMMANDS[name]
    if not path.exists():
        raise UserError(f"{path} is not there; ki-ds runs from a checkout: pip install -e .")
    if path.suffix == ".sh":
        binaries = str(Path(sys.executable).parent)
        environment = os.environ | {"PYTHON": sys.executable, "PATH": f"{binaries}:{os.environ['PATH']}"}
        os.execvpe("bash", ["bash", str(path), *rest], environment)
    if path.is_dir():
        return _bench(rest)
    sys.argv = [str(path), *rest]
    runpy.run_path(str(path), run_name="__main__")
    return 0


def _bench(arguments: list[str]) -> int:
    """Run a benchmark by name, or list them."""
    files = {p.stem: p for p in sorted((ROOT / "benchmarks").glob("*.py")) if "\nif __name__ ==" in p.read_text()}
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print("usage: ki-ds bench NAME ...\n")
        for benchmark, path in files.items():
            print(f"  {benchmark:14} {_first_line(path)}")
        return 0
    if name not in files:
        raise UserError(f"{name!r} is no benchmark; take one of {', '.join(files)}")
    sys.path.insert(0, str(ROOT))
    sys.argv = [str(files[name]), *rest]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    return 0


def _first_line(path: Path) -> str:
    """What a command's file says of itself first: a docstring's line, or a shell script's comment."""
    if path.is_dir():
        path /= "__init__.py"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sh":
        return next(line[2:] for line in text.splitlines() if line.startswith("# ") and not line.startswith("# ---"))
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
