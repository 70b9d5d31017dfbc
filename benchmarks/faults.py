"""The faults that a run of the train command may meet, each with the place that it needs."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import psutil

from benchmarks.fault_places import (
    Line,
    Link,
    folder_for_checkpoints,
    object_store,
    several_nodes,
    small_disk,
    throttle,
    two_hosts,
)
from benchmarks.processes import below
from benchmarks.train_command import Run

SLOW_BYTES = 100_000
"""A second: a checkpoint of the tiny model takes half a minute."""


Strike = Callable[[Run], str]
"""Does the damage, and says what it was."""


def kill_a_worker(run: Run) -> str:
    """SIGKILL to one of the workers."""
    workers = run.processes("RayTrainWorker")
    workers[-1].kill()
    return f"1 of {len(workers)} worker processes"


def kill_all_workers(run: Run) -> str:
    """SIGKILL to all."""
    workers = run.processes("RayTrainWorker")
    for process in workers:
        process.kill()
    return f"all {len(workers)} worker processes"


def stop_a_worker(run: Run) -> str:
    """A worker that stands still for five seconds, as on a node that swaps."""
    workers = run.processes("RayTrainWorker")
    workers[-1].suspend()
    time.sleep(5)
    workers[-1].resume()
    return f"nothing; 1 of {len(workers)} workers stood still for 5 s"


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


def _anywhere(fault: Strike) -> Callable[[Run, ExitStack], Strike]:
    return lambda run, stack: fault


def _raylet(run: Run, stack: ExitStack) -> Strike:
    run.env, [_, node] = stack.enter_context(several_nodes())
    run.flags = {"min_workers": 1}

    def kill(run: Run) -> str:
        [raylet] = below(node.pid, "raylet/raylet")
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
