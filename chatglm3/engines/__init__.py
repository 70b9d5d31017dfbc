"""The seam between a model and whoever asks it: ids of a prompt in, pieces of the answer out. Needs no torch."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from chatglm3.engines.adapter_folders import AdapterFolders
from chatglm3.engines.guide import Guide
from chatglm3.engines.request_errors import PromptTooLong, RequestError, UnknownAdapter, UnusableAdapter
from chatglm3.errors import ModelError

__all__ = [
    "AdapterFolders",
    "Completion",
    "Delta",
    "DtypeName",
    "Engine",
    "EngineDied",
    "EngineError",
    "EngineName",
    "FinishReason",
    "Guide",
    "Load",
    "PromptTooLong",
    "RequestError",
    "Sampling",
    "TokenLogprob",
    "UnknownAdapter",
    "UnusableAdapter",
    "complete",
    "load_engine",
]

EngineName = Literal["auto", "transformers", "vllm"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
FinishReason = Literal["stop", "length"]

MAX_BIASED_TOKENS = 1024
MAX_LOGPROBS = 20

log = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """The engine failed at this request."""


class EngineDied(EngineError):
    """The engine died with all its requests; another one may still answer them."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and when it ends. Values that no engine can follow raise RequestError."""

    max_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy: always the most probable token."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together reach this probability, after top_k."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 is no limit."""
    seed: int | None = None
    """The same seed gives the same text, whatever else the engine answers at the time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    presence_penalty: float = 0.0
    """Taken from the scores of tokens that the answer already has."""
    frequency_penalty: float = 0.0
    """Taken from a token's score for each time that the answer already has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their scores; -100 forbids a token, +100 all others."""
    logprobs: int | None = None
    """Report the logprob of each drawn token and of this many of the most probable ones."""
    guide: Guide | None = None
    """What the answer must look like."""
    adapter: str = ""
    """Name of the LoRA adapter that answers; empty is the model itself."""
    client: str = ""
    """Who asks: where requests wait, clients take turns by their tokens."""
    drawn: tuple[int, ...] = ()
    """Tokens that an engine drew for this answer before it died: the answer goes on after them, and they count."""

    def __post_init__(self) -> None:
        penalties = (self.presence_penalty, self.frequency_penalty)
        checks = (
            (self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}"),
            (0 <= self.temperature <= 100, f"temperature must be from 0 to 100, not {self.temperature}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}"),
            (self.top_k >= 0, f"top_k must be at least 0, not {self.top_k}"),
            (all(self.stop), "a stop text must not be empty"),
            (len(self.drawn) < self.max_tokens, "an answer with all its tokens has nothing to go on with"),
            (all(-2 <= value <= 2 for value in penalties), f"penalties must be from -2 to 2, not {penalties}"),
            (
                len(self.logit_bias) <= MAX_BIASED_TOKENS,
                f"logit_bias takes at most {MAX_BIASED_TOKENS} tokens, not {len(self.logit_bias)}",
            ),
            (all(-100 <= bias <= 100 for _, bias in self.logit_bias), "logit_bias must be from -100 to 100"),
            (
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"logprobs must be from 0 to {MAX_LOGPROBS}, not {self.logprobs}",
            ),
        )
        for valid, message in checks:
            if not valid:
                raise RequestError(message)


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a drawn token was: log-softmax of the model's own scores.

    Before bias, penalties, guide and temperature, which is what vLLM reports too.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens and their logprobs, best first, as many as were asked for."""


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer. The last one, and only that one, has a finish_reason."""

    text: str
    """What became readable; empty while a character or a possible stop text is incomplete."""
    token_ids: tuple[int, ...]
    """The tokens drawn for it, the stop token included, which `text` never shows."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token id, if the sampling asks for them."""


@dataclass(frozen=True)
class Load:
    """What an engine has to do at this moment."""

    running: int
    """Requests that are being answered."""
    waiting: int
    """Requests that wait for a place."""
    waiting_tokens: int
    """Prompt tokens that are still to be read, of running and waiting requests."""
    cache_use: float
    """Share of the memory for keys and values that is taken, 0 to 1."""
    prefix_hits: int = 0
    """Prompt tokens that were found in a prefix cache, since the start."""
    prefix_queries: int = 0
    """Prompt tokens that were looked for in it; 0 where the engine has none."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class Engine(Protocol):
    """Something that answers many prompts at a time."""

    context_length: int
    """Most tokens of prompt and answer together."""
    max_batch: int
    """Most prompts that it answers at a time; others wait."""
    adapters: AdapterFolders
    """LoRA adapters that it can load."""

    @property
    def load(self) -> Load:
        """What it has to do; cheap enough to be asked at every request."""

    @property
    def healthy(self) -> bool:
        """Whether it can still answer: once False, it never becomes True again."""

    async def prepare(self, sampling: Sampling) -> None:
        """Do what takes time before an answer: load the adapter, compile the guide. `generate` does it too.

        RequestError if the guide cannot be followed, UnknownAdapter if there is no adapter of that name,
        UnusableAdapter if its folder cannot be used. In `generate` the iterator raises them.
        """

    def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """Yield pieces of the answer; closing the iterator cancels the request.

        An impossible request raises RequestError here, a dead engine EngineDied, before there is an iterator;
        a failure on the way raises EngineError in it, the engine's death EngineDied.
        """

    def close(self) -> None:
        """End the engine; requests under way get EngineDied."""


async def complete(engine: Engine, prompt_ids: list[int], sampling: Sampling) -> Completion:
    """The whole answer, collected from the stream; cancelling this cancels the request."""
    texts: list[str] = []
    token_ids: list[int] = []
    async with aclosing(engine.generate(prompt_ids, sampling)) as deltas:
        async for delta in deltas:
            texts.append(delta.text)
            token_ids += delta.token_ids
            if delta.finish_reason:
                return Completion("".join(texts), tuple(token_ids), delta.finish_reason)
    raise EngineError("the answer ended without a finish reason")


def load_engine(
    name: EngineName,
    folder: str | Path,
    *,
    dtype: DtypeName = "auto",
    max_batch: int = 32,
    adapters: AdapterFolders | None = None,
    speculate: bool = False,
    tensor_parallel: int = 1,
    gpu_memory_utilization: float | None = None,
    needs_gpu: bool = False,
    on_fatal: Callable[[], object] | None = None,
) -> Engine:
    """Load the model in `folder` into the engine called `name`; "auto" chooses one and logs why.

    `dtype` "auto" is bfloat16 on a GPU (with vLLM float16 on one without it) and float32 on a CPU. At most `max_batch`
    requests run at a time, others wait. `adapters` are those that requests can name. `speculate` guesses tokens by what
    followed the last ones before, `tensor_parallel` GPUs share each layer, `gpu_memory_utilization` is the share of a
    GPU to take (vLLM only, all three). `needs_gpu`: a GPU was given to this process, which must not answer on its CPU
    instead. `on_fatal` is called when the engine has died. Raises ModelError for an unknown name, an unusable folder or
    GPU.
    """
    if name not in get_args(EngineName):
        raise ModelError(f"engine {name!r} is not known; choose auto, transformers or vllm")
    chosen = name
    if needs_gpu:
        from chatglm3.engines.choice import check_gpu

        check_gpu()
    if name == "auto":
        from chatglm3.engines.choice import choose_engine

        chosen, why = choose_engine(folder, adapters)
        log.info("engine auto: %s, %s", chosen, why)
    if chosen == "vllm":
        return _vllm_engine(
            folder,
            dtype=dtype,
            max_batch=max_batch,
            adapters=adapters,
            speculate=speculate,
            tensor_parallel=tensor_parallel,
            gpu_memory_utilization=gpu_memory_utilization,
            on_fatal=on_fatal,
        )
    options = {
        "speculate": speculate,
        "tensor_parallel": tensor_parallel > 1,
        "gpu_memory_utilization": gpu_memory_utilization is not None,
    }
    for option, asked in options.items():
        if asked:
            raise ModelError(f"{option} needs vLLM: give engine=vllm, or leave {option} out")
    from chatglm3.engines import transformers_engine

    return transformers_engine.load(folder, dtype=dtype, max_batch=max_batch, adapters=adapters, on_fatal=on_fatal)


def _vllm_engine(folder: str | Path, **settings: Any) -> Engine:
    try:
        from chatglm3.engines.vllm_engine import VllmEngine
    except ModuleNotFoundError as error:
        raise ModelError(f"engine vllm needs vLLM, but {error.name} is not installed: pip install vllm") from None
    return VllmEngine(folder, **settings)
