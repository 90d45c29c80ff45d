import pytest

from tests.multinode.hosts import Hosts, what_is_missing


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Two hosts; every test that asks for them is skipped by name where there can be none."""
    if missing := what_is_missing():
        pytest.skip(f"two hosts cannot be made here: {missing}")
    with Hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found
