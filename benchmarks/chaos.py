"""What training makes of faults: a Markdown table of steps lost, seconds to resume, and whether the curve is the same.

    python -m benchmarks.chaos                        # all faults on two CPU workers, ten minutes
    python -m benchmarks.chaos worker driver          # some of them

Each fault strikes a run of the train command on the tiny model while it is computing. Where that ends the command, as
a person would it is given again. Seconds are from the fault to the first new step, and to the command's end; the
longest pause is between two steps after that first one. The curve is compared step by step with an undisturbed run's.

`raylet` and `link` start a Ray cluster of two nodes, the second one of `link` in a network namespace (root, `ip` of
iproute2); `full-disk` mounts a small tmpfs (root), `slow-folder` a bindfs (root, apt-get install bindfs); `slow-store`
and `store-cut` need $MOTO_SERVER, the path of `moto_server` in an environment of its own, whose versions are not ours
(`make test-store` makes .venv-store/bin/moto_server).
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fault_places import (
    Line,
    Link,
    end_tree,
    folder_for_checkpoints,
    object_store,
    several_nodes,
    small_disk,
    throttle,
    two_hosts,
)
from chatglm3.tiny.knowledge import write_shards
from pipelines.run.progress import read_metrics

STEPS, STRIKE_AT = 12, 7
SETTINGS: dict[str, Any] = {
    "base_format": "fp32",
    "max_steps": STEPS,
    "save_steps": 2,
    "batch_size": 8,
    "block_tokens": 1024,
    "use_gpu": False,
}
LIMIT_S = 240
SLOW_BYTES = 100_000
"""A second: a checkpoint of the tiny model takes half a minute."""


@dataclass
class Outcome:
    """What became of a run."""

    killed: str
    steps_lost: int
    seconds: float
    """From the fault to the first new step."""
    pause: float
    """The longest between two steps behind that one."""
    to_end: float
    """Seconds from the fault to the end of the command."""
    commands: int
    """How often the command was given."""
    worst: float
    """Largest relative difference of a step's loss to the undisturbed run's; infinite unless every step is there."""


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
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "train", *flags],
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
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in below if name in " ".join(_command_line(p))]


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


Strike = Callable[[Run], str]
"""Does the damage, and says what it was."""


def kill_a_worker(run: Run) -> str:
    """SIGKILL to one of two workers."""
    run.processes("RayTrainWorker")[-1].kill()
    return "1 of 2 worker processes"


def kill_all_workers(run: Run) -> str:
    """SIGKILL to both."""
    for process in run.processes("RayTrainWorker"):
        process.kill()
    return "both worker processes"


def stop_a_worker(run: Run) -> str:
    """A worker that stands still for five seconds, as on a node that swaps."""
    process = run.processes("RayTrainWorker")[-1]
    process.suspend()
    time.sleep(5)
    process.resume()
    return "nothing; 1 of 2 workers stood still for 5 s"


@contextmanager
def held_back(process: psutil.Process) -> Iterator[None]:
    """A process that stands still three quarters of the time, as on a node that others use."""
    ended = threading.Event()

    def hold() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not ended.is_set():
                process.suspend()
                time.sleep(0.3)
                process.resume()
                time.sleep(0.1)

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    try:
        yield
    finally:
        ended.set()
        holder.join()


def kill_the_controller(run: Run) -> str:
    """SIGKILL to Ray Train's own actor."""
    assert run.process
    assert run.process.stderr
    run.processes("TrainController")[0].kill()
    said = run.process.stderr.read()
    assert "the same command goes on from the last checkpoint" in said, said
    assert "Traceback" not in said, said
    return "Ray Train's controller; given again"


def kill_the_driver(run: Run) -> str:
    """SIGKILL to the command."""
    assert run.process
    run.process.kill()
    run.process.wait()
    return "the command; given again"


def interrupt_the_driver(run: Run) -> str:
    """Ctrl-C."""
    assert run.process
    run.process.send_signal(signal.SIGINT)
    run.process.wait()
    return "Ctrl-C; given again"


@contextmanager
def watched(run: Run) -> Iterator[list[float]]:
    """The times at which a run made a step, as they come."""
    times: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        last = run.step()
        while not ended.wait(0.02):
            if (now := run.step()) != last:
                times.append(time.monotonic())
                last = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield times
    finally:
        ended.set()
        watcher.join()


def strike(run: Run, fault: Strike, goes_on: bool) -> tuple[str, int, float]:
    """Let the fault happen in the middle of the run: what was killed, steps lost, seconds to the next new step."""
    run.start()
    inode = run.wait(STRIKE_AT)[1]
    begun = time.monotonic()
    killed = fault(run)
    before = run.step()[0]
    if goes_on:
        run.wait(before + 1)
        return killed, 0, time.monotonic() - begun
    begun = time.monotonic()
    kept = run.wait(0, other_than=inode)[0]
    run.wait(kept + 1)
    return killed, max(0, before - kept), time.monotonic() - begun


def finish(run: Run, killed: str, lost: int, seconds: float, expected: list[float]) -> Outcome:
    """Wait for the run's end and compare its curve."""
    assert run.process
    resumed = time.monotonic()
    with watched(run) as times:
        _wait_for_end(run)
    pauses = [after - before for before, after in pairwise([resumed, *times])]
    found = curve(run.out)
    same_steps = [step for step, _ in found] == list(range(1, STEPS + 1))
    differences = [abs(loss - other) / other for (_, loss), other in zip(found, expected, strict=False)]
    worst = max(differences) if same_steps else float("inf")
    to_end = seconds + time.monotonic() - resumed
    return Outcome(killed, lost, seconds, max(pauses, default=0.0), to_end, run.commands, worst)


def _wait_for_end(run: Run) -> None:
    assert run.process
    while not run.out.exists():
        run.wait(STEPS)
        if run.process.poll() is not None and run.process.returncode:
            run.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(timeout=60)
    run.process.wait(timeout=60)


def curve(adapter: Path) -> list[tuple[int, float]]:
    """(step, loss) of a finished run."""
    return [(row["step"], row["loss"]) for row in read_metrics(adapter / "metrics.jsonl")]


def meet(name: str, data: str, folder: Path, expected: list[float]) -> Outcome:
    """Run one fault."""
    run = Run(data, folder / name / "adapter")
    with ExitStack() as stack:
        fault = FAULTS[name](run, stack)
        try:
            struck = strike(run, fault, name in GO_ON)
            run.mend()
            return finish(run, *struck, expected)
        finally:
            if run.process:
                end_tree(run.process.pid)


def _anywhere(fault: Strike) -> Callable[[Run, ExitStack], Strike]:
    return lambda run, stack: fault


def _raylet(run: Run, stack: ExitStack) -> Strike:
    run.env, [_, node] = stack.enter_context(several_nodes())
    run.flags = {"min_workers": 1}

    def kill(run: Run) -> str:
        below = psutil.Process(node.pid).children(recursive=True)
        [raylet] = [process for process in below if "raylet/raylet" in " ".join(_command_line(process))]
        raylet.kill()
        return "the raylet of 1 of 2 nodes"

    return kill


def _link(run: Run, stack: ExitStack) -> Strike:
    run.env, link = stack.enter_context(two_hosts())
    run.flags, run.mend = {"min_workers": 1}, partial(_mend, link)

    def cut(run: Run) -> str:
        link.cut()
        return "the link between 2 nodes, until the first new step"

    return cut


def _mend(link: Link) -> None:
    """Plug the cable in again; Ray must end all that is left on the node that it gave up."""
    link.mend()
    deadline = time.monotonic() + 30
    while left := link.processes_there():
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def _full_disk(run: Run, stack: ExitStack) -> Strike:
    disk = stack.enter_context(small_disk())
    run.flags = {"storage": disk}

    def fill(run: Run) -> str:
        filler = disk / "filler"
        assert run.process
        assert run.process.stderr
        with filler.open("wb", buffering=0) as file:
            while run.process.poll() is None:  # what a deleted checkpoint frees is taken too
                with contextlib.suppress(OSError):
                    file.write(b"0" * 65536)
                    continue
                time.sleep(0.01)
        assert "No space left" in run.process.stderr.read()
        filler.unlink()
        return "the disk of checkpoints is full; freed, given again"

    return fill


def _slow_folder(run: Run, stack: ExitStack) -> Strike:
    folder = stack.enter_context(folder_for_checkpoints())
    run.flags = {"storage": folder}

    def slow(run: Run) -> str:
        throttle(folder, SLOW_BYTES)
        return f"nothing; the folder of checkpoints takes {SLOW_BYTES // 1000} KB a second from now on"

    return slow


def _line_to_a_store(run: Run, stack: ExitStack) -> Line:
    line, place, run.env = stack.enter_context(object_store())
    run.flags = {"storage": place}
    return line


def _slow_store(run: Run, stack: ExitStack) -> Strike:
    line = _line_to_a_store(run, stack)

    def slow(run: Run) -> str:
        line.delay_s = 0.25
        return "nothing; the store takes 0.25 s for 64 KB from now on"

    return slow


def _cut_store(run: Run, stack: ExitStack) -> Strike:
    line = _line_to_a_store(run, stack)

    def cut(run: Run) -> str:
        line.cut = True
        time.sleep(6)
        line.cut = False
        return "the line to the store for 6 s"

    return cut


FAULTS: dict[str, Callable[[Run, ExitStack], Strike]] = {
    "worker": _anywhere(kill_a_worker),
    "all-workers": _anywhere(kill_all_workers),
    "slow-worker": _anywhere(stop_a_worker),
    "controller": _anywhere(kill_the_controller),
    "driver": _anywhere(kill_the_driver),
    "interrupt": _anywhere(interrupt_the_driver),
    "raylet": _raylet,
    "link": _link,
    "full-disk": _full_disk,
    "slow-folder": _slow_folder,
    "slow-store": _slow_store,
    "store-cut": _cut_store,
}
"""Gives a run the place that the fault needs, and returns the fault."""
GO_ON = {"slow-worker", "slow-folder", "slow-store", "store-cut"}  # faults that end no process


def prepare_rows(folder: Path) -> str:
    """Rows to train on."""
    write_shards(str(folder / "raw"), "demo", 120, seed=5)
    flags = ["--raw", str(folder / "raw"), "--out", str(folder / "data")]
    command = [sys.executable, "-m", "pipelines", "prepare", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(folder / "data")


def undisturbed_curve(data: str, folder: Path) -> list[float]:
    """The losses of a run that nothing happens to, on one worker."""
    run = Run(data, folder / "undisturbed" / "adapter", {"workers": 1})
    run.start()
    assert run.process
    assert run.process.stderr
    assert run.process.wait(timeout=LIMIT_S) == 0, run.process.stderr.read()
    return [loss for _, loss in curve(run.out)]


def main() -> None:
    """Read the command line, run the faults, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = prepare_rows(folder)
        expected = undisturbed_curve(data, folder)
        print(
            "| fault | killed | commands | steps lost | seconds to the next step | longest pause after it | "
            "seconds to the end | curve |\n|---|---|--:|--:|--:|--:|--:|---|"
        )
        for name in options.faults:
            o = meet(name, data, folder, expected)
            same = f"same (within {o.worst:.0e})" if o.worst < 1e-3 else f"OTHER ({o.worst:.2g})"
            seconds = f"{o.seconds:.1f} | {o.pause:.1f} | {o.to_end:.0f}"
            print(f"| {name} | {o.killed} | {o.commands} | {o.steps_lost} | {seconds} | {same} |", flush=True)


if __name__ == "__main__":
    main()
