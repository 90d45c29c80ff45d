import os

import pytest
import torch
from hypothesis import settings

# Without a GPU Triton's kernels run in its interpreter, which must be said before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests never ask a hub; without this every missing folder costs many seconds of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# CI repeats the same examples; elsewhere property tests go on searching.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a corpus, and for each task a teacher trained on it."""
    from tests.tiny import run, tiny_corpus

    folder = tmp_path_factory.mktemp("base")
    corpus = tiny_corpus(folder / "corpus")
    for task in ("mlm", "causal"):
        run(folder / f"{task}_teacher", corpus, task=task, model={"hidden_size": 16}, train={"num_steps": 8})
    return folder
