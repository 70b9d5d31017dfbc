"""The pass that moves each row one token on, as CUDA graphs: a GPU runs a model's thousand kernels faster than Python
starts them.

A graph has fixed shapes. So rows are filled up to a power of two, what they may attend to as well, and one graph is
captured for each such pair when it is first needed. A row that only fills up writes into one that no request has, which
is erased before one gets it.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from chatglm3.engines.slot_cache import SlotCache

Pass = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Of ids [B, 1] in rows 0.. at positions [B, 1], which see the first `length` of their rows: states [B, 1, hidden]."""
Graph = tuple[Callable[[], object], torch.Tensor]
"""What computes again, and the tensor in which the result stands then."""
Capture = Callable[[Callable[[], torch.Tensor]], Graph]

log = logging.getLogger(__name__)


def cuda_captures() -> Capture:
    """Captures that share memory, as long as one of them is there: a result stands until another graph runs."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], torch.Tensor]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: they load adapters.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    return capture


def kernel_by_kernel(run: Callable[[], torch.Tensor]) -> Graph:
    """What no graph could be made of."""
    result = run()
    return lambda: result.copy_(run()), result


class DecodeGraphs:
    """Graphs of one model's passes over one cache; they belong to the thread that runs the model."""

    def __init__(self, run: Pass, cache: SlotCache, device: torch.device, captures: Callable[[], Capture]) -> None:
        self._run = run
        self._cache = cache
        self._captures = captures
        self._inputs = torch.zeros(2, cache.num_rows, 1, dtype=torch.long, device=device)
        """Ids and positions, where all graphs read them."""
        self._forget()

    def states(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Move rows 0.. one token on: their final states [B, 1, hidden], which stand until the next call."""
        rows = min(1 << (len(ids) - 1).bit_length(), self._cache.num_rows)
        length = self._cache.room_for(max(positions) + 1)
        self._inputs[:, len(ids) : rows] = 0
        self._inputs[:, : len(ids), 0] = torch.tensor([ids, positions])
        if self._capacity != self._cache.capacity:  # it has grown: the graphs write where it was
            self._forget()
        if (rows, length) not in self._graphs:
            self._graphs[rows, length] = self._captured(rows, length)
        replay, states = self._graphs[rows, length]
        replay()
        return states[: len(ids)]

    def _captured(self, rows: int, length: int) -> Graph:
        ids, positions = self._inputs[:, :rows]
        self._run(ids, positions, length)  # lets the cache grow, and kernels be chosen
        if self._capacity != self._cache.capacity:
            self._forget()
        try:
            return self._capture(lambda: self._run(ids, positions, length))
        except RuntimeError as error:
            log.warning("no CUDA graph of this model could be captured, which makes it slow: %s", error)
            self._captures = lambda: kernel_by_kernel
            self._forget()
            return self._capture(lambda: self._run(ids, positions, length))

    def _forget(self) -> None:
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._capture = self._captures()
        self._capacity = self._cache.capacity
