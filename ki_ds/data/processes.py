"""A map over worker threads or processes: in order, bounded, and ended at once when its caller ends."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

from ki_ds.errors import UserError

ITEMS_PER_WORKER = 3  # in flight: bounds the memory whatever the input's size

In = TypeVar("In")
Out = TypeVar("Out")


class StoppedError(UserError):
    """The work was stopped by something other than its inputs, so that what is done of it stays for the next call."""


def ordered_map(
    function: Callable[[In], Out], items: Iterable[In], *, num_workers: int, threads: bool = False
) -> Iterator[Out]:
    """`map` over workers, in order, with a bounded number of items in flight; in the caller for one worker.

    Workers are processes, or `threads` for functions that spend their time outside Python's lock. When the caller
    stops (an error, Ctrl-C, a closed generator, a kill), so do they, at once. StoppedError: a worker died.
    """
    if num_workers <= 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Out]] = deque()
    try:
        with _thread_pool(num_workers) if threads else _process_pool(num_workers) as pool:
            for item in items:
                with _sigint_blocked():  # a worker that starts inherits it: Ctrl-C is for the caller alone
                    waiting.append(pool.submit(function, item))
                if len(waiting) >= ITEMS_PER_WORKER * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise StoppedError("a worker process died, most likely for memory; take fewer num_workers") from None


@contextlib.contextmanager
def _thread_pool(num_workers: int) -> Iterator[Executor]:
    pool = ThreadPoolExecutor(num_workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _process_pool(num_workers: int) -> Iterator[Executor]:
    # spawn: the parent has threads (progress bar, tokenizers), which a fork would tear apart
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(watched,))
    try:
        yield pool
        pool.shutdown()
    finally:
        held.close()
        if (results := pool._result_queue) is not None:
            # or the pool would wait for ever for the rest of what a worker was sending when it ended
            results._writer.close()  # type: ignore[attr-defined]
        pool.shutdown(wait=True, cancel_futures=True)
        watched.close()


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(watched: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core, and no threads beside it
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()


def _end_with_parent(watched: Connection) -> None:
    """End this worker when the other end of the pipe closes: by its parent, or with its parent's life."""
    watched.poll(None)
    os._exit(1)
