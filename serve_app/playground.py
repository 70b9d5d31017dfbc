"""GET /: a page to try the model on."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse

PAGE = Path(__file__).with_name("playground.html")


def add_route(api: FastAPI) -> None:
    """Give `api` the page."""
    page = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> Response:
        """The page."""
        return HTMLResponse(page, headers=headers)


def content_security_policy(page: str) -> str:
    """The page's own style and script, requests to this server, and nothing else."""
    style, script = (
        _hash(re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1])  # type: ignore[index]
        for tag in ("style", "script")
    )
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
