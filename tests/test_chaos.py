"""Training under faults: whatever is killed, cut or full, the curve is an undisturbed run's, step by step."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import chaos, fault_places

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def expected(rows: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return chaos.undisturbed_curve(rows, tmp_path_factory.mktemp("undisturbed"))


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a file system, which root in a container often may not."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        return False
    subprocess.run(["umount", "-l", str(folder)], check=True)
    return True


def may_link() -> bool:
    """Whether this process may make network namespaces and cables between them."""
    try:
        fault_places.Link().remove()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.mark.parametrize("fault", ["controller", "full-disk", "link", "raylet", "store-cut"])
def test_the_curve_is_that_of_an_undisturbed_run(fault: str, rows: str, tmp_path: Path, expected: list[float]) -> None:
    if fault == "store-cut" and not fault_places.moto_server():
        pytest.skip('set MOTO_SERVER to the command of another environment with "moto[s3,server]>=5.2.5"')
    if fault == "full-disk" and not may_mount(tmp_path / "disk"):
        pytest.skip("no right to mount a small disk")
    if fault == "link" and not may_link():
        pytest.skip("no right to make a network namespace, or no `ip` (iproute2)")
    outcome = chaos.meet(fault, rows, tmp_path, expected)
    assert outcome.worst < 1e-3
    assert outcome.steps_lost <= 2 * chaos.SETTINGS["save_steps"]
    if fault == "link":
        assert outcome.seconds < 60  # with Ray's own settings it is more than two minutes
