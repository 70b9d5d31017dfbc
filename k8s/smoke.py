"""What an image must be able to do, asked at the end of its build: `python k8s/smoke.py`."""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
MODULES = (
    "cluster.leaving",
    "pipelines.training",
    "pipelines.merging",
    "pipelines.evaluation",
    "serve_app.app",
    "serve_app.loopback_haproxy",
)


def tools_are_there() -> None:
    """What KubeRay starts in pods of this image."""
    missing = [tool for tool in ("bash", "wget", "ray", "serve", "python") if shutil.which(tool) is None]
    assert not missing, f"not on PATH: {', '.join(missing)}"


def user_is_not_root() -> None:
    """Pods must run as the user of Ray's images, 1000."""
    assert os.getuid() == 1000, f"the user is {os.getuid()}, not 1000"


def versions_are_the_tested_ones() -> None:
    """Ray's above all: head, workers and the operator's rayVersion must be the same."""
    pins = dict(line.split("==") for line in PINS.read_text().splitlines() if "==" in line)
    for name in ("ray", "torch", "transformers", "peft"):
        found = version(name).split("+")[0]
        assert found == pins[name], f"{name} is {found}, constraints.txt says {pins[name]}"


def code_is_importable_from_anywhere() -> None:
    """Ray starts processes in folders of their own."""
    os.chdir(tempfile.gettempdir())
    for module in MODULES:
        importlib.import_module(module)


def a_stage_runs() -> None:
    """The tiny model answers."""
    command = [sys.executable, "-m", "pipelines", "predict", "--model", "tiny", "你好"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip(), "the tiny model said nothing"


CHECKS: tuple[Callable[[], None], ...] = (
    tools_are_there,
    user_is_not_root,
    versions_are_the_tested_ones,
    code_is_importable_from_anywhere,
    a_stage_runs,
)


def main() -> int:
    """Run all checks and return the exit code."""
    failed = 0
    for check in CHECKS:
        try:
            check()
        except Exception as error:
            failed += 1
            print(f"smoke: {check.__name__} is not so: {error}", file=sys.stderr)
        else:
            print(f"smoke: {check.__name__}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
