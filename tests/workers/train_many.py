"""One rank that trains several configuration files one after another in one process.

usage: train_many.py [--field value ...] CONFIG.yaml...
"""

import sys

from ki_ds import config as configuration
from ki_ds.ranks.world import leave
from ki_ds.training.loop import train


def main(arguments: list[str]) -> None:
    files = [a for a in arguments if a.endswith(".yaml")]
    fields = [a for a in arguments if not a.endswith(".yaml")]
    for file in files:
        train(configuration.parse(["--config", file, *fields]))


if __name__ == "__main__":
    main(sys.argv[1:])
    leave(0)
