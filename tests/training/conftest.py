"""Processes of their own for runs that are killed or interrupted."""

import pytest
from _killed import forked


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have torch and the model libraries imported already."""
    return forked()
