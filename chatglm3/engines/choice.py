"""Which engine is the right one for a folder on this machine."""

from importlib.util import find_spec
from pathlib import Path

import torch

from chatglm3.engines.adapter_folders import AdapterFolders
from chatglm3.errors import ModelError
from chatglm3.folder import model_folder, read_json


def choose_engine(folder: str | Path, adapters: AdapterFolders | None = None) -> tuple[str, str]:
    """Name of the engine that `auto` stands for, with these adapters, and why."""
    if not torch.cuda.is_available():
        return "transformers", "as there is no GPU here"
    if find_spec("vllm") is None:
        return "transformers", "as vLLM is not installed; it is several times as fast"
    try:
        path = native_folder(folder)
    except ModelError as error:
        return "transformers", str(error)
    method = (read_json(path / "config.json").get("quantization_config") or {}).get("quant_method")
    if method == "bitsandbytes" and find_spec("vllm_bnb_plugin") is None:
        return "transformers", "as vLLM needs the package vllm-bnb-plugin for bitsandbytes formats"
    if dora := adapters.with_dora() if adapters else []:
        return "transformers", f"as adapter {dora[0]} is DoRA, which vLLM refuses"
    return "vllm", "the fastest on a GPU"


def native_folder(folder: str | Path) -> Path:
    """The folder, if vLLM can read it. ModelError for an official download."""
    path = model_folder(folder)
    if read_json(path / "config.json").get("model_type") != "glm" or not (path / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} is not in the layout that vLLM reads; convert it once: "
            f"python -m pipelines merge --base {folder} --format bf16 --out DIR"
        )
    return path
