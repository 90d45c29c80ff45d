"""One rank of a run in which one rank hangs for ever, or is slow from a step on.

usage: hanging.py RANK STEP hang|slow CONFIG.yaml
"""

import sys
import time

from ki_ds.cli import main
from ki_ds.engine.student import StudentEngine
from ki_ds.ranks.world import rank


def disturb(victim: int, step: int, how: str) -> None:
    loss = StudentEngine.loss

    def disturbed(self, *arguments):
        if rank() == victim and self._engine.global_steps + 1 >= step:
            while how == "hang":
                time.sleep(1)
            began = time.perf_counter()
            found = loss(self, *arguments)
            time.sleep(max(0.02, 1.2 * (time.perf_counter() - began)))
            return found
        return loss(self, *arguments)

    StudentEngine.loss = disturbed


if __name__ == "__main__":
    disturb(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    main(["--config", sys.argv[4]])
