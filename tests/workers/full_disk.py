"""One run whose disk is full after so many bytes of a file, in its save of step 4, once for each offset.

usage: full_disk.py CONFIG.yaml OFFSET...; prints the offsets after which the run went on from its first checkpoint.
"""

import dataclasses
import json
import resource
import shutil
import sys
from pathlib import Path

from ki_ds import config as configuration
from ki_ds.checkpoints import checkpoint
from ki_ds.checkpoints.saver import Saver
from ki_ds.errors import UserError
from ki_ds.ranks.world import leave
from ki_ds.training import loop as training


def main(file: str, offsets: list[int]) -> None:
    config = configuration.load(file)
    run_dir, whole = Path(config.run_dir), Path(config.run_dir + "_begun")
    first = dataclasses.replace(config, train=dataclasses.replace(config.train, stop_at_step=2))
    training.train(first)
    shutil.copytree(run_dir, whole)
    save, survived = Saver.save, []
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for offset in offsets:
        shutil.rmtree(run_dir)
        shutil.copytree(whole, run_dir)

        def save_on_a_full_disk(saver, step, *arguments, _offset=offset, **options):
            resource.setrlimit(resource.RLIMIT_FSIZE, (_offset if step == 4 else hard, hard))
            try:
                save(saver, step, *arguments, **options)
                if saver._save is not None:
                    saver._save.thread.join()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        Saver.save = save_on_a_full_disk
        try:
            training.train(config)
            line = "no error"
        except UserError as error:
            line = str(error)
        Saver.save = save
        newest = checkpoint.newest_intact(run_dir / "checkpoints")
        if "cannot be written" in line and newest is not None and newest.name == "step_00000002":
            training.train(config)
            survived.append(offset)
        else:
            print(f"offset {offset}: {line}; newest {newest}", flush=True)
    print(json.dumps(survived), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(offset) for offset in sys.argv[2:]])
    leave(0)
