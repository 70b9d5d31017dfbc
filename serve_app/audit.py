"""The audit log: a line of JSON a request, without anything that was asked or answered."""

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any

from cluster.errors import StageError


def open_audit_log(path: str) -> Callable[[dict[str, Any]], None]:
    """A function that appends a line to the file, which logrotate may move away meanwhile. StageError if it cannot be
    written. Replicas of one node may share a file: each line is one write."""
    try:
        handler = WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise StageError(f"audit_log {path} cannot be written ({error.strerror}); name another file") from None
    log = logging.Logger("audit")  # of its own: no configuration of the others reaches it
    log.addHandler(handler)

    def write(entry: dict[str, Any]) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        log.info(json.dumps({"time": time, **entry}, ensure_ascii=False))

    return write
