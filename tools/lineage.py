#!/usr/bin/env python3
"""Print where a model comes from: its teachers, theirs, and what all of them cost."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from ki_ds.checkpoints import lineage
from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError
from ki_ds.models.presets import model_folder, weights_sha256


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder, checkpoint folder, or exported model with its lineage.json")
    parser.add_argument("--json", action="store_true", help="print the record itself")
    args = parser.parse_args()
    folder = Path(model_folder(args.run))
    if not folder.is_dir():
        raise UserError(f"{args.run} is no folder; name a run, a checkpoint or an exported model")
    record = lineage.read(folder, weights_sha256(str(folder)))
    if record is None:
        raise UserError(f"{folder} has no {lineage.FILE_NAME}; name a run of ours or a model that it exported")
    if args.json:
        print(json.dumps(record, indent=2))
    else:
        Console(highlight=False).print(lineage.tree(record))


if __name__ == "__main__":
    sys.exit(main())
