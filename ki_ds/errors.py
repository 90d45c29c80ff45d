"""Errors that a user can mend: one line each, and the exit code of the command that ends on one."""

import contextlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def common_to_all_ranks() -> Iterator[None]:
    """Mark what every rank does alike: a UserError from here is the same on all, and rank 0 prints it."""
    try:
        yield
    except UserError as error:
        error.said_by_main = True
        raise
