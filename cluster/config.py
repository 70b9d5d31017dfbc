"""A stage's settings: typed, frozen, unknown keys are errors, and the text under a field is its help."""

import os
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import StageError


class Config(BaseModel):
    """Base class of every stage's settings; the class docstring becomes the text of `STAGE -h`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Check `values` (nested dicts) and return the config. Raises StageError naming `source` and each bad field."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise StageError(f"{source}: {'; '.join(map(_problem, error.errors()))}") from None


def _problem(error: Any) -> str:
    """One pydantic error as `field: what is wrong (got VALUE)`."""
    field = ".".join(map(str, error["loc"])) or "config"
    if error["type"] == "extra_forbidden":
        return f"{field} is not a setting; leave it out (-h lists the settings)"
    if error["type"] == "value_error":  # raised by our own validators, whose text is already for people
        return f"{field}: {error['ctx']['error']}" if error["loc"] else str(error["ctx"]["error"])
    return f"{field}: {error['msg']} (got {error['input']!r})"


def read_section(path: str, section: str, sections: list[str]) -> dict[str, Any]:
    """The settings of one stage in a run.yaml of one section per stage; {} where it has none.

    Raises StageError for a missing or unreadable file and for sections that are no stage.
    """
    if not os.path.isfile(path):
        raise StageError(f"--config {path}: there is no such file")
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise StageError(f"--config {path} must map stage names to settings, for example `train: {{epochs: 2}}`")
    if unknown := [name for name in document if name not in sections]:
        raise StageError(f"--config {path}: {unknown[0]} is no stage; sections are {', '.join(sections)}")
    settings = document.get(section) or {}
    if not isinstance(settings, dict):
        raise StageError(f"--config {path}: section {section} must hold `setting: value` lines")
    return settings
