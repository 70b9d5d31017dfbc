"""The API against its own /openapi.json: schemathesis makes requests up, and no answer is a 5xx or not as written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from chatglm3 import load_model, load_tokenizer
from chatglm3.engines.transformers_engine import TransformersEngine
from serve_app import front
from serve_app.front import FrontArgs
from serve_app.keys import Limits, add_key
from serve_app.metrics import Metrics
from serve_app.routes import make_api
from tests.clockwork import Clockwork

# Refused though the specification allows it: too long a prompt, a model that is not there, a guide that llguidance
# cannot follow. No specification says which.
EXCLUDED = [positive_data_acceptance]
ROUTES = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/answer",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /healthz",
]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(load_model(tiny, dtype=torch.float32), load_tokenizer(tiny))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def specification(engine: TransformersEngine, tiny: Path) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", make_api(engine, load_tokenizer(tiny), "tiny", "chat"))


def answerable(body: Any) -> Any:
    """The request to the model that is there, and for few tokens: made-up names are all answered alike."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body = body | {"model": "tiny", "n": body.get("n") and 2}
        body |= {name: 1 + body[name] % 8 for name in ("max_tokens",) if type(body.get(name)) is int and body[name] > 8}
    return body


VALID = [(route, GenerationMode.POSITIVE) for route in ROUTES]
INVALID = [(route, GenerationMode.NEGATIVE) for route in ROUTES if route.startswith("POST")]


@pytest.mark.parametrize(("route", "mode"), [*VALID, *INVALID], ids=lambda value: getattr(value, "value", value))
def test_answers_are_what_the_specification_says(specification, engine, route, mode):
    method, path = route.split()
    operation = specification[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=80, suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = answerable(case.body)
        case.call_and_validate(excluded_checks=EXCLUDED)

    check()
    assert engine.healthy


@pytest.mark.parametrize("route", ROUTES)
def test_with_a_key_answers_are_as_written_and_without_one_all_but_the_open_paths_are_401(tmp_path, route):
    key = add_key(tmp_path / "keys", "a", Limits())
    engine, measured = Clockwork("你好"), Metrics("tiny")
    api = make_api(engine, load_tokenizer("tiny"), "tiny", "chat")
    front.install(api, FrontArgs(api_keys=str(tmp_path / "keys"), request_timeout_s=5), engine, measured)
    with_key = {"Authorization": f"Bearer {key}"}
    method, path = route.split()
    operation = schemathesis.openapi.from_asgi("/openapi.json", api, headers=with_key)[path][method]

    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    @settings(max_examples=10, suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        case.body = answerable(case.body)
        asked = len(engine.asked)
        refused = case.call()
        assert refused.status_code == (200 if path == "/healthz" else 401)
        assert len(engine.asked) == asked
        case.call_and_validate(headers=with_key, excluded_checks=EXCLUDED)

    check()


def test_every_route_is_asked(specification):
    operations = [result.ok() for result in specification.get_all_operations()]
    assert {f"{operation.method.upper()} {operation.path}" for operation in operations} == set(ROUTES)


def test_every_field_of_a_request_is_described(specification):
    schemas = specification.raw_schema["components"]["schemas"]
    requests = {
        name: schema for name, schema in schemas.items() if schema.get("additionalProperties") == {"type": "null"}
    }
    assert len(requests) > 15
    for name, schema in requests.items():
        for field, what in schema["properties"].items():
            assert "description" in what or "$ref" in str(what), f"{name}.{field}"
