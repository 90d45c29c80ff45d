#!/usr/bin/env python3
"""Convert a fairseq file, a run or checkpoint of ours, or a DeepSpeed folder into a Hugging Face folder."""

import argparse
import sys
from pathlib import Path

from ki_ds.cli import ends_cleanly
from ki_ds.convert.export import Options, convert
from ki_ds.convert.folder import describe
from ki_ds.errors import UserError


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", nargs="?", type=Path, help="fairseq .pt; run or checkpoint folder; DeepSpeed folder")
    parser.add_argument("output", nargs="?", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="of the written weights")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder; GPT-2's vocabulary with a dict.txt")
    parser.add_argument("--dict", type=Path, dest="dictionary", help="fairseq's dict.txt (default: beside the .pt)")
    parser.add_argument("--data", type=Path, help="token files to compare on (default: valid or train beside the .pt)")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the run's best weights)")
    parser.add_argument("--config", type=Path, help="config.json of a DeepSpeed folder's model (default: beside it)")
    parser.add_argument(
        "--fairseq_option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option that a fairseq file lacks and no tensor shows (activation_fn=gelu); once each",
    )
    parser.add_argument("--license", default="other", help="license named in the model card")
    parser.add_argument("--from_hf", type=Path, help="only check a Hugging Face folder, and say how a run takes it")
    options = vars(parser.parse_args())
    options["fairseq_options"] = dict(_pair(given) for given in options.pop("fairseq_option"))
    path, output, folder = (options.pop(name) for name in ("input", "output", "from_hf"))
    if folder is not None:
        if path is not None or Options(**options) != Options():
            raise UserError(f"--from_hf={folder} stands alone: the folder is used as it is; leave the rest out")
        print("\n".join(describe(folder)))
    elif output is None:
        raise UserError("INPUT and OUTPUT are needed; --help says what they are")
    else:
        convert(path, output, Options(**options))


def _pair(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not equals:
        raise UserError(f"--fairseq_option {given} is not NAME=VALUE; write e.g. activation_fn=gelu")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
