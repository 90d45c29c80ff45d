"""Errors that a user can mend, and how a command ends on one: a line, exit code 2, no traceback."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping

from ki_ds.ranks import launched

EXIT_USER_ERROR = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: started again, the run goes on


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: the value, the rule that it breaks, and what to do, e.g.
    "data.seq_len=600 exceeds the student's 512 positions; lower it or take a longer model".
    `said_by_main`: every rank of a job comes to this error, so that rank 0 alone need print it.
    """

    said_by_main = False
    exit_code = EXIT_USER_ERROR


class ResumableError(UserError):
    """The run was ended from outside: the same command, given again, goes on from its last checkpoint."""

    exit_code = EXIT_RESUMABLE


def own_rank(env: Mapping[str, str]) -> str:
    """This process's rank as whichever launcher has set it; "0" where none has."""
    place = launched(env)
    return place.rank if place else "0"


@contextlib.contextmanager
def common_to_all_ranks() -> Iterator[None]:
    """Mark what every rank does alike: a UserError from here is the same on all, and rank 0 prints it."""
    try:
        yield
    except UserError as error:
        error.said_by_main = True
        raise


def ends_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's main: a `UserError` becomes one line on stderr and exit code 2 (75 if resumable), Ctrl-C 130."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if not error.said_by_main or own_rank(os.environ) == "0":
                print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
            return error.exit_code
        except KeyboardInterrupt:
            print("interrupted; call it again to go on", file=sys.stderr, flush=True)
            return 130
        except BrokenPipeError:  # `| head` closed the pipe: not an error of ours
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return wrapped
