"""A function over many items by Ray Data: streamed, in order, on a bounded number of CPUs."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray.data
from ray.exceptions import RayError

from cluster.errors import StageError, last_line
from cluster.progress import track

MOST_DEATHS = 3
"""How often the work is taken up again after a process died."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Outcome = tuple[Any, str]
"""A result and "", or None and what went wrong."""


def stream(
    function: Callable[..., Result], items: Sequence[Item], what: str, workers: int = 0, **common: Any
) -> Iterator[Result]:
    """`function(item, **common)` for each item, in the items' order, behind a progress bar that says `what`.

    At most `workers` run at a time; 0 is as many as the cluster's machines have CPUs. What a killed process was at is
    done again. Raises StageError if the function fails, or processes die again and again.
    """
    if len(items) < 2:  # nothing to share out: not worth the seconds that an actor needs to start
        yield from (function(item, **common) for item in items)
        return
    for result, error in track(_survive(function, items, workers, common), what, len(items)):
        if error:
            raise StageError(f"{what} failed: {error}")
        yield result


def _survive(
    function: Callable[..., Any], items: Sequence[Any], workers: int, common: dict[str, Any]
) -> Iterator[Outcome]:
    """The outcomes in order; when a process died, those that are missing are started again."""
    done = deaths = 0
    while done < len(items):
        try:
            for outcome in _run(function, items[done:], workers, common):
                yield outcome
                done += 1
        except RayError as error:
            deaths += 1
            if deaths > MOST_DEATHS:
                yield None, last_line(error)


def _run(function: Callable[..., Any], items: Sequence[Any], workers: int, common: dict[str, Any]) -> Iterator[Outcome]:
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    outcomes = dataset.map(
        _Caller,  # type: ignore[arg-type]  # Ray takes classes too
        fn_kwargs={"function": function, "shared": [ray.put(common)]},  # once, not with every item
        # Actors, not tasks: those would import everything again in each of Ray's waiting processes.
        compute=ray.data.ActorPoolStrategy(size=min(workers or _cpus(), len(items))),
        max_restarts=0,  # a restart would want the constructor's arguments, which Ray warns it may have lost
    )
    return (row["outcome"] for row in outcomes.iter_rows())


class _Caller:
    common: dict[str, Any] | None = None

    def __call__(
        self, row: dict[str, Any], function: Callable[..., Any], shared: list[ray.ObjectRef[dict[str, Any]]]
    ) -> dict[str, Outcome]:
        if self.common is None:
            self.common = ray.get(shared[0])
        try:
            return {"outcome": (function(row["item"], **self.common), "")}
        except Exception as error:  # as a value: Ray would print it at length, and wrap it several times
            return {"outcome": (None, f"{type(error).__name__}: {error}")}


def _cpus() -> int:
    """A private session has more tickets than the machine has CPUs: see cluster.session."""
    nodes: int = sum(node["Alive"] for node in ray.nodes())
    return max(1, min(int(ray.cluster_resources().get("CPU", 1)), nodes * (os.cpu_count() or 1)))
