"""The engines of other replicas, asked as one that outlives each of them."""

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from chatglm3.checkpoint import read_config
from chatglm3.engines import AdapterFolders, Delta, EngineDied, EngineError, Load, Sampling
from chatglm3.engines.request_check import check_request
from chatglm3.engines.request_errors import RequestError
from serve_app.app_args import AppArgs
from serve_app.engine_server import Failure
from serve_app.errors import ApiError

ATTEMPTS = 2
"""Engines that one answer may come to: a request that kills them must not come to all."""

log = logging.getLogger(__name__)


class RemoteEngine:
    """All replicas of an `EngineServer`.

    When the one that answers dies, another goes on after the last token that came, and waits for a new one where there
    is no other. A greedy answer is what it would have been, up to what another batch changes in the last bits; with a
    seed too in the embedded engine, while vLLM draws other random numbers.
    """

    def __init__(self, servers: DeploymentHandle[Any], args: AppArgs) -> None:
        config = read_config(args.model)
        self.context_length: int = config.max_position_embeddings
        self.max_batch = args.max_batch  # of each, and there may be one
        self.adapters = AdapterFolders(args.adapters, args.adapter_dir)
        self._vocabulary: int = config.vocab_size
        self._servers = servers
        self._streams = servers.options(stream=True)

    @property
    def healthy(self) -> bool:
        """True: Serve replaces the engines that die."""
        return True

    @property
    def load(self) -> Load:
        """Nothing: what there is to do, each engine's own replica tells."""
        return Load(running=0, waiting=0, waiting_tokens=0, cache_use=0.0)

    async def prepare(self, sampling: Sampling) -> None:
        """See `Engine.prepare`: where one replica can do it, all can."""
        if not (sampling.adapter or sampling.guide):
            return
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with _failures_as_engines():
                    failure: Failure | None = await self._servers.prepare.remote(sampling)
            except EngineDied:
                if attempt == ATTEMPTS:
                    raise
            else:
                if failure is not None:
                    raise failure
                return

    def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`."""
        check_request(prompt_ids, sampling, self._vocabulary, self.context_length)
        return self._stream(prompt_ids, sampling)

    def close(self) -> None:
        """Nothing: Serve ends the engines."""

    async def _stream(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        drawn: tuple[int, ...] = ()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with aclosing(self._ask(prompt_ids, replace(sampling, drawn=drawn))) as deltas:
                    async for delta in deltas:
                        drawn += delta.token_ids
                        yield delta
                        if delta.finish_reason:
                            return
            except EngineDied as death:
                if attempt == ATTEMPTS:
                    raise
                log.warning("an engine died %d tokens into an answer (%s); another goes on", len(drawn), death)
            except RequestError as refusal:
                if attempt == 1 or not drawn:
                    raise
                raise EngineError(f"the engine died, and no other can go on with this answer: {refusal}") from None

    async def _ask(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """One replica's answer. EngineDied if the replica does."""
        answer = self._streams.generate.remote(prompt_ids, sampling)
        assert isinstance(answer, DeploymentResponseGenerator)
        is_complete = False
        with _failures_as_engines():
            try:
                async for item in answer:
                    if not isinstance(item, Delta):
                        raise item
                    is_complete = item.finish_reason is not None
                    yield item
            finally:
                if not is_complete:  # the client went away, or the replica is out of reach and may still write
                    answer.cancel()  # raises what the answer was refused by, again


@contextmanager
def _failures_as_engines() -> Iterator[None]:
    """Raise what Ray says of a replica as what an engine would."""
    try:
        yield
    except (BackPressureError, DeploymentUnavailableError):
        busy = "the engines are busy; try again"
        raise ApiError(503, busy, code="overloaded", headers={"Retry-After": "1"}) from None
    except RayTaskError:  # our own mistake, at which nobody died
        raise
    except RayError as error:
        raise EngineDied(f"its replica is gone: {type(error).__name__}") from error
