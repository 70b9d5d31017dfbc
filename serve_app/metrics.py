"""What is measured while serving, under the names that vLLM gave such things, for Prometheus."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from chatglm3.engines import Load
from serve_app.answer_schema import AnswerBody

# vLLM's, so that its dashboards' quantiles are as fine here.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)


@dataclass(frozen=True)
class Instrument:
    """One thing that is measured."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    """Counters' names end in _total when they are exported."""
    text: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()


FIRST_TOKEN = Instrument(
    "histogram", "time_to_first_token_seconds", "From handing a prompt to the engine to its first token.",
    buckets=_FIRST_TOKEN,
)  # fmt: skip
BETWEEN_TOKENS = Instrument(
    "histogram",
    "inter_token_latency_seconds",
    "Between tokens of an answer; once for tokens that came together.",
    buckets=_BETWEEN_TOKENS,
)
REQUEST = Instrument(
    "histogram", "e2e_request_latency_seconds", "From handing a prompt to the engine to the last token.",
    buckets=_REQUEST,
)  # fmt: skip
PROMPT_TOKENS = Instrument("counter", "prompt_tokens", "Tokens of prompts.")
GENERATION_TOKENS = Instrument("counter", "generation_tokens", "Tokens of answers.")
FINISHED = Instrument(
    "counter", "request_success",
    "Generations that ended, by how: stop, length, error, or abort (the client left).",
    ("model", "finished_reason"),
)  # fmt: skip
RUNNING = Instrument("gauge", "num_requests_running", "Requests that the engine answers now.")
WAITING = Instrument("gauge", "num_requests_waiting", "Requests that wait for a place in the engine.")
WAITING_TOKENS = Instrument("gauge", "num_prompt_tokens_waiting", "Prompt tokens that are still to be read.")
CACHE_USE = Instrument("gauge", "kv_cache_usage_perc", "Share of the key-value cache in use, 0 to 1.")
PREFIX_QUERIES = Instrument("counter", "prefix_cache_queries", "Prompt tokens looked for in the prefix cache.")
PREFIX_HITS = Instrument("counter", "prefix_cache_hits", "Prompt tokens found in the prefix cache.")
ANSWERS = Instrument(
    "counter", "document_answers", "Answers of /v1/answer, by outcome: cited, uncited or refused.", ("model", "outcome")
)
CITATIONS = Instrument(
    "counter", "document_citations", "Citations in them, by how their place was found: exact, near, answer or none.",
    ("model", "match"),
)  # fmt: skip
REJECTED = Instrument(
    "counter", "requests_rejected", "Requests that were turned away before the engine, by reason.", ("reason",)
)
HTTP_REQUESTS = Instrument("counter", "http_requests", "Requests by route and status.", ("route", "method", "status"))

INSTRUMENTS = tuple(value for value in globals().values() if isinstance(value, Instrument))
PREFIX = "chatglm3_"


class Sink(Protocol):
    """Where measurements go: a registry of this process, or Ray's agent on the node."""

    def record(self, instrument: Instrument, value: float, labels: dict[str, str]) -> None:
        """Add to a counter, set a gauge, observe in a histogram."""


class PrometheusSink:
    """A registry of this process, which the route /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._collectors: dict[str, Counter | Gauge | Histogram] = {}
        self._children: dict[tuple[str, ...], Counter | Gauge | Histogram] = {}  # finding one takes as long as counting
        for item in INSTRUMENTS:
            name = PREFIX + item.name
            if item.kind == "histogram":
                self._collectors[item.name] = Histogram(
                    name, item.text, item.labels, buckets=item.buckets, registry=self.registry
                )
            else:
                kind = Counter if item.kind == "counter" else Gauge
                self._collectors[item.name] = kind(name, item.text, item.labels, registry=self.registry)

    def record(self, instrument: Instrument, value: float, labels: dict[str, str]) -> None:
        """See `Sink.record`."""
        place = (instrument.name, *map(labels.__getitem__, instrument.labels))
        if place not in self._children:
            self._children[place] = self._collectors[instrument.name].labels(**labels)
        match self._children[place]:
            case Counter() as counter:
                counter.inc(value)
            case Gauge() as gauge:
                gauge.set(value)
            case Histogram() as histogram:
                histogram.observe(value)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class Metrics:
    """The measurements of one process."""

    def __init__(self, model: str, sinks: Iterable[Sink] = ()) -> None:
        """`model` is the served model's name; `sinks` get everything beside the process's own registry."""
        self.model = model
        self._prometheus = PrometheusSink()
        self._sinks: tuple[Sink, ...] = (self._prometheus, *sinks)
        self._prefix = (0, 0)

    def record(self, instrument: Instrument, value: float = 1, **labels: str) -> None:
        """Measure something."""
        for sink in self._sinks:
            sink.record(instrument, value, labels)

    def sample(self, load: Load) -> None:
        """Take down what the engine has to do now."""
        model = self.model
        self.record(RUNNING, load.running, model=model)
        self.record(WAITING, load.waiting, model=model)
        self.record(WAITING_TOKENS, load.waiting_tokens, model=model)
        self.record(CACHE_USE, load.cache_use, model=model)
        # Engines count since their start; one that began anew counts from 0.
        seen = self._prefix if load.prefix_queries >= self._prefix[0] else (0, 0)
        self.record(PREFIX_QUERIES, load.prefix_queries - seen[0], model=model)
        self.record(PREFIX_HITS, load.prefix_hits - seen[1], model=model)
        self._prefix = load.prefix_queries, load.prefix_hits

    def answered(self, body: AnswerBody) -> None:
        """Count an answer of /v1/answer."""
        outcome = "refused" if body.refused else "cited" if body.citations else "uncited"
        self.record(ANSWERS, model=body.model, outcome=outcome)
        for citation in body.citations:
            self.record(CITATIONS, model=body.model, match=citation.match or "none")

    def text(self) -> bytes:
        """Everything that this process measured, in Prometheus' text format."""
        return self._prometheus.text()
