"""Fixtures of these tests."""

from tests.support.llava import untrained_llava as untrained_llava
