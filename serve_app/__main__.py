"""`python -m serve_app COMMAND`: what is done around a served model; `serve run serve_app.app:build` serves it."""

import sys

from chatglm3.errors import ModelError
from cluster.commands import run_command
from cluster.errors import StageError

COMMANDS = {
    "keys": ("serve_app.key_making:make_key", "keys add NAME --file FILE: a new API key, shown once"),
    "bench": ("serve_app.bench:bench", "load an endpoint as users do: percentiles of latency, tokens/s, a picture"),
}

if __name__ == "__main__":
    sys.exit(run_command("python -m serve_app", COMMANDS, sys.argv[1:], (StageError, ModelError, OSError)))
