"""Arguments of the application."""

from typing import Annotated, Any

import click
from pydantic import BeforeValidator, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from chatglm3.engines import DtypeName, EngineName
from serve_app.adapter_args import named
from serve_app.front import FrontArgs


class AppArgs(FrontArgs):
    """Arguments of the application: `args:` in a Serve config file, KEY=VALUE after `serve run serve_app.app:build`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "tiny"
    """Model folder; tiny is the built-in one."""
    name: str = ""
    """What clients call the model; its folder's name unless given."""
    engine: EngineName = "auto"
    """What runs the model."""
    dtype: DtypeName = "auto"
    """Computing type; auto is bfloat16 on a GPU (with vLLM float16 on one without it), float32 on a CPU."""
    max_batch: int = Field(32, ge=1)
    """Most requests that a replica answers at a time; the deployment's max_ongoing_requests may be higher."""
    speculate: bool = False
    """Guess the next tokens by what followed the last ones before, which quotes of documents gain by; vLLM only."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of a replica, which share each layer; vLLM only."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory to take, for one that others use too; unless given, vLLM's own 0.92. vLLM only."""
    separate_engines: bool = False
    """Put engines into replicas of their own, the deployment EngineServer, behind those that speak HTTP: an answer then
    goes on where another engine is left off when its replica dies, for the price of a second hop."""
    adapters: Annotated[dict[str, str], BeforeValidator(named)] = Field({})
    """LoRA adapters that requests can name as their model: NAME=FOLDER, with commas between several."""
    adapter_dir: str = ""
    """Folder of more of them, each named as its own folder; read at every request, so that adapters can be added."""

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, values: Any, validate: ModelWrapValidatorHandler["AppArgs"]) -> "AppArgs":
        try:
            return validate(values)
        except ValidationError as error:
            wrong = error.errors()[0]
            place = f"argument {'.'.join(map(str, wrong['loc']))}: " if wrong["loc"] else ""
            # `serve run` prints a ClickException as one line and exits with 1; anything else as a traceback.
            raise click.ClickException(
                f"{place}{wrong['msg'].removeprefix('Value error, ')}; "
                f"the application's arguments are {', '.join([*AppArgs.__annotations__, *FrontArgs.model_fields])}"
            ) from None
