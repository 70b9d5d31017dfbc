"""A setting that is a list, given as one value or as several with commas between them, as people type flags."""

from typing import Any

from pydantic import BeforeValidator


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [word.strip() for word in value.split(",")]
    return [value] if isinstance(value, (int, float)) else value


ONE_OR_MORE = BeforeValidator(_as_list)
"""For `Annotated[list[...], ONE_OR_MORE]` or a tuple: `q_proj`, `q_proj,v_proj` and `[q_proj, v_proj]` all do."""
