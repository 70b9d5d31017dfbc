"""`python -m cluster.leaving SECONDS [NODE_ID]`: what a pod with replicas or training does before it goes (preStop).

It tells Ray that its node is leaving. Serve then starts the node's replicas elsewhere and sends these no more requests;
train writes a checkpoint at once. This waits, so many seconds at most, until the replicas have answered what they had
begun, and a training worker, which uploads meanwhile and goes on, has been taken from here.
"""

import subprocess
import sys
import time

import ray
from ray.util.state import list_actors

from cluster import session


def leave(limit_s: int, node_id: str = "") -> None:
    """Have a node, this one unless another is named, drained, and wait for its replicas and workers to be gone."""
    session.connect()
    runtime = ray.get_runtime_context()
    node_id = node_id or runtime.get_node_id()
    # Hidden from `ray --help`; it is what Ray's autoscaler does by itself before it takes a node away.
    drain = ["ray", "drain-node", "--address", runtime.gcs_address, "--node-id", node_id]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is ending"]
    subprocess.run([*drain, "--deadline-remaining-seconds", str(limit_s)], check=True)
    deadline = time.monotonic() + limit_s
    while _at_work(node_id) and time.monotonic() < deadline:
        time.sleep(1)


def _at_work(node_id: str) -> int:
    actors = list_actors(filters=[("node_id", "=", node_id), ("state", "=", "ALIVE")])
    return sum(actor.class_name.startswith(("ServeReplica:", "RayTrainWorker")) for actor in actors)


if __name__ == "__main__":
    leave(int(sys.argv[1]), *sys.argv[2:])
