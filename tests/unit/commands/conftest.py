"""An OpenAI-compatible server that misbehaves as a test wants it to."""

import pytest

from tests.fakes.openai_server import servers


@pytest.fixture
def serve():
    """Start servers that behave as a test wants it."""
    with servers() as start:
        yield start
