"""Paths of requests."""

from starlette.types import Scope


def path_of(scope: Scope) -> str:
    """The path as routes have it: without the prefix that the application is served under."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))
