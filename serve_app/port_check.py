"""Whether `serve run` will get its port, asked before it starts anything."""

import http.client
import socket
import urllib.request

import click
from ray.serve.config import HTTPOptions


def refuse_taken_port() -> None:
    """Raise ClickException when the `serve run IMPORT_PATH` that this is part of will not get its port.

    `serve run` with a config file calls `build` on the cluster, after Serve has opened the port or failed to.
    """
    command = click.get_current_context(silent=True)
    if command is None or command.info_name != "run" or str(command.params.get("address")).startswith("ray://"):
        return
    options = HTTPOptions()
    with socket.socket() as probe:
        for shared in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # as Serve's proxy does
            probe.setsockopt(socket.SOL_SOCKET, shared, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            if not _is_serve(f"http://{options.host}:{options.port}"):
                raise click.ClickException(
                    f"port {options.port} of {options.host} cannot be opened ({error.strerror}); end the program that "
                    f"has it, or choose another port in serve_app/serve.yaml and: serve run serve_app/serve.yaml"
                ) from None


def _is_serve(url: str) -> bool:
    """Whether Ray Serve answers there: on a cluster where it runs already, `serve run` deploys to it."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/-/healthz", timeout=5) as answer:
            return bool(answer.read(100) == b"success")
    except (OSError, http.client.HTTPException):
        return False
