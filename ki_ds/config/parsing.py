"""How a run's configuration is given, and kept beside the run.

`parse` reads `--config a.yaml --config b.yaml --optim.lr 3e-4` (later wins); `save`/`load` keep what came of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from ki_ds.config.rules import validate
from ki_ds.config.schema import RunConfig
from ki_ds.errors import UserError


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="deepspeed launchers/train_ki.sh",
        description="Train a language model, alone or inheriting from a smaller one. With bash launchers/train_ki.sh "
        "--dry_run [--num_gpus N] [--device H100] ... it only prints what the run will need (--dry_run --help).",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML of the fields below; give several, later ones win.")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse(argv: list[str]) -> RunConfig:
    """The validated run that a command line describes.

    Args:
        argv: `--config FILE` any number of times and `--group.field value`; later ones win.

    Raises:
        UserError: an unknown key, a wrong type, or values that cannot go together; it names value, rule and fix.
        SystemExit: after --help or --print_config.
    """
    return _validated(lambda parser: parser.parse_args(argv))


def of_groups(groups: dict[str, Any]) -> RunConfig:
    """The validated run of a nested dict, as a YAML file has it. Raises UserError as `parse` does."""
    return _validated(lambda parser: parser.parse_object(groups))


def _validated(
    read: Callable[[jsonargparse.ArgumentParser], jsonargparse.Namespace], *, saved: bool = False
) -> RunConfig:
    parser = _parser()
    try:
        values = read(parser)
        for group in (f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.default_factory)):
            if not isinstance(values[group], jsonargparse.Namespace):
                raise UserError(
                    f"configuration: {group}={str(values[group])[:40]} is no group of fields; write {group}.NAME"
                )
        groups = parser.instantiate(values)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"configuration: a YAML file is no UTF-8 text ({error}); save it as UTF-8") from None
    except (jsonargparse.ArgumentError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"configuration: {reason}; --help lists every field with its meaning") from None
    config = RunConfig(**{f.name: groups[f.name] for f in dataclasses.fields(RunConfig)})
    validate(config, saved=saved)
    return config


def load(path: str | Path, *, saved: bool = False) -> RunConfig:
    """The run that a configuration file describes. Raises UserError as `parse` does.

    Args:
        saved: by a run, maybe of an earlier version, whose fields without meaning may have any value.
    """
    return _validated(lambda parser: parser.parse_args(["--config", str(path)]), saved=saved)


def save(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load` and `--config` read."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
