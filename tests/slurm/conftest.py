import os
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, what_is_missing
from tests.tiny import tiny_corpus


@pytest.fixture(scope="session")
def cluster():
    """Slurm, started; every test that asks for it is skipped by name where it cannot be."""
    if missing := what_is_missing():
        pytest.skip(f"Slurm cannot be started here: {missing}")
    with tempfile.TemporaryDirectory(prefix="slurm_") as folder:  # a short path, open to others: it holds sockets
        os.chmod(folder, 0o711)
        with Cluster(Path(folder)) as found:
            yield found


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("data") / "corpus", num_documents=40)
