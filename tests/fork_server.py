"""The server of tests/forked.py: a process with every slow import done, which forks for each command that is asked for.

usage: python -m tests.fork_server ADDRESS    of a Unix socket; it ends with its last connection

A request is a JSON message with the three standard streams beside it. The answer is the child's process id, or 0 where
a fork cannot stand in for the command; then, once the child has ended, its status and CPU seconds. A connection that
its other end closes ends the child, and its process group if it leads one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
from types import ModuleType

READ_AT_IMPORT = ("DS_", "HF_", "LD_", "MKL_", "OMP_", "PYTHON", "TORCH", "TRANSFORMERS_", "TRITON_")
SLOW = ["deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run"]


def import_everything() -> dict[str, str]:
    """Import what commands import; the environment that this leaves."""
    import ki_ds

    for name in [*SLOW, *(module.name for module in pkgutil.walk_packages(ki_ds.__path__, "ki_ds."))]:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the threads that an import has started"
    gc.freeze()
    return dict(os.environ)


class Server:
    """Answers requests; `serve` comes back in each child, with what was asked for."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        before = dict(os.environ)
        self.environment = import_everything()
        self.set_by_imports = {name: v for name, v in self.environment.items() if before.get(name) != v}
        self.children: dict[socket.socket, tuple[int, int]] = {}  # connection: (process id, group to end with it)
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> dict:
        while events := self.selector.select(60 if self.is_alone() else None):
            for key, _ in events:
                if key.fileobj is self.listener:
                    self.selector.register(self.listener.accept()[0], selectors.EVENT_READ)
                elif isinstance(key.fileobj, int):
                    self.report_end(key.fileobj, connection=key.data)
                elif (request := self.answer(key.fileobj)) is not None:
                    return request
        os._exit(0)  # whoever started it has died before it asked for anything

    def is_alone(self) -> bool:
        return len(self.selector.get_map()) == 1

    def answer(self, connection: socket.socket) -> dict | None:
        """Fork for a request, or end the child of a connection that was closed; in the child the request."""
        message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            self.forget(connection)
            return None
        request = json.loads(message)
        request["env"] = self.set_by_imports | request["env"]
        if not self.fits(request["env"]):
            connection.send(b"0")
        elif pid := os.fork():
            self.children[connection] = (pid, request["group"])
            self.selector.register(os.pidfd_open(pid), selectors.EVENT_READ, connection)
        else:
            for key in list(self.selector.get_map().values()):
                if key.fileobj is not connection:
                    os.close(key.fileobj) if isinstance(key.fileobj, int) else key.fileobj.close()
            self.selector.close()
            return request | {"streams": streams, "connection": connection}
        for stream in streams:
            os.close(stream)
        return None

    def fits(self, env: dict[str, str]) -> bool:
        """Whether variables that are read at import are as they were for this process."""
        names = {name for name in (*env, *self.environment) if name.startswith(READ_AT_IMPORT)}
        return all(env.get(name) == self.environment.get(name) for name in names)

    def forget(self, connection: socket.socket) -> None:
        pid, group = self.children.get(connection, (0, 0))
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL) if group else os.killpg(pid, signal.SIGKILL)
        self.selector.unregister(connection)
        connection.close()
        if self.is_alone():
            os._exit(0)

    def report_end(self, pidfd: int, connection: socket.socket) -> None:
        pid, _ = self.children.pop(connection)
        _, status, usage = os.wait4(pid, 0)
        with contextlib.suppress(OSError):
            connection.send(f"{status} {usage.ru_utime + usage.ru_stime}".encode())
        self.selector.unregister(pidfd)
        os.close(pidfd)


def become(connection: socket.socket, streams: list[int], env: dict[str, str], cwd: str, group: int, session: bool):
    """Make of the child of a fork the process that was asked for, and say so."""
    os.setsid() if session else os.setpgid(0, group)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    random.seed()
    connection.send(str(os.getpid()).encode())
    connection.close()


def run(words: list[str]) -> None:
    """Run what follows `python` on a command line."""
    if words[0] == "-u":
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        words = words[1:]
    kind, main = words[0], ModuleType("__main__")
    if kind == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = main
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[0], main.__file__ = words, os.path.dirname(os.path.realpath(kind)), kind
        with open(kind, "rb") as script:
            code = compile(script.read(), kind, "exec")
        exec(code, vars(main))


def end(words: list[str]) -> None:
    """`run` and end as Python does, but without the half second in which every module would be taken down."""
    code = 0
    try:
        run(words)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if not isinstance(exit.code, int | None):
            print(exit.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind("\0" + sys.argv[1])
    except OSError:
        sys.exit(0)  # another worker's server was first
    listener.listen(128)
    request = Server(listener).serve()
    words = request.pop("words")
    become(**request)
    del listener, request
    end(words)
