"""DeepSpeed's monitors, going on from a step: TensorBoard, CSV files and Weights & Biases hold every step once.

DeepSpeed opens each anew at every start. Its monitors are made here with what they had before; how they write stays its
own. Events are placed by samples.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import secrets
from pathlib import Path

from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

from ki_ds.config import MonitorConfig
from ki_ds.errors import UserError
from ki_ds.files import write_atomically


def check_packages(monitor: MonitorConfig) -> None:
    """Return silently, or raise UserError for a monitor whose package is not there."""
    for field, package in (("tensorboard", "tensorboard"), ("wandb_project", "wandb")):
        if getattr(monitor, field) and importlib.util.find_spec(package) is None:
            raise UserError(f"monitor.{field} needs the package {package}; pip install {package}, or leave it out")


def open_monitors(master: MonitorMaster, monitor: MonitorConfig, folder: Path, *, samples: int) -> None:
    """Give an engine's monitor those that the run asks for. Called by rank 0.

    Args:
        folder: RUN_DIR/monitor.
        samples: that the run goes on from; what was written of later ones is done again, and goes. With 0 all goes.
    """
    if monitor.tensorboard:
        master.tb_monitor = _tensorboard(folder / "tensorboard", samples)
    if monitor.csv:
        master.csv_monitor = _csv(folder, samples)
    if monitor.wandb_project is not None:
        master.wandb_monitor = _wandb(folder / "wandb_id", monitor.wandb_project)
    master.enabled = monitor.tensorboard or monitor.csv or monitor.wandb_project is not None


def _tensorboard(folder: Path, samples: int) -> TensorBoardMonitor:
    opened = TensorBoardMonitor(TensorBoardConfig(enabled=False))  # enabled, it would make a writer without purge_step
    from torch.utils.tensorboard import SummaryWriter

    opened.summary_writer = SummaryWriter(log_dir=str(folder), purge_step=samples + 1 if samples else 0)
    opened.enabled = True
    return opened


def _csv(folder: Path, samples: int) -> csvMonitor:
    opened = csvMonitor(CSVConfig(enabled=True, output_path=str(folder), job_name="csv"))
    for path in sorted((folder / "csv").glob("*.csv")):
        if (text := _kept(path.read_text(encoding="utf-8"), samples)) is None:
            path.unlink()
            continue
        write_atomically(path, text)
        opened.filenames.append(path.stem)  # has its header
    return opened


def _kept(text: str, samples: int) -> str | None:
    """A file's header and its rows up to `samples`, each step once as it was written last; None without a header."""
    header, *rows = [row for row in csv.reader(io.StringIO(text)) if row] or [[]]
    if header[:1] != ["step"]:
        return None
    by_step = {int(row[0]): row for row in rows if row[0].isdecimal() and int(row[0]) <= samples and samples}
    kept = io.StringIO()
    csv.writer(kept).writerows([header, *(by_step[step] for step in sorted(by_step))])
    return kept.getvalue()


def _wandb(id_file: Path, project: str) -> WandbMonitor:
    import wandb

    if not id_file.exists():
        id_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(id_file, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8))
    opened = WandbMonitor(WandbConfig(enabled=False, project=project))  # enabled, it would begin another run
    wandb.init(project=project, id=id_file.read_text(encoding="utf-8").strip(), resume="allow")
    opened.enabled = True
    return opened
