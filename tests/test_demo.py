"""The demo's endpoint: asked on this machine directly, and explained where it does not start."""

import http.server
import threading
from pathlib import Path

import pytest

from cluster.errors import StageError
from pipelines import demo


def test_a_proxy_in_the_environment_is_not_asked_for_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with demo.direct.open(f"http://127.0.0.1:{server.server_port}/", timeout=10) as answer:
            assert answer.status == 200


def test_an_endpoint_that_ends_at_once_is_reported_with_its_exit_code_and_last_line(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("http_options: {port: none}\napplications: []\n")
    with (
        pytest.raises(StageError) as error,
        demo._endpoint(tmp_path / "serve.yaml", tmp_path / "serve.log", port=9),
    ):
        pass
    last = (tmp_path / "serve.log").read_text().splitlines()[-1].strip()
    assert "errors.pydantic.dev" in last
    assert str(error.value) == f"the endpoint ended with exit code 1; its log {tmp_path}/serve.log ends with: {last}"
