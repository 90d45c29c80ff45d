#!/usr/bin/env python3
"""From raw text to a student that paid less, on two CPU cores or the GPUs of this host: see `make demo`."""

import argparse
import sys

from ki_ds.cli import ends_cleanly
from ki_ds.experiments.demo import run_demo


@ends_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("mlm", "causal"), default="mlm", help="masked or causal language models")
    parser.add_argument("--size", choices=("full", "smoke"), default="full", help="smoke: a few steps of each part")
    parser.add_argument("--seed", type=int, default=1, help="of weights, data order and masks; another folder each")
    arguments = parser.parse_args()
    run_demo(arguments.task, size=arguments.size, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
