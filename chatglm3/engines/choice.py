"""Which engine is the right one for a folder on this machine."""

from importlib.util import find_spec
from pathlib import Path

import torch

from chatglm3.engines import EngineName
from chatglm3.engines.adapter_folders import AdapterFolders
from chatglm3.errors import ModelError
from chatglm3.folder import model_folder, read_json


def choose_engine(folder: str | Path, adapters: AdapterFolders | None = None) -> tuple[EngineName, str]:
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


def check_gpu() -> None:
    """ModelError, with PyTorch's reason, if it can use no GPU."""
    if torch.cuda.is_available():
        return
    try:
        torch.cuda.init()  # not where it succeeds: vLLM's process is to have the GPU for itself
    except (AssertionError, RuntimeError) as error:  # the first where it is built without CUDA
        reason = " ".join(str(error).split())
        raise ModelError(
            f"this process was given a GPU, but PyTorch {torch.__version__} cannot use it ({reason}); compare "
            f"nvidia-smi on this node with the CUDA that this PyTorch is built for"
        ) from None


def native_folder(folder: str | Path) -> Path:
    """The folder, if vLLM can read it. ModelError for an official download."""
    path = model_folder(folder)
    if read_json(path / "config.json").get("model_type") != "glm" or not (path / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} is not in the layout that vLLM reads; convert it once: "
            f"python -m pipelines merge --base {folder} --format bf16 --out DIR"
        )
    return path
