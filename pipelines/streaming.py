"""A function over many items by Ray Data: streamed, in order, on a bounded number of CPUs."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray.data
from ray.exceptions import RayError

from cluster.errors import StageError
from cluster.progress import track

Item = TypeVar("Item")
Result = TypeVar("Result")


def stream(
    function: Callable[..., Result], items: Sequence[Item], what: str, workers: int = 0, **common: Any
) -> Iterator[Result]:
    """`function(item, **common)` for each item, in the items' order, behind a progress bar that says `what`.

    At most `workers` run at a time; 0 is as many as the cluster's machines have CPUs. Raises StageError if one fails.
    """
    if len(items) < 2:  # nothing to share out: not worth the seconds that an actor needs to start
        yield from (function(item, **common) for item in items)
        return
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    shared = ray.put(common)  # once, not with every task
    dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    results = dataset.map(
        _Caller,
        fn_kwargs={"function": function, "shared": [shared]},
        # Actors, not tasks: those would import everything again in each of Ray's waiting processes.
        compute=ray.data.ActorPoolStrategy(size=min(workers or _cpus(), len(items))),
        max_restarts=0,
    )
    try:
        for row in track(results.iter_rows(), what, len(items)):
            yield row["result"]
    except RayError as error:
        raise StageError(f"{what} failed: {str(error).strip().splitlines()[-1]}") from error


class _Caller:
    common: dict[str, Any] | None = None

    def __call__(
        self, row: dict[str, Any], function: Callable[..., Any], shared: list[ray.ObjectRef]
    ) -> dict[str, Any]:
        if self.common is None:
            self.common = ray.get(shared[0])
        return {"result": function(row["item"], **self.common)}


def _cpus() -> int:
    """A private session has more tickets than the machine has CPUs: see cluster.session."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    return max(1, min(int(ray.cluster_resources().get("CPU", 1)), nodes * (os.cpu_count() or 1)))
