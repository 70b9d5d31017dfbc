"""Adapters as arguments of the application: which there are, and whether the model is asked as they were taught."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatglm3.chat import PromptFormat
from chatglm3.engines import AdapterFolders, EngineName, UnusableAdapter
from chatglm3.engines.adapter_folders import written_at
from chatglm3.errors import ModelError
from cluster.errors import StageError
from cluster.storage import read_receipt
from serve_app.document_reader import DocumentStyle, document_style


def named(adapters: Any) -> Any:
    """`one=FOLDER,two=FOLDER`, as it stands on a command line, as a mapping."""
    if not isinstance(adapters, str):
        return adapters
    pairs = [pair.partition("=") for pair in adapters.split(",")]
    if not all(name and folder for name, _, folder in pairs):
        raise ValueError("give NAME=FOLDER, with commas between several")
    return {name: folder for name, _, folder in pairs}


def check_adapters(
    adapters: Mapping[str, str],
    shelf: str,
    prompt_format: PromptFormat,
    style: DocumentStyle = "numbered",
    engine: EngineName = "auto",
) -> dict[str, Any]:
    """`adapters` and `adapter_dir` with absolute paths: said once, before replicas start.

    ModelError if a folder is not there, or if `check_adapter` or the engine would not take one.
    """
    if shelf and not Path(shelf).is_dir():
        raise ModelError(f"adapter_dir {shelf} is not a folder: give the one that holds the adapters' folders")
    found = AdapterFolders(adapters, shelf)
    for name in found.names():
        check_adapter(name, found.find(name), prompt_format, style)
    if engine == "vllm" and (dora := found.with_dora()):
        raise ModelError(f"adapter {dora[0]} is DoRA, which vLLM refuses: give engine=transformers, or merge it")
    absolute = {name: str(Path(folder).absolute()) for name, folder in adapters.items()}
    return {"adapters": absolute, "adapter_dir": str(Path(shelf).absolute()) if shelf else ""}


def check_adapter(name: str, folder: Path, prompt_format: PromptFormat, style: DocumentStyle) -> None:
    """ModelError if an adapter was taught another prompt format or to read documents in another `style` or wording than
    the model, as which all of them are asked."""
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"adapter {name}: {folder} holds no adapter_config.json: give the folder that train wrote")
    receipt = read_receipt(folder)
    if receipt and "preset" in receipt.facts and document_style(receipt.facts, str(folder)) != style:
        raise ModelError(
            f"adapter {name}: {folder} was taught to read documents otherwise than the model (its preset is "
            f"{receipt.facts['preset']}): merge it, and serve it as a model of its own"
        )
    taught = receipt.facts.get("prompt_format", prompt_format) if receipt else prompt_format
    if taught != prompt_format:
        raise ModelError(
            f"adapter {name}: {folder} was tuned with prompt_format {taught}, and the model is asked in "
            f"{prompt_format}: merge it, and serve it as a model of its own"
        )


class AdapterCheck:
    """The same check of adapters that came to the folder later, when they are first asked for."""

    def __init__(self, folders: AdapterFolders, prompt_format: PromptFormat, style: DocumentStyle) -> None:
        self._folders = folders
        self._prompt_format: PromptFormat = prompt_format
        self._style: DocumentStyle = style
        self._passed: dict[str, tuple[Path, int]] = {}

    def __call__(self, name: str) -> None:
        """UnusableAdapter with the reason, or UnknownAdapter."""
        folder = self._folders.find(name)
        version = (folder, written_at(folder))
        if self._passed.get(name) == version:
            return
        try:
            check_adapter(name, folder, self._prompt_format, self._style)
        except (ModelError, StageError) as error:
            raise UnusableAdapter(str(error)) from None
        self._passed[name] = version
