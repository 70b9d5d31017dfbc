"""Fixtures shared by the tests: the golden files of the official code, the tiny model, one Ray session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: two cores that other processes want too make its threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = (Path(__file__).resolve().parents[2] / "shared").resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden fixtures beside the checkout. Without them a test is skipped, but never in CI."""
    if not SHARED.is_dir():
        reason = f"golden fixtures are not at {SHARED}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return SHARED


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The built-in model's folder, in the official layout."""
    from chatglm3.tiny import FOLDER

    return Path(FOLDER)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray session for all tests that need one."""
    import ray

    from cluster import session

    session.connect()
    yield
    ray.shutdown()
