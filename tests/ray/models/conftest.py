"""Fixtures of these tests."""

from tests.support.exported import exported as exported
from tests.support.exported import image_aspect as image_aspect
