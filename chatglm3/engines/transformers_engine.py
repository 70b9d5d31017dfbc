"""The embedded engine: continuous batching over a transformers model, in a thread that owns it.

Every pass moves each running request one token on; requests join and leave between passes. A request's state is its
ids and how many of them are in the cache. All but the last id of a prompt are read beforehand, in chunks, so that a
long prompt does not hold up the others; what is then left, one id, is what a request that is answering has left too.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from random import Random

import torch
from llguidance import LLMatcher
from transformers import GlmForCausalLM

from chatglm3.checkpoint import load_model
from chatglm3.engines import (
    AdapterFolders,
    Delta,
    DtypeName,
    EngineDied,
    EngineError,
    FinishReason,
    Load,
    RequestError,
    Sampling,
    TokenLogprob,
    UnknownAdapter,
)
from chatglm3.engines.decode_graphs import Capture, DecodeGraphs, cuda_captures
from chatglm3.engines.fair_turns import FairTurns
from chatglm3.engines.guide import GuideCompiler, raise_if_stuck
from chatglm3.engines.request_check import check_request
from chatglm3.engines.row_adapters import Adapter, RowAdapters
from chatglm3.engines.sampling import next_tokens, steered, token_logprobs
from chatglm3.engines.slot_cache import ATTENTION, SlotCache, position_bytes
from chatglm3.stream import TextStream
from chatglm3.tokenizer import ChatGlmTokenizer, load_tokenizer

PROMPT_CHUNK = 512  # prompt tokens read between two passes of the running requests
CACHE_BYTES = 8 * 2**30  # of keys and values at full length: 36 rows of ChatGLM3-6B's 8,192 positions
CACHE_SHARE = 0.7  # of the GPU's memory that the model leaves; activations have the rest

Failure = EngineError | RequestError

log = logging.getLogger(__name__)


def load(
    folder: str | Path,
    *,
    dtype: DtypeName,
    max_batch: int,
    adapters: AdapterFolders | None,
    on_fatal: Callable[[], object] | None,
) -> "TransformersEngine":
    """The engine over the model and tokenizer in `folder`, on the first GPU if there is one."""
    on_gpu = torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    model = load_model(folder, dtype=getattr(torch, dtype), device_map="cuda:0" if on_gpu else "cpu")
    log.info("transformers engine: %s on %s in %s", folder, model.device, dtype)
    return TransformersEngine(
        model,
        load_tokenizer(folder),
        max_batch=max_batch,
        adapters=adapters,
        on_fatal=on_fatal,
        captures=_captures(model),
    )


@dataclass(eq=False)
class _Request:
    """One prompt on its way. `cached` of its `ids` (prompt, then answer) have keys and values in the cache."""

    ids: list[int]
    sampling: Sampling
    text: TextStream
    random: Random
    matcher: LLMatcher | None
    """Where its guide stands, if it has one."""
    adapter: Adapter | None
    loop: asyncio.AbstractEventLoop
    deltas: asyncio.Queue[Delta | Failure] = field(default_factory=asyncio.Queue)
    answer: list[int] = field(default_factory=list)
    cached: int = 0
    turn: int = 0
    """Among those that wait; see FairTurns."""
    unused: int = 0
    """Tokens that its client was charged for, and that were neither read nor written yet."""
    ended: bool = False
    """Answered, failed, or given up by the client: its row is free at the next pass."""

    def go_on_after(self, drawn: Sequence[int]) -> None:
        """Come to the state of an answer of which these tokens were drawn and sent elsewhere."""
        self.ids += drawn
        self.answer += drawn
        self.text.push(drawn)
        for token in drawn:
            if self.sampling.temperature > 0:
                self.random.random()
            if self.matcher:
                self.matcher.consume_token(token)

    def send(self, item: Delta | Failure) -> None:
        """Hand an item to the client's event loop; a client without a running loop has given up."""
        try:
            self.loop.call_soon_threadsafe(self.deltas.put_nowait, item)
        except RuntimeError:
            self.ended = True


class TransformersEngine:
    """Continuous batching over one model, which nobody else may run from now on."""

    def __init__(
        self,
        model: GlmForCausalLM,
        tokenizer: ChatGlmTokenizer,
        *,
        max_batch: int = 32,
        adapters: AdapterFolders | None = None,
        on_fatal: Callable[[], object] | None = None,
        captures: Callable[[], Capture] | None = None,
    ) -> None:
        """`captures` makes graphs of the passes that move rows without adapters one token on."""
        model.set_attn_implementation(ATTENTION)
        config = model.config
        self.context_length: int = config.max_position_embeddings
        self.adapters = adapters or AdapterFolders()
        self._row_adapters = RowAdapters(model, self.adapters) if self.adapters else None
        self.running: list[_Request] = []
        """Row r of the cache belongs to running[r]."""
        self._model = model
        self._tokenizer = tokenizer
        self._guides = GuideCompiler(tokenizer)
        row_bytes = position_bytes(model) * self.context_length
        self.max_batch = max(1, min(max_batch, _cache_bytes(model.device) // row_bytes))
        self._cache = SlotCache(config.num_hidden_layers, self.max_batch, self.context_length)
        self._graphs = DecodeGraphs(self._pass, self._cache, model.device, captures) if captures else None
        self._arrivals: SimpleQueue[_Request | None] = SimpleQueue()
        self._waiting: list[_Request] = []
        self._turns = FairTurns()
        self._reading: deque[_Request] = deque()
        """Running requests whose prompts are not read yet; the first has the next turn."""
        self._death: str | None = None
        self._on_fatal = on_fatal
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread that owns the model runs."""
        return self._death is None

    @property
    def load(self) -> Load:
        """What it has to do; see `Engine.load`."""
        running, waiting = list(self.running), [*self._waiting]
        cached = sum(request.cached for request in running)
        return Load(
            running=len(running),
            waiting=len(waiting) + self._arrivals.qsize(),
            waiting_tokens=sum(len(request.ids) - request.cached for request in (*running, *waiting)),
            cache_use=cached / (self.max_batch * self.context_length),
        )

    async def prepare(self, sampling: Sampling) -> None:
        """Load the adapter, compile the guide; see `Engine.prepare`."""
        await self._prepared(sampling)

    def generate(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        """Yield pieces of the answer; see `Engine.generate`."""
        self._raise_if_dead()
        check_request(prompt_ids, sampling, self._model.config.vocab_size, self.context_length)
        return self._stream(list(prompt_ids), sampling)

    def close(self) -> None:
        """End the thread; requests under way get EngineDied."""
        self._arrivals.put(None)
        self._thread.join()

    async def _stream(self, ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        matcher, adapter = await self._prepared(sampling)
        # Of a negative number Python takes the absolute value, which is another choice's seed.
        random = Random(None if sampling.seed is None else sampling.seed % 2**64)
        text = TextStream(self._tokenizer, sampling.stop)
        request = _Request(ids, sampling, text, random, matcher, adapter, asyncio.get_running_loop())
        request.go_on_after(sampling.drawn)
        self._arrivals.put(request)
        try:
            self._raise_if_dead()  # after the put: the dying thread may have emptied the queue just before it
            while True:
                item = await request.deltas.get()
                if isinstance(item, Failure):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            request.ended = True

    async def _prepared(self, sampling: Sampling) -> tuple[LLMatcher | None, Adapter | None]:
        guide, name = sampling.guide, sampling.adapter
        matcher = await asyncio.to_thread(self._guides.matcher, guide) if guide else None
        if not name:
            return matcher, None
        if self._row_adapters is None:
            raise UnknownAdapter(f"there is no adapter {name!r}: the engine was started without any")
        return matcher, await self._row_adapters.find(name)

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDied(self._death)

    # From here on everything runs in the engine's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._take_arrivals():
                self._retire()
                self._admit()
                if self.running:
                    self._read_prompts()
                    self._advance()
            self._die("the engine was closed")
        except BaseException as error:
            log.critical("the engine died; its process should end", exc_info=True)
            self._die(f"the engine died: {type(error).__name__}: {error}")
            if self._on_fatal is not None:
                self._on_fatal()

    def _take_arrivals(self) -> bool:
        """Queue new requests, waiting for one if there is nothing to do; False when the engine is to close."""
        while not self._arrivals.empty() or not (self.running or self._waiting):
            request = self._arrivals.get()
            if request is None:
                return False
            request.unused = len(request.ids) + request.sampling.max_tokens
            request.turn = self._turns.take(request.sampling.client, request.unused)
            self._waiting.append(request)
        return True

    def _retire(self) -> None:
        """Free the rows of ended requests; the last row moves into each gap, so that rows stay without gaps."""
        for request in [request for request in (*self.running, *self._waiting) if request.ended]:
            self._turns.give_back(request.sampling.client, request.unused)
        self._waiting = [request for request in self._waiting if not request.ended]
        for row in reversed(range(len(self.running))):
            if self.running[row].ended:
                last = self.running.pop()
                if row < len(self.running):
                    self._cache.move(len(self.running), row)
                    self.running[row] = last

    def _admit(self) -> None:
        """Give free rows to waiting requests."""
        while self._waiting and len(self.running) < self.max_batch:
            request = min(self._waiting, key=lambda waiting: waiting.turn)  # of equal turns the first that came
            self._waiting.remove(request)
            self._turns.begin(request.turn)
            self._cache.erase(len(self.running))
            self.running.append(request)
            self._reading.append(request)

    def _read_prompts(self) -> None:
        """Read at most PROMPT_CHUNK prompt ids, all but each prompt's last id.

        Requests take turns, and one that did not come to its end goes behind the others: a long prompt delays a
        short one by one chunk. Whole chunks in turn, rather than a share for each, keep the passes large.
        """
        budget = PROMPT_CHUNK
        while budget and self._reading:
            request = self._reading.popleft()
            chunk = request.ids[request.cached : min(len(request.ids) - 1, request.cached + budget)]
            if not chunk or request.ended:
                continue
            self._forward(self.running.index(request), [chunk], [request.cached])
            request.cached += len(chunk)
            request.unused -= len(chunk)
            budget -= len(chunk)
            self._reading.append(request)

    def _advance(self) -> None:
        """Read one id of every request; those that have read all of theirs draw the next token."""
        states = self._one_token_on([r.ids[r.cached] for r in self.running], [r.cached for r in self.running])
        for request in self.running:
            request.cached += 1
            request.unused -= 1
        rows = [row for row, request in enumerate(self.running) if request.cached == len(request.ids)]
        if not rows:
            return
        ready = [self.running[row] for row in rows]
        samplings = [request.sampling for request in ready]
        # A GPU still computes the states meanwhile.
        allowed = [request.matcher.compute_bitmask() if request.matcher else None for request in ready]
        logits = self._model.lm_head(states[rows, -1])
        scores = steered(logits, samplings, [request.answer for request in ready], allowed)
        tokens = next_tokens(scores, samplings, [request.random for request in ready])
        logprobs = token_logprobs(logits, tokens, samplings)
        for request, token, its_logprobs in zip(ready, tokens, logprobs, strict=True):
            self._answer(request, token, its_logprobs)

    def _one_token_on(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Run an id of every row: their final states [B, 1, hidden]."""
        if self._graphs is None or any(request.adapter for request in self.running):
            return self._forward(0, [[token] for token in ids], positions)
        if self._row_adapters is not None:
            self._row_adapters.aim([])
        return self._graphs.states(ids, positions)

    def _forward(self, first_row: int, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """Run ids [B, T] of rows first_row.. at positions starts[b]..: their final states [B, T, hidden]."""
        device = self._model.device
        width = len(ids[0])
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        if self._row_adapters is not None:
            self._row_adapters.aim([request.adapter for request in self.running[first_row : first_row + len(ids)]])
        return self._pass(torch.tensor(ids, device=device), positions, max(starts) + width, first_row)

    def _pass(self, ids: torch.Tensor, positions: torch.Tensor, length: int, first_row: int = 0) -> torch.Tensor:
        """Run ids [B, T] of rows first_row.., which see the first `length` positions: their states [B, T, hidden]."""
        self._cache.aim(first_row, positions, length)
        # [B, 1, T, length]: a position sees itself and those before it.
        visible = torch.arange(length, device=ids.device) <= positions[:, None, :, None]
        outputs = self._model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=visible,
            past_key_values=self._cache,
            use_cache=True,
        )
        states: torch.Tensor = outputs.last_hidden_state
        return states

    def _answer(self, request: _Request, token: int | None, logprobs: tuple[TokenLogprob, ...]) -> None:
        """Send the piece of the answer that `token` makes; what goes wrong here fails this request alone."""
        try:
            text, finish_reason = self._grown(request, token)
        except RequestError as error:
            request.send(error)
            request.ended = True
        except Exception as error:
            log.exception("a request failed")
            request.send(EngineError(f"this request failed: {type(error).__name__}: {error}"))
            request.ended = True
        else:
            request.ended = request.ended or finish_reason is not None
            request.send(Delta(text, tuple(request.answer[-1:]), finish_reason, logprobs))

    def _grown(self, request: _Request, token: int | None) -> tuple[str, FinishReason | None]:
        """Put `token` after the answer: what becomes readable, and whether that is all."""
        guide, matcher = request.sampling.guide, request.matcher
        if guide and matcher:
            raise_if_stuck(matcher, guide)
        if token is None:
            raise ArithmeticError("the model's scores are not finite numbers")
        request.ids.append(token)
        request.answer.append(token)
        if token in self._tokenizer.stop_ids:
            return request.text.finish(), "stop"
        text = request.text.push([token])
        is_complete = request.text.stopped
        if guide and matcher:
            matcher.consume_token(token)
            raise_if_stuck(matcher, guide)
            is_complete = is_complete or matcher.is_stopped()
        if is_complete:
            return text + request.text.finish(), "stop"
        if len(request.answer) == request.sampling.max_tokens:
            text += request.text.finish()
            return text, "stop" if request.text.stopped else "length"
        return text, None

    def _die(self, reason: str) -> None:
        """Refuse new requests and fail those under way."""
        self._death = reason
        requests = [*self.running, *self._waiting]
        while not self._arrivals.empty():
            request = self._arrivals.get()
            requests += [request] if request else []
        self.running.clear()
        for request in requests:
            request.send(EngineDied(reason))


def _captures(model: GlmForCausalLM) -> Callable[[], Capture] | None:
    # bitsandbytes' int8 asks the GPU which columns hold outliers, and a graph cannot wait for an answer.
    waits = getattr(model, "is_loaded_in_8bit", False)
    return cuda_captures if model.device.type == "cuda" and not waits else None


def _cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(CACHE_BYTES, int(CACHE_SHARE * free))
