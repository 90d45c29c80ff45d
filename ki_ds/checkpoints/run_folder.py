"""A run's folder as a whole: whether a run may start or go on in it, and its config.yaml and run.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ki_ds import config as configuration
from ki_ds.checkpoints import checkpoint
from ki_ds.config import RunConfig
from ki_ds.errors import UserError
from ki_ds.files import read_json, write_atomically, write_json


def check(config: RunConfig) -> None:
    """Return silently, or raise UserError when the folder holds a run that computes something else, or no run at all.

    What a first start has left that was refused or killed before it saved anything is in nobody's way.
    """
    run_dir = Path(config.run_dir)
    saved = run_dir / "config.yaml"
    if not saved.exists():
        strangers = [p.name for p in run_dir.iterdir() if p.name not in _left_by_first_start(config, run_dir)]
        if strangers:
            raise UserError(f"run_dir={run_dir} holds {strangers[0]} but no run; give an empty or new folder")
        return
    if not _holds_work(run_dir):
        (run_dir / "run.json").unlink(missing_ok=True)
        return
    changed = configuration.differences(configuration.load(saved, saved=True), config)
    if changed and config.train.changed_config == "refuse":
        name, (old, new) = next(iter(changed.items()))
        raise UserError(
            f"run_dir={run_dir} holds a run with {name}={old}, now it is {new}; give another run_dir, "
            "or --train.changed_config allow to go on with the new value"
        )


def _left_by_first_start(config: RunConfig, run_dir: Path) -> set[str]:
    """Names in a run's folder before there is a config.yaml."""
    names = {".lock", "index", "monitor", "config.yaml.tmp"}
    if config.data.index_dir is not None:
        index_dir, folder = Path(config.data.index_dir).resolve(), run_dir.resolve()
        if index_dir.is_relative_to(folder):
            names.update(index_dir.relative_to(folder).parts[:1])
    return names


def _holds_work(run_dir: Path) -> bool:
    """Whether there is something to go on from or to lose: checkpoints, or best weights of a later step than 0.

    Raises:
        UserError: it is finished, and its checkpoints were taken away.
    """
    if any((run_dir / "checkpoints").glob("step_*")):
        return True
    if _is_finished(run_dir):
        raise UserError(
            f"run_dir={run_dir} holds a finished run without its checkpoints, which would begin anew; restore one, or "
            "give another run_dir"
        )
    best = run_dir / "best" / "valid.json"
    return best.exists() and read_json(best, "step")["step"] > 0


def _is_finished(run_dir: Path) -> bool:
    manifest = run_dir / "run.json"
    return manifest.exists() and read_json(manifest, "status")["status"] == "finished"


def newest_state(config: RunConfig) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its state; (None, {"step": 0}) of a new run. Called by all ranks.

    Raises:
        UserError: no checkpoint is intact, or the run is past its last step already.
    """
    run_dir = Path(config.run_dir)
    folder = checkpoint.newest_intact(run_dir / "checkpoints")
    state = read_json(folder / "state.json") if folder else {"step": 0}
    if state["step"] > config.train.num_steps:
        raise UserError(
            f"run_dir={run_dir} is at step {state['step']} already, past train.num_steps={config.train.num_steps}; "
            "raise it"
        )
    return folder, state


def record(config: RunConfig, manifest: dict[str, Any], *, finished: bool) -> None:
    """Write config.yaml, and run.json with the run's status; a run that has finished keeps both. Called by rank 0."""
    run_dir = Path(config.run_dir)
    if finished and _is_finished(run_dir):
        return
    write_atomically(run_dir / "config.yaml", configuration.to_yaml(config))
    write_json(run_dir / "run.json", {"status": "finished" if finished else "running", **manifest})
