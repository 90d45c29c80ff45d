#!/usr/bin/env python3
"""Look at every host of a hostfile (or at this one) before a job is started: one table, and a line for what is wrong.

Exit code 1 if something would stop the job."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from ki_ds.cli import ends_cleanly
from ki_ds.jobs import preflight


@ends_cleanly
def main() -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--hostfile", help="as given to deepspeed; without it this host is checked")
    parser.add_argument("--run_dir", default="runs", help="the folder that all hosts must share")
    parser.add_argument("--master_addr", help="as given to deepspeed; else the first host's first address")
    parser.add_argument("--master_port", type=int, default=preflight.DEFAULT_PORT, help="as given to deepspeed")
    parser.add_argument("--ssh_port", type=int, help="as given to deepspeed")
    parser.add_argument(
        "--write_env", action="store_true", help="first put this shell's settings into ./.deepspeed_env"
    )
    args = parser.parse_args()
    if args.write_env:
        names = preflight.write_environment(Path(".deepspeed_env"), os.environ)
        print(f".deepspeed_env: {', '.join(names)}")
    if args.hostfile is None:
        answers, problems = preflight.check_this_host(args.run_dir, master_port=args.master_port)
        slots = dict.fromkeys(answers, 1)
    else:
        slots = preflight.read_hosts(args.hostfile)
        ports = {"master_port": args.master_port, "ssh_port": args.ssh_port}
        answers, problems = preflight.check(slots, args.run_dir, master_addr=args.master_addr, **ports)
    Console(width=None if sys.stdout.isatty() else 160).print(preflight.hosts_table(slots, answers))
    for problem in problems:
        print(problem)
    return 1 if any(problem.fatal for problem in problems) else 0


if __name__ == "__main__":
    sys.exit(main())
