"""Runs of the train command on the tiny model, for benchmarks and tests to disturb, and what they came to."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import below
from chatglm3.tiny.knowledge import write_shards
from pipelines.run.progress import read_metrics

STEPS = 12
SETTINGS: dict[str, Any] = {
    "base_format": "fp32",
    "max_steps": STEPS,
    "save_steps": 2,
    "batch_size": 8,
    "block_tokens": 1024,
    "use_gpu": False,
    "lora": {"dropout": 0.05},  # it draws numbers, which a restart has to draw again
}
LIMIT_S = 240


def flags_of(settings: Mapping[str, Any]) -> Iterator[str]:
    """The settings as words of a command line."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flags_of({f"{name}.{part}": inner for part, inner in value.items()})
        else:
            yield from (f"--{name}", str(value))


@dataclass
class Run:
    """One run of the train command, and where it is."""

    data: str
    out: Path
    flags: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    mend: Callable[[], None] = lambda: None
    """Called when the run has made its first new step."""
    process: subprocess.Popen[str] | None = None
    commands: int = 0

    def start(self) -> None:
        """Give the command."""
        settings = SETTINGS | {"workers": 2} | self.flags | {"data": self.data, "out": self.out}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "train", *flags_of(settings)],
            env=os.environ | self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.commands += 1

    def step(self) -> tuple[int, int]:
        """The last step in metrics.jsonl, and the file's inode: it is another one after a restart."""
        for file in Path(f"{self.out}.run").glob("run-*/metrics.jsonl"):
            rows = read_metrics(file)
            return rows[-1]["step"] if rows else 0, file.stat().st_ino
        return 0, 0

    def wait(self, step: int, other_than: int = 0) -> tuple[int, int]:
        """Wait until `step` is done, in a file that is another one; gives the command again when it has ended."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            done, inode = self.step()
            if done >= step and inode != other_than:
                return done, inode
            assert self.process
            if self.process.poll() not in (None, 0):
                self.start()
            if self.process.poll() == 0 and self.out.exists():
                return done, inode
            time.sleep(0.02)
        raise TimeoutError(f"no step {step} within {LIMIT_S} s: {self.out}")

    def processes(self, name: str) -> list[psutil.Process]:
        """Processes below the command whose command line holds `name`."""
        assert self.process
        return below(self.process.pid, name)


def curve(adapter: Path) -> list[tuple[int, float]]:
    """(step, loss) of a finished run."""
    return [(row["step"], row["loss"]) for row in read_metrics(adapter / "metrics.jsonl")]


def prepare_rows(folder: Path) -> str:
    """Rows to train on."""
    write_shards(str(folder / "raw"), "demo", 120, seed=5)
    flags = ["--raw", str(folder / "raw"), "--out", str(folder / "data")]
    command = [sys.executable, "-m", "pipelines", "prepare", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(folder / "data")


def undisturbed_curve(data: str, folder: Path, flags: Mapping[str, Any]) -> list[float]:
    """The losses of a run that nothing happens to, on one worker."""
    run = Run(data, folder / "undisturbed" / "adapter", {**flags, "workers": 1})
    run.start()
    assert run.process
    assert run.process.stderr
    assert run.process.wait(timeout=LIMIT_S) == 0, run.process.stderr.read()
    return [loss for _, loss in curve(run.out)]
