"""A node joins a run that may have one worker or two, and is then taken away with a notice: no step is lost by it."""

import contextlib
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.fault_places import BIN, several_nodes
from benchmarks.processes import end_tree
from benchmarks.train_command import Run
from pipelines.run.progress import read_metrics
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEADLINE_S = 20


@dataclass
class Seen:
    """What was read from a run's metrics over its time."""

    run: Run
    losses: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """Step -> number of workers -> the loss that they computed."""
    workers: int = 0
    """Of the newest step."""
    last: int = 0

    def look(self) -> "Seen":
        for file in Path(f"{self.run.out}.run").glob("run-*/metrics.jsonl"):
            for row in read_metrics(file):
                self.losses[row["step"]][row["workers"]] = row["loss"]
                self.workers, self.last = row["workers"], row["step"]
        assert self.run.process
        assert self.run.process.poll() is None, self.run.process.stderr and self.run.process.stderr.read()
        return self


@contextlib.contextmanager
def second_node(env: dict[str, str]) -> Iterator[None]:
    options = f"--address={env['RAY_ADDRESS']} --block --num-cpus=1 --object-store-memory=100000000"
    command = [str(BIN / "ray"), "start", *options.split(), "--node-ip-address=127.0.0.1"]
    node = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        end_tree(node.pid)
        node.wait()


def give_notice(env: dict[str, str]) -> None:
    """What an autoscaler or a cloud's agent tells Ray before it takes the second node."""
    script = "import ray; ray.init(log_to_driver=False); import sys; sys.stdout.write(' '.join("
    script += "n['NodeID'] for n in ray.nodes() if n['Alive'] and 'node:__internal_head__' not in n['Resources']))"
    node = subprocess.run([str(BIN / "python"), "-c", script], env=env, capture_output=True, text=True, check=True)
    told = f"--node-id={node.stdout} --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message=spot"
    command = [str(BIN / "ray"), "drain-node", f"--address={env['RAY_ADDRESS']}", *told.split()]
    subprocess.run([*command, f"--deadline-remaining-seconds={DEADLINE_S}"], env=env, check=True, capture_output=True)


def test_a_node_that_joins_gets_a_worker_and_one_that_is_taken_away_with_notice_costs_no_saved_step(
    rows: str, tmp_path: Path
) -> None:
    never = {"save_steps": 5000, "eval_steps": 5000, "max_steps": 5000, "epochs": 1000.0}
    flags = {"min_workers": 1, "workers": 2, "score_rows": 0} | never
    with several_nodes(workers=0) as (env, _):
        run = Run(rows, tmp_path / "adapter", flags, env)
        run.start()
        seen = Seen(run)
        try:
            wait_for(lambda: seen.look().last >= 2, 90)
            assert seen.workers == 1
            with second_node(env):
                wait_for(lambda: seen.look().workers == 2, 120)
                noticed, inode = seen.look().last, run.step()[1]
                give_notice(env)
                wait_for(lambda: seen.look() and run.step()[1] != inode, 90)
                kept = run.step()[0]
                wait_for(lambda: seen.look().last > kept + 3 and seen.workers == 1, 60)
        finally:
            assert run.process
            end_tree(run.process.pid)
    assert kept >= noticed  # the notice made a checkpoint: no other was due
    assert sorted(seen.losses) == list(range(1, max(seen.losses) + 1))
    again = [losses for losses in seen.losses.values() if len(losses) == 2]
    assert again  # steps that were computed by one worker, and after the change of size by two
    assert [losses[2] for losses in again] == pytest.approx([losses[1] for losses in again], rel=1e-3)
