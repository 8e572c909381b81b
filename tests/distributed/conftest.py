"""Two processes shared by all tests of this room."""

import pytest


@pytest.fixture(scope="session")
def pair():
    """Two processes in one group."""
    pytest.importorskip("deepspeed", reason="an optional library")
    from _processes import Processes

    processes = Processes(2)
    yield processes
    processes.close()
