from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher import Launcher


@pytest.fixture
def launcher(tmp_path: Path, free_port: int) -> Iterator[Launcher]:
    launcher = Launcher(free_port, tmp_path / "log")
    yield launcher
    launcher.close()
