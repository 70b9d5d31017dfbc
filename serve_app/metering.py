"""An engine that is measured: what each request reads and writes, and how long it takes."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from chatglm3.engines import Delta, Engine, Load, PromptTooLong, Sampling
from serve_app import metrics
from serve_app.answers import StoppedEarly
from serve_app.metrics import Metrics
from serve_app.places import Places
from serve_app.request_record import RequestRecord, current


class MeteredEngine:
    """Passes everything on to an engine, and takes down what its answers were."""

    def __init__(
        self,
        engine: Engine,
        measured: Metrics,
        max_prompt_tokens: int | None = None,
        check_adapter: Callable[[str], object] = bool,
    ) -> None:
        """Prompts of more than `max_prompt_tokens` are refused, and adapters that `check_adapter` raises for."""
        self._check_adapter = check_adapter
        self._engine = engine
        self._metrics = measured
        self._max_prompt_tokens = max_prompt_tokens
        self._places = Places(engine.max_batch)
        self.context_length = engine.context_length
        self.max_batch = engine.max_batch
        self.adapters = engine.adapters

    @property
    def healthy(self) -> bool:
        """See `Engine.healthy`."""
        return self._engine.healthy

    @property
    def load(self) -> Load:
        """See `Engine.load`."""
        return self._engine.load

    async def prepare(self, sampling: Sampling) -> None:
        """See `Engine.prepare`."""
        if sampling.adapter:
            self._check_adapter(sampling.adapter)
        await self._engine.prepare(sampling)

    def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`."""
        if self._max_prompt_tokens and len(prompt_ids) > self._max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens, and {self._max_prompt_tokens} are allowed here"
            )
        record = current.get() or RequestRecord("")
        deltas = self._engine.generate(prompt_ids, replace(sampling, client=record.key))
        record.model = sampling.adapter or self._metrics.model
        return self._measured(prompt_ids, deltas, record)

    async def _measured(
        self, prompt_ids: list[int], deltas: AsyncGenerator[Delta, None], record: RequestRecord
    ) -> AsyncGenerator[Delta, None]:
        async with aclosing(deltas), self._places.taken(record):
            if record.prompt is not prompt_ids:
                record.prompt = prompt_ids
                record.prompt_tokens += len(prompt_ids)
                self._metrics.record(metrics.PROMPT_TOKENS, len(prompt_ids), model=record.model)
            started = last = time.perf_counter()
            ending, first, model = "abort", True, record.model
            try:
                async for delta in deltas:
                    now, count = time.perf_counter(), len(delta.token_ids)
                    if first and count:
                        record.first_token_s = now - started
                        self._metrics.record(metrics.FIRST_TOKEN, now - started, model=model)
                    elif count:  # tokens that come together share the time, and are one observation, as vLLM's are
                        self._metrics.record(metrics.BETWEEN_TOKENS, (now - last) / count, model=model)
                    first, last = first and not count, now
                    record.completion_tokens += count
                    ending = delta.finish_reason or ending
                    self._metrics.record(metrics.GENERATION_TOKENS, count, model=model)
                    yield delta
            except StoppedEarly:
                ending = "stop"
            except Exception:
                ending = "error"
                raise
            finally:
                record.finish_reason = ending
                self._metrics.record(metrics.REQUEST, time.perf_counter() - started, model=model)
                self._metrics.record(metrics.FINISHED, model=model, finished_reason=ending)

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.close()
