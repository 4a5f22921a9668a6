"""Options of all tests."""

import os
import random

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffle the tests by the number in MBM_TEST_SEED: they pass in any order."""
    if seed := os.environ.get("MBM_TEST_SEED"):
        random.Random(int(seed)).shuffle(items)
