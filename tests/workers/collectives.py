"""One rank of tests/ranks/test_world.py: every collective once, the results as a line of JSON, then `leave`.

usage: collectives.py EXIT_CODE_OF_RANK_0 EXIT_CODE_OF_RANK_1
"""

import json
import os
import sys

import torch
import torch.distributed as dist

from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError
from ki_ds.ranks.world import Notes, all_sum, barrier, from_main, is_main, leave, pick_interface, rank, say, together


def raised(error: UserError | None) -> list | None:
    """[message, said_by_main] of what `together` raises, None where it raises nothing."""
    try:
        together(error)
    except UserError as found:
        return [str(found), found.said_by_main]
    return None


def bad_news_of_rank_1() -> None:
    together(UserError("rank 1 has no disk left") if rank() == 1 else None)


def main(codes: list[int]) -> None:
    pick_interface(os.environ)
    dist.init_process_group("gloo")
    mine = rank()
    notes = Notes("test")
    found = {
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "sum": all_sum(torch.tensor([1.0, 10.0 * mine], dtype=torch.float64)).tolist(),
        "from_main": from_main({"who": mine}),
        "nobody": raised(None),
        "only_1": raised(UserError("one") if mine == 1 else None),
        "both": raised(UserError(f"rank {mine}")),
        "exit_code": ends_cleanly(bad_news_of_rank_1)(),
        "is_main": is_main(),
        "notes": [notes.to_main({"rank": mine}), notes.from_main(f"rank {mine} answers")],
    }
    barrier()
    say("said once")
    print(json.dumps(found))
    leave(codes[mine])
    print("leave came back")


if __name__ == "__main__":
    main([int(code) for code in sys.argv[1:]])
