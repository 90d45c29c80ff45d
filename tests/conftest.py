import fcntl
import os
import shutil

# Two workers share two cores: read by torch at its import, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests import forked

# Without a GPU Triton's kernels run in its interpreter, which must be said before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests never ask a hub; without this every missing folder costs many seconds of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# CI repeats the same examples; elsewhere property tests go on searching.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def no_forked_process_outlives_its_test():
    """Nor does a failing test's, which its traceback would hold."""
    before = set(forked.running)
    yield
    for process in set(forked.running) - before:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, worker_id):
    """A folder with a corpus and a teacher for each task, trained on it; made once for all workers, read only."""
    from tests.tiny import run, tiny_corpus

    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "trained"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            corpus = tiny_corpus(folder / "corpus")
            for task in ("mlm", "causal"):
                run(folder / f"{task}_teacher", corpus, task=task, model={"hidden_size": 16}, train={"num_steps": 8})
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="module")
def base(trained, tmp_path_factory):
    """A room of tests' own copy of `trained`: a run that one leaves is in no other's way."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("base") / "base")
