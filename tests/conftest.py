"""Fixtures shared by the tests: the golden files of the official code, the tiny model, one Ray session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time, however slow the machine; `--hypothesis-profile default` looks for new ones.
settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")

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


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few prepared rows to train on."""
    from chatglm3.tiny.knowledge import write_shards
    from pipelines.preparation import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("rows")
    write_shards(str(folder / "raw"), "demo", 120, seed=5)
    return prepare(PrepareConfig(raw=str(folder / "raw"), out=str(folder / "data")))


@pytest.fixture(scope="session")
def undisturbed(rows: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> str:
    """An adapter trained by one worker, on CPU as all of these: curves are compared, and two would want two GPUs."""
    from benchmarks.train_command import SETTINGS
    from pipelines.training import TrainConfig, train

    return train(TrainConfig(data=rows, out=str(tmp_path_factory.mktemp("one") / "adapter"), **SETTINGS))
