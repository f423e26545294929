"""What the tests on several hosts share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, missing

COUNT = int(os.environ.get("MOSAICBERT_TEST_HOSTS", "4"))


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """MOSAICBERT_TEST_HOSTS hosts (4 without that variable) until the tests are over."""
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder, Hosts(Path(folder), COUNT) as hosts:
        yield hosts
