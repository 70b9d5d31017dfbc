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
    if not items:
        return
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    compute = ray.data.TaskPoolStrategy(size=min(workers or _cpus(), len(items)))
    shared = ray.put(common)  # once, not with every task
    dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    results = dataset.map(_call, fn_kwargs={"function": function, "shared": [shared]}, compute=compute)
    try:
        for row in track(results.iter_rows(), what, len(items)):
            yield row["result"]
    except RayError as error:
        raise StageError(f"{what} failed: {str(error).strip().splitlines()[-1]}") from error


def _call(row: dict[str, Any], function: Callable[..., Any], shared: list[ray.ObjectRef]) -> dict[str, Any]:
    return {"result": function(row["item"], **ray.get(shared[0]))}


def _cpus() -> int:
    """A private session has more tickets than the machine has CPUs: see cluster.session."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    return max(1, min(int(ray.cluster_resources().get("CPU", 1)), nodes * (os.cpu_count() or 1)))
