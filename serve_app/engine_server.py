"""Engines in replicas of their own, apart from those that speak HTTP."""

import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NoReturn

import ray
from ray import serve

from chatglm3.engines import (
    AdapterFolders,
    Delta,
    Engine,
    EngineDied,
    EngineError,
    RequestError,
    Sampling,
    load_engine,
)
from chatglm3.errors import ModelError
from serve_app.app_args import AppArgs
from serve_app.gathering import gathered
from serve_app.metrics import Metrics
from serve_app.ray_metrics import RaySink
from serve_app.scaling import WAITING_TOKENS

log = logging.getLogger(__name__)

PAUSE_S = 0.02
"""Between two messages of an answer: each costs three processes as much CPU as a token of a small model."""
Failure = EngineError | RequestError | ModelError
_FAILURES = (EngineError, RequestError, ModelError)


LAST_WORDS_S = 1.0
"""For telling the clients of open streams that the engine has died."""


def engine_of_this_replica(args: AppArgs, last_words_s: float = 0.0) -> Engine:
    """The engine that `args` describe; the process ends with it, `last_words_s` after its requests have failed."""

    def end() -> None:  # called in a thread of the engine's
        time.sleep(last_words_s)
        os._exit(1)

    # A replica with a dead engine fails fast and so attracts requests until a health check: end it soon.
    return load_engine(
        args.engine,
        args.model,
        dtype=args.dtype,
        max_batch=args.max_batch,
        speculate=args.speculate,
        tensor_parallel=args.tensor_parallel,
        gpu_memory_utilization=args.gpu_memory_utilization,
        adapters=AdapterFolders(args.adapters, args.adapter_dir),
        needs_gpu=bool(ray.get_gpu_ids()),
        on_fatal=end,
    )


def join_serve_log() -> None:
    """Write this project's log where Serve writes its own; a replica shows no other logger's."""
    for name in ("chatglm3", "serve_app"):
        log = logging.getLogger(name)
        log.handlers = logging.getLogger("ray.serve").handlers
        log.setLevel(logging.INFO)


class EngineReplica:
    """What Serve asks of a replica that has an engine."""

    _engine: Engine
    _metrics: Metrics

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where the deployment's autoscaling has a policy of its own."""
        return {WAITING_TOKENS: self._engine.load.waiting_tokens}

    def check_health(self) -> None:
        """Called by Serve every few seconds; raising has the replica replaced."""
        self._metrics.sample(self._engine.load)
        if not self._engine.healthy:
            raise RuntimeError("the engine has died")


@serve.deployment(max_ongoing_requests=32, max_queued_requests=64, max_constructor_retry_count=2)
class EngineServer(EngineReplica):
    """An engine, to be asked by `RemoteEngine`. Failures are items, so that they arrive as what they are, but the death
    of the engine: its process ends at once, or it would be asked to go on with what it has just let fail.
    """

    def __init__(self, args: AppArgs) -> None:
        join_serve_log()
        self._metrics = Metrics(args.name, [RaySink(serve.get_replica_context().replica_tag)])
        self._engine = engine_of_this_replica(args)

    async def prepare(self, sampling: Sampling) -> Failure | None:
        """See `Engine.prepare`."""
        try:
            await self._engine.prepare(sampling)
        except EngineDied as death:
            _end_process(death)
        except _FAILURES as failure:
            return failure
        return None

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta | Failure, None]:
        """See `Engine.generate`."""
        try:
            async with aclosing(gathered(self._engine.generate(prompt_ids, sampling), PAUSE_S)) as deltas:
                async for delta in deltas:
                    yield delta
        except EngineDied as death:
            _end_process(death)
        except _FAILURES as failure:
            yield failure


def _end_process(death: EngineDied) -> NoReturn:
    log.error("this replica ends with its engine: %s", death)
    os._exit(1)
