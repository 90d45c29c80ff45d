"""One rank of runs whose checkpoints are written in the background by a disturbed thread.

usage: saving.py slow AT_ONCE.yaml IN_BACKGROUND.yaml    trains both, then the second again from its first checkpoint
       saving.py full|hang RANK STEP CONFIG.yaml         that rank's disk is full, or hangs, in the save of that step
"""

import shutil
import sys
import threading
import time
from pathlib import Path

from ki_ds import config as configuration
from ki_ds.checkpoints import checkpoint
from ki_ds.cli import main
from ki_ds.ranks.world import barrier, is_main, leave, rank
from ki_ds.training import loop as training

write_part = checkpoint.write_part


def slowly(temporary, files):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.3)
    return write_part(temporary, files)


def forget_all_but_the_first(root: Path) -> None:
    barrier()
    if is_main():
        for folder in sorted(root.glob("step_*"))[1:]:
            shutil.rmtree(folder)
    barrier()


def twice(at_once: str, in_background: str) -> None:
    checkpoint.write_part = slowly
    for file in (at_once, in_background):
        training.train(configuration.load(file))
    run_dir = Path(configuration.load(in_background).run_dir)
    barrier()
    if is_main():
        shutil.copytree(run_dir, run_dir.with_name("as_saved"))
    forget_all_but_the_first(run_dir / "checkpoints")
    training.train(configuration.load(in_background))


def disturbed(how: str, victim: int, step: int):
    def write(temporary, files):
        if rank() == victim and temporary.name == f".step_{step:08d}.tmp":
            while how == "hang":
                time.sleep(1)
            raise OSError(28, "No space left on device")
        return write_part(temporary, files)

    return write


if __name__ == "__main__":
    if sys.argv[1] == "slow":
        twice(*sys.argv[2:])
        leave(0)
    checkpoint.write_part = disturbed(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    main(["--config", sys.argv[4]])
