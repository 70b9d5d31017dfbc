"""Long requests are worked on in a thread, short ones at once."""

import asyncio
import threading

import pytest
from fastapi import Request

from serve_app.off_loop import SHORT_BODY, off_loop


@pytest.mark.parametrize(
    ("headers", "in_thread"),
    [
        ([(b"content-length", str(SHORT_BODY).encode())], False),
        ([(b"content-length", str(SHORT_BODY + 1).encode())], True),
        ([(b"transfer-encoding", b"chunked")], True),
    ],
)
def test_a_body_that_is_long_or_of_unknown_length_is_worked_on_in_a_thread(
    headers: list[tuple[bytes, bytes]], in_thread: bool
) -> None:
    request = Request({"type": "http", "headers": headers})
    worked_in = asyncio.run(off_loop(request, threading.current_thread))
    assert (worked_in is not threading.current_thread()) == in_thread
