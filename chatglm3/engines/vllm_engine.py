"""The production engine: vLLM, with paged attention, chunked prompts, a prefix cache and, if told to, speculation.

vLLM draws the tokens, in a process of its own. Text, stop texts, guides and adapters are made of the same parts as in
the embedded engine, so that both answer alike. It runs in the event loop that asks it first.
"""

import asyncio
import itertools
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GlmConfig

from chatglm3.adapters import native_adapter
from chatglm3.checkpoint import read_config
from chatglm3.engines import (
    AdapterFolders,
    Delta,
    DtypeName,
    EngineDied,
    EngineError,
    FinishReason,
    Load,
    Sampling,
    TokenLogprob,
)
from chatglm3.engines.adapter_folders import written_at
from chatglm3.engines.choice import native_folder
from chatglm3.engines.fair_turns import FairTurns
from chatglm3.engines.guide import GuideCompiler
from chatglm3.engines.pacing import Pacing
from chatglm3.engines.request_check import check_request
from chatglm3.engines.request_errors import RequestError, UnusableAdapter
from chatglm3.errors import ModelError
from chatglm3.folder import read_json
from chatglm3.stream import TextStream
from chatglm3.tokenizer import load_tokenizer

# Read when vLLM is imported: it reports its use to nobody, and leaves the log of this process alone.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
# Its other sampler, the default, is compiled at the start, by a compiler that images without CUDA's toolkit lack.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

from vllm import SamplingParams
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)  # of which vLLM wants its limit to be one
# How many can be answered with at the same time, others wait. One takes 70 MB of a GPU at rank 16, 270 MB at rank 64.
LEAST_LORAS, MOST_LORAS = 4, 16
# Answers from documents repeat their words: what followed the last few tokens before is what they go on with.
NGRAM = {"num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4}

# Compiling for a CPU takes a minute. And a request with a seed whose prompt is read in chunks ends vLLM 0.32 there:
# "CPU Generator does not use offset". Its cache would be nearly all memory; $VLLM_CPU_KVCACHE_SPACE overrules this.
CPU = {"enforce_eager": True, "enable_chunked_prefill": False, "kv_cache_memory_bytes": 4 << 30}

WATCH_S = 0.1  # between two looks at whether vLLM's process still runs

# vLLM raises temperatures below it, with a line in its log alone; and its seed -1 is no seed.
LEAST_TEMPERATURE = 0.01
SEED_OF_MINUS_ONE = 2**63 - 1

log = logging.getLogger(__name__)


def engine_arguments(
    folder: Path,
    *,
    dtype: DtypeName = "auto",
    max_batch: int = 32,
    speculate: bool = False,
    tensor_parallel: int = 1,
    gpu_memory_utilization: float | None = None,
) -> dict[str, Any]:
    """What vLLM is told of a model, whichever of its interfaces runs it."""
    # The GPU's way lets vLLM work out the next step while this one runs.
    method = "ngram_gpu" if torch.cuda.is_available() else "ngram"
    return {
        "model": str(folder),
        "dtype": _dtype(dtype),
        "max_num_seqs": max_batch,
        "scheduling_policy": "priority",  # which is the turn of each request
        "max_model_len": read_config(folder).max_position_embeddings,
        "structured_outputs_config": StructuredOutputsConfig(backend="guidance"),
        "speculative_config": {"method": method, **NGRAM} if speculate else None,
        "tensor_parallel_size": tensor_parallel,
        "disable_log_stats": True,
        **({"gpu_memory_utilization": gpu_memory_utilization} if gpu_memory_utilization else {}),
        **({} if torch.cuda.is_available() else CPU),
    }


class VllmEngine:
    """vLLM over a folder that the merge stage wrote, in any of its formats that vLLM can run."""

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: DtypeName = "auto",
        max_batch: int = 32,
        adapters: AdapterFolders | None = None,
        speculate: bool = False,
        tensor_parallel: int = 1,
        gpu_memory_utilization: float | None = None,
        on_fatal: Callable[[], object] | None = None,
    ) -> None:
        """Load the model. ModelError if vLLM cannot run this folder."""
        folder = native_folder(folder)
        self._config = read_config(folder)
        _check_split(self._config, read_json(folder / "config.json").get("quantization_config"), tensor_parallel)
        self._tokenizer = load_tokenizer(folder)
        self._guides = GuideCompiler(self._tokenizer)
        self._pacing = Pacing()
        self._stats = _Stats(self._pacing)
        self._loaded: dict[tuple[Path, int], _Adapter] = {}
        self._numbers = itertools.count(1)
        self._loading = asyncio.Lock()
        self._converted = tempfile.TemporaryDirectory(prefix="adapters-")
        self._turns = FairTurns()
        self._speculate = speculate
        self.adapters = adapters or AdapterFolders()
        self.context_length: int = self._config.max_position_embeddings
        self.max_batch = max_batch
        arguments = engine_arguments(
            folder,
            dtype=dtype,
            max_batch=max_batch,
            speculate=speculate,
            tensor_parallel=tensor_parallel,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        arguments |= self._lora_arguments()
        try:
            self._llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**arguments),
                # Prompts are read in steps of a server's size: 8,192 tokens on an H100, where others get 2,048.
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=[lambda *_: self._stats],
            )
        except Exception as error:
            raise ModelError(f"{folder}: vLLM cannot run it ({_line(error)}); engine=transformers can") from error
        self._closed = threading.Event()
        watch = threading.Thread(target=self._watch, args=(on_fatal,), name="vllm-watch", daemon=True)
        watch.start()

    @property
    def healthy(self) -> bool:
        """Whether the process that owns the model runs."""
        return not self._llm.errored

    @property
    def load(self) -> Load:
        """What it has to do; see `Engine.load`."""
        return self._stats.load(self._llm.get_num_queued_tokens())

    async def prepare(self, sampling: Sampling) -> None:
        """Load the adapter, compile the guide; see `Engine.prepare`."""
        await self._prepared(sampling)

    def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """Yield pieces of the answer; see `Engine.generate`."""
        if self._llm.errored:
            raise EngineDied("the engine died")
        check_request(prompt_ids, sampling, self._config.vocab_size, self.context_length)
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise RequestError(f"vLLM draws at a temperature of {LEAST_TEMPERATURE} or more; send 0 for the likeliest")
        if self._speculate and sampling.logit_bias:
            raise RequestError("logit_bias cannot be kept with speculate=true, which this server was started with")
        if sampling.drawn and (sampling.guide or sampling.presence_penalty or sampling.frequency_penalty):
            raise RequestError("vLLM cannot go on with an answer under a guide or penalties: it takes it for a prompt")
        return self._stream([*prompt_ids, *sampling.drawn], sampling)

    def close(self) -> None:
        """End vLLM's process; requests under way get EngineDied."""
        self._closed.set()
        self._llm.shutdown(timeout=0)
        self._converted.cleanup()

    async def _stream(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        adapter = await self._prepared(sampling) or _Adapter(None)
        adapter.users += 1
        text = TextStream(self._tokenizer, sampling.stop)
        text.push(sampling.drawn)
        unused = len(prompt_ids) + sampling.max_tokens
        turn, key = self._turns.take(sampling.client, unused), uuid.uuid4().hex
        try:
            outputs = self._llm.generate(
                tokens_input(prompt_ids),
                _params(sampling, self._tokenizer.stop_ids),
                key,
                lora_request=adapter.request,
                priority=turn,
            )
            async with aclosing(outputs):  # which aborts the request
                with self._pacing.stream(key):
                    async for output in outputs:
                        self._turns.begin(turn)
                        delta = self._delta(output.outputs[0], text, sampling.logprobs or 0)
                        unused = min(unused, sampling.max_tokens) - len(delta.token_ids)
                        yield delta
                        if delta.finish_reason:
                            return
                        await self._pacing.pause(key)  # vLLM joins what comes meanwhile
        except VLLMClientError as error:
            raise RequestError(_line(error)) from error
        except EngineDeadError as error:
            raise EngineDied("the engine died") from error
        except EngineGenerateError as error:
            raise EngineError(f"this request failed: {_line(error.__cause__ or error)}") from error
        finally:
            adapter.users -= 1
            self._turns.give_back(sampling.client, unused)

    def _watch(self, on_fatal: Callable[[], object] | None) -> None:
        """Tell of the death of vLLM's process, also when nobody asks it anything."""
        while not self._closed.wait(WATCH_S):
            if self._llm.errored:
                log.critical("vLLM's process died; this one should end")
                if on_fatal is not None:
                    on_fatal()
                return

    def _delta(self, output: CompletionOutput, text: TextStream, num_top: int) -> Delta:
        """The piece of the answer that these tokens make, up to a stop token or text among them."""
        if output.finish_reason in ("abort", "error"):
            raise EngineError("vLLM ended this request")
        tokens = tuple(output.token_ids)
        ended = bool(tokens) and tokens[-1] in self._tokenizer.stop_ids  # behind which vLLM writes nothing
        piece, used = text.push_until_stopped(tokens[:-1] if ended else tokens)
        if text.stopped:
            tokens = tokens[:used]
        if ended or output.finish_reason:
            piece += text.finish()
        reason: FinishReason | None = "length" if output.finish_reason else None
        logprobs = tuple(
            _logprob(token, found, num_top) for token, found in zip(tokens, output.logprobs or (), strict=False)
        )
        return Delta(piece, tokens, "stop" if ended or text.stopped else reason, logprobs)

    def _lora_arguments(self) -> dict[str, Any]:
        if not self.adapters:
            return {}
        ranks = [_rank(read_json(self.adapters.find(name) / "adapter_config.json")) for name in self.adapters.names()]
        largest = max([64 * self.adapters.may_grow, *ranks])
        self._max_rank = next((rank for rank in LORA_RANKS if rank >= largest), LORA_RANKS[-1])
        at_once = 2 * LEAST_LORAS if self.adapters.may_grow else min(max(LEAST_LORAS, len(ranks)), MOST_LORAS)
        return {"enable_lora": True, "max_lora_rank": self._max_rank, "max_loras": at_once, "max_cpu_loras": 32}

    async def _prepared(self, sampling: Sampling) -> "_Adapter | None":
        """The adapter, loaded, if the sampling names one; its guide is known to be one that can be followed."""
        if sampling.guide:
            await asyncio.to_thread(self._guides.matcher, sampling.guide)
        if not sampling.adapter:
            return None
        folder = self.adapters.find(sampling.adapter)
        async with self._loading:
            version = (folder, written_at(folder))
            if version not in self._loaded:
                self._loaded[version] = await self._load(folder, sampling.adapter)
            await self._drop_older(version)
            return self._loaded[version]

    async def _load(self, folder: Path, name: str) -> "_Adapter":
        copy = tempfile.mkdtemp(dir=self._converted.name)
        number = next(self._numbers)
        # vLLM takes two requests of one name for one adapter, and two versions may answer at the same time.
        request = LoRARequest(f"{name}-{number}", number, copy)
        try:
            await asyncio.to_thread(self._write_native, folder, Path(copy))
            await self._llm.add_lora(request)
        except BaseException as error:  # a client may go away meanwhile
            shutil.rmtree(copy)
            if isinstance(error, EngineDeadError):
                raise EngineDied("the engine died") from error
            if isinstance(error, Exception):
                raise UnusableAdapter(f"adapter {name!r} cannot be used: {_line(error)}") from error
            raise
        return _Adapter(request)

    async def _drop_older(self, version: tuple[Path, int]) -> None:
        """Forget what the adapter was before its files changed, unless an answer is still written with it."""
        older = [key for key in self._loaded if key[0] == version[0] and key != version]
        for key in older:
            if not self._loaded[key].users and (request := self._loaded.pop(key).request):
                await self._llm.remove_lora(request.lora_int_id)
                shutil.rmtree(request.lora_path)

    def _write_native(self, folder: Path, copy: Path) -> None:
        """A copy of an adapter under the native model's names, which old ones do not have."""
        config, tensors = native_adapter(folder, self._config)
        if (rank := _rank(vars(config))) > self._max_rank:
            raise ModelError(
                f"its rank is {rank}, and vLLM was started for {self._max_rank} at most; start the server again, which "
                f"then finds this adapter"
            )
        config.save_pretrained(str(copy))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copy / "adapter_model.safetensors")


@dataclass
class _Adapter:
    """An adapter as it was written at one time, and the answers that are being written with it."""

    request: LoRARequest | None
    users: int = 0


class _Stats(StatLoggerBase):  # type: ignore[misc]  # vLLM is not there where types are checked
    """What vLLM tells of its last step, and of requests that end with it."""

    def __init__(self, pacing: Pacing) -> None:
        self._pacing = pacing
        self._running = self._waiting = self._hits = self._queries = 0
        self._cache_use = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        for request in iteration_stats.finished_requests if iteration_stats else ():
            self._pacing.end(request.request_id)
        if scheduler_stats is None:
            return
        self._running = scheduler_stats.num_running_reqs
        self._waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        self._cache_use = scheduler_stats.kv_cache_usage
        self._hits += scheduler_stats.prefix_cache_stats.hits
        self._queries += scheduler_stats.prefix_cache_stats.queries

    def log_engine_initialized(self) -> None:
        pass

    def load(self, waiting_tokens: int) -> Load:
        return Load(self._running, self._waiting, waiting_tokens, self._cache_use, self._hits, self._queries)


def _check_split(config: GlmConfig, quantization: dict[str, Any] | None, ways: int) -> None:
    """ModelError if the heads, or quantised weights, cannot be shared out so many ways."""
    heads = config.num_attention_heads
    if heads % ways:
        raise ModelError(f"tensor_parallel {ways}: the model's {heads} heads cannot be shared out so many ways")
    if ways == 1 or not quantization:
        return
    groups = [scheme["weights"].get("group_size") for scheme in quantization.get("config_groups", {}).values()]
    if quantization["quant_method"] == "bitsandbytes" or any(
        size and config.intermediate_size % (ways * size) for size in groups
    ):
        raise ModelError(
            f"tensor_parallel {ways}: this format's weights cannot be shared out so many ways; merge with --format "
            f"bf16 or fp8, or leave tensor_parallel out"
        )


def _dtype(dtype: DtypeName) -> str:
    if dtype != "auto":
        return dtype
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if current_platform.has_device_capability(80) else "float16"  # Turing has no bfloat16


def _params(sampling: Sampling, stop_ids: tuple[int, ...]) -> SamplingParams:
    guide = sampling.guide
    return SamplingParams(
        max_tokens=sampling.max_tokens - len(sampling.drawn),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=SEED_OF_MINUS_ONE if sampling.seed == -1 else sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        logprobs=sampling.logprobs,
        structured_outputs=StructuredOutputsParams(grammar=guide.lark()) if guide else None,
        stop_token_ids=list(stop_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _logprob(token: int, found: dict[int, Any], num_top: int) -> TokenLogprob:
    # vLLM gives the drawn token too where it is not among the most probable ones.
    best = sorted(found.items(), key=lambda item: item[1].rank)[:num_top]
    return TokenLogprob(token, found[token].logprob, tuple((other, value.logprob) for other, value in best))


def _rank(config: dict[str, Any]) -> int:
    """The largest rank of an adapter with this adapter_config.json."""
    ranks: dict[str, int] = config.get("rank_pattern") or {}
    rank: int = config.get("r", 8)
    return max(rank, *ranks.values(), 0)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
