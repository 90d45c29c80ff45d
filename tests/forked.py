"""Python commands without the seconds of their imports: a server that has made them forks for each.

`Popen` and `run` are those of `subprocess`, with the same arguments. What the server cannot stand in for (another
program, an option of Python, another value of a variable that is read at import) runs as a true process, and so does
everything on a machine with a GPU: CUDA survives no fork.

What a fork hides, and a test of just that must start a true process for: what an import does and costs, a module that
was edited since the server started, `ru_maxrss` (it begins at the server's), and who the parent is (the server). Some
true command lines stay in the default suite.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# One server for all workers of pytest, at an abstract address, which leaves no file behind.
ADDRESS = "ki_ds tests " + os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
OPTIONS = ("-c", "-m", "-u")

running: weakref.WeakSet[Popen] = weakref.WeakSet()
_session: list[socket.socket] = []  # a connection that this process holds open: the server stays
_used_seconds = 0.0


class Popen(subprocess.Popen):
    """A process as `subprocess.Popen` starts it, forked from the server where that can stand in for it.

    A forked one leads a process group of its own, unless told otherwise, and ends at the latest with this object.
    """

    _server: socket.socket | None = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, *rest) -> None:  # fmt: skip
        words = [] if isinstance(args, str | bytes) else [str(word) for word in args]
        plain = not (shell or executable or preexec_fn or pass_fds or torch.cuda.is_available())
        if plain and words[:1] == [sys.executable] and words[1:] and (words[1] in OPTIONS or words[1][0] != "-"):
            given, session, group = rest[:6], *rest[-2:]
            request = {"words": words[1:], "cwd": str(cwd or os.getcwd()), "group": max(group, 0), "session": session}
            request["env"] = dict(os.environ if env is None else env)
            streams = [own if stream == -1 else stream for own, stream in enumerate((given[0], given[3], given[5]))]
            if self._fork(request, streams):
                self._close_pipe_fds(*given)
                return
        super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                               shell, *rest)  # fmt: skip

    def _fork(self, request: dict, streams: list[int]) -> bool:
        server = _connect()
        socket.send_fds(server, [json.dumps(request).encode()], streams)
        self.pid = int(server.recv(64) or 0)
        if not self.pid:
            return False
        self._server, self._child_created = server, True
        running.add(self)
        return True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        global _used_seconds
        if self._server is None:
            return super()._try_wait(wait_flags)
        try:
            message = self._server.recv(64, socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0)
        except BlockingIOError:
            return 0, 0
        running.discard(self)
        status, seconds = message.split() or (9, 0)  # the server is gone, and its connection with it
        _used_seconds += float(seconds)
        return self.pid, int(status)

    def _internal_poll(self, *arguments, **options):
        if self._server is None:
            return super()._internal_poll(*arguments, **options)
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def __del__(self, *arguments) -> None:
        if self._server is None:
            super().__del__(*arguments)
        else:
            self._server.close()


def run(args, *, input=None, capture_output=False, timeout=None, check=False, **options):
    """`subprocess.run` with a forked process."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(args, **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def used_seconds() -> float:
    """CPU seconds of the forked processes that have ended."""
    return _used_seconds


def _connect() -> socket.socket:
    """A new connection to the server, which is started where there is none."""
    until, started = time.monotonic() + 60, None
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect("\0" + ADDRESS)
        except ConnectionRefusedError:
            assert time.monotonic() < until, "the fork server does not start"
            if started is None:
                command = [sys.executable, "-m", "tests.fork_server", ADDRESS]
                started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            time.sleep(0.05)
        else:
            if _session:
                return connection
            _session.append(connection)
