"""What stands before the API: who may ask, how much, and what is taken down of it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from starlette.middleware.cors import CORSMiddleware

from chatglm3.engines import Engine
from serve_app import playground
from serve_app.audit import open_audit_log
from serve_app.errors import Failures
from serve_app.guard import Guard
from serve_app.keys import KeyFile, Limits, read_keys
from serve_app.ledger import Ledger, LocalLedger
from serve_app.metrics import Metrics
from serve_app.observation import Observation
from serve_app.tracing import make_tracer

_ONE_OF_MANY = b"# One replica's numbers; the next scrape may reach another. Ray's metrics port of each node has all.\n"


EXPOSED = (
    "X-Request-Id",
    "Retry-After",
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
)
"""Headers of answers that pages of other sites may read."""


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class FrontArgs(BaseModel):
    """Arguments of the application that are about its clients."""

    api_keys: str = ""
    """File of API keys (`python -m serve_app keys add NAME --file F`); without it everybody who can connect may ask."""
    requests_per_minute: int = Field(0, ge=0)
    """Requests of each key that has no limit of its own in the file; 0 is no limit."""
    tokens_per_minute: int = Field(0, ge=0)
    """Tokens, read and written, of each key that has no limit of its own; 0 is no limit."""
    answers_at_once: int = Field(0, ge=0)
    """Answers of each key without a limit of its own that are written at a time in one replica; 0 is no limit. With
    half of max_batch, nobody's long answers keep others from theirs."""
    max_inflight: int = Field(0, ge=0)
    """Most requests in this process; beyond it 503 at once. 0 leaves it to the deployment's max_ongoing_requests."""
    max_body_bytes: int = Field(2**20, ge=1)
    """Longest body of a request."""
    max_prompt_tokens: int | None = Field(None, ge=64)
    """Longest prompt in tokens; what the model's context leaves unless given."""
    request_timeout_s: float = Field(600, ge=0)
    """Seconds after which a request is ended; 0 is never."""
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Other sites whose pages may ask from a browser, as https://host with commas between them."""
    audit_log: str = ""
    """File that gets a line of JSON a request, without contents."""
    metrics: Literal["key", "open", "off"] = "key"
    """Who may read /metrics: those with a key (everybody, where there are no keys), everybody, or nobody."""
    playground: bool = True
    """Whether / is a page to try the model on."""

    @model_validator(mode="after")
    def _limits_have_keys(self) -> "FrontArgs":
        given = [name for name in vars(Limits()) if getattr(self, name)]
        if given and not self.api_keys:
            raise ValueError(f"{given[0]} is a limit of each key: give api_keys too, or leave it out")
        return self


def install(
    api: FastAPI,
    args: FrontArgs,
    engine: Engine,
    metrics: Metrics,
    *,
    ledger: Ledger | None = None,
    behind_serve: bool = False,
) -> None:
    """Put everything before `api`. `ledger` counts for all replicas; None counts in this process.

    StageError if a file that `args` names cannot be used.
    """
    open_paths = {"/", "/healthz", *(["/metrics"] if args.metrics == "open" else [])}
    limits = Limits(args.requests_per_minute, args.tokens_per_minute, args.answers_at_once)
    keys = KeyFile(args.api_keys, limits) if args.api_keys else None
    # The last one added is the outermost: a browser's preflight has no key, and everything is taken down.
    api.add_middleware(
        Guard,
        keys=keys,
        ledger=ledger or LocalLedger(),
        is_open=open_paths.__contains__,
        max_inflight=args.max_inflight,
        timeout_s=args.request_timeout_s,
    )
    api.add_middleware(Failures)
    if args.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=args.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    audit = open_audit_log(args.audit_log) if args.audit_log else None
    api.add_middleware(Observation, metrics=metrics, audit=audit, tracer=make_tracer(), returns_id=not behind_serve)
    if args.playground:
        playground.add_route(api)
    if args.metrics != "off":
        _add_metrics_route(api, engine, metrics, _ONE_OF_MANY if behind_serve else b"")


def check_files(args: FrontArgs) -> dict[str, str]:
    """Absolute paths of the files that `args` names. StageError if one cannot be used: said once, before replicas
    start."""
    if args.api_keys:
        read_keys(Path(args.api_keys), Limits())
    if args.audit_log:
        open_audit_log(args.audit_log)
    return {name: str(Path(path).absolute()) for name in ("api_keys", "audit_log") if (path := getattr(args, name))}


def _add_metrics_route(api: FastAPI, engine: Engine, metrics: Metrics, head: bytes) -> None:
    @api.get("/metrics", response_class=Response, include_in_schema=False)
    async def scrape() -> Response:
        """What this process measured, for Prometheus."""
        metrics.sample(engine.load)
        return Response(head + metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
