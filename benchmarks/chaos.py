"""What training makes of faults: a Markdown table of steps lost, seconds to resume, and whether the curve is the same.

    python -m benchmarks.chaos                        # all faults on two CPU workers, ten minutes
    python -m benchmarks.chaos worker driver          # some of them
    python -m benchmarks.chaos worker --train --base DIR --data DIR --base_format nf4 --workers 8 --use_gpu true

Each fault strikes a run of the train command while it is computing, on the tiny model unless flags of train say
otherwise. Where the fault ends the command, as a person would it is given again. Seconds are from the fault to
the first new step, and to the command's end; the longest pause is between two steps after that first one. The curve is
compared step by step with an undisturbed run's.

`raylet` and `link` start a Ray cluster of two nodes, the second one of `link` in a network namespace (root, `ip` of
iproute2); `full-disk` mounts a small tmpfs (root), `slow-folder` a bindfs (root, apt-get install bindfs); `slow-store`
and `store-cut` need $MOTO_SERVER, the path of `moto_server` in an environment of its own, whose versions are not ours
(`make test-store` makes .venv-store/bin/moto_server).
"""

import argparse
import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.faults import FAULTS, GO_ON, Strike
from benchmarks.processes import end_tree
from benchmarks.train_command import STEPS, Run, curve, prepare_rows, undisturbed_curve

STRIKE_AT = 7


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


def meet(name: str, data: str, folder: Path, flags: dict[str, str], expected: list[float]) -> Outcome:
    """Run one fault."""
    run = Run(data, folder / name / "adapter", dict(flags))
    with ExitStack() as stack:
        fault = FAULTS[name](run, stack)
        try:
            struck = strike(run, fault, name in GO_ON)
            run.mend()
            return finish(run, *struck, expected)
        finally:
            if run.process:
                end_tree(run.process.pid)


def main() -> None:
    """Read the command line, run the faults, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="last of all: flags of the train command")
    options = parser.parse_args()
    names, values = options.train[::2], options.train[1::2]
    flags = {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = flags.pop("data", "") or prepare_rows(folder)
        expected = undisturbed_curve(data, folder, flags)
        print(
            "| fault | killed | commands | steps lost | seconds to the next step | longest pause after it | "
            "seconds to the end | curve |\n|---|---|--:|--:|--:|--:|--:|---|"
        )
        for name in options.faults:
            o = meet(name, data, folder, flags, expected)
            same = f"same (within {o.worst:.0e})" if o.worst < 1e-3 else f"OTHER ({o.worst:.2g})"
            seconds = f"{o.seconds:.1f} | {o.pause:.1f} | {o.to_end:.0f}"
            print(f"| {name} | {o.killed} | {o.commands} | {o.steps_lost} | {seconds} | {same} |", flush=True)


if __name__ == "__main__":
    main()
