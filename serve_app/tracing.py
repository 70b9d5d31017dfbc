"""OpenTelemetry traces: a span a request, within the trace of who asked. Off unless a collector is named."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from serve_app.request_record import RequestRecord

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def make_tracer() -> Tracer | None:
    """What sends spans to the collector that the environment names, by OpenTelemetry's own variables; None without."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        log.warning("no traces are sent: pip install opentelemetry-exporter-otlp-proto-http, or unset %s", ENDPOINTS[1])
        return None
    provider = TracerProvider(
        resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "chatglm3")})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("serve_app")


@contextmanager
def request_span(tracer: Tracer | None, scope: Scope) -> Iterator[Span | None]:
    """A span of the request, child of the one that its traceparent header names."""
    if tracer is None:
        yield None
        return
    parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
    with tracer.start_as_current_span(scope["method"], context=parent, kind=SpanKind.SERVER) as span:
        yield span


def describe(span: Span | None, scope: Scope, status: int, record: RequestRecord) -> None:
    """Put what is known at the end on the span, by OpenTelemetry's names for HTTP and for generative models."""
    if span is None:
        return
    route = getattr(scope.get("route"), "path", None)
    if route:
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
    span.set_attributes(
        {"http.request.method": scope["method"], "http.response.status_code": status, "request.id": record.id}
    )
    if record.model:
        span.set_attributes(
            {
                "gen_ai.request.model": record.model,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "gen_ai.response.finish_reasons": [record.finish_reason],
            }
        )
    if record.first_token_s is not None:
        span.set_attribute("gen_ai.server.time_to_first_token", record.first_token_s)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))
