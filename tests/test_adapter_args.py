"""Adapters that a server is started with or finds later: what is wrong with one is said before it answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm3.documents import format_digest
from chatglm3.engines import AdapterFolders, UnknownAdapter, UnusableAdapter
from chatglm3.engines.choice import choose_engine
from chatglm3.errors import ModelError
from cluster.storage import Receipt, publish
from serve_app.adapter_args import AdapterCheck, check_adapters
from tests.serving import write_endless_model


def write(folder: Path, config: str = "{}", **facts: Any) -> None:
    with publish(folder, Receipt("train", {}, facts=facts)) as partial:
        (partial / "adapter_config.json").write_text(config)


def test_an_adapter_that_comes_later_is_checked_when_it_is_first_asked_for(tmp_path):
    check = AdapterCheck(AdapterFolders(shelf=tmp_path), "chat", "numbered")
    with pytest.raises(UnknownAdapter):
        check("late")
    write(tmp_path / "late", preset="multidoc", prompt_digest="of another version")
    with pytest.raises(UnusableAdapter, match="tuned on another wording"):
        check("late")
    write(tmp_path / "bare", prompt_format="bare")
    with pytest.raises(UnusableAdapter, match="prompt_format bare, and the model is asked in chat"):
        check("bare")
    write(tmp_path / "good", preset="multidoc", prompt_digest=format_digest())
    check("good")


def test_an_adapter_whose_folder_has_gone_cannot_be_used(tmp_path):
    write(tmp_path / "law", preset="multidoc", prompt_digest=format_digest())
    check = AdapterCheck(AdapterFolders({"law": tmp_path / "law"}), "chat", "numbered")
    check("law")
    shutil.rmtree(tmp_path / "law")
    with pytest.raises(UnusableAdapter, match="law cannot be read: No such file or directory"):
        check("law")


def test_dora_is_not_for_vllm(tmp_path, tiny, monkeypatch):
    write(tmp_path / "shelf" / "plain")
    write(tmp_path / "shelf" / "fine", '{"use_dora": true}')
    check_adapters({}, str(tmp_path / "shelf"), "chat", engine="auto")
    with pytest.raises(ModelError, match="adapter fine is DoRA, which vLLM refuses: give engine=transformers"):
        check_adapters({}, str(tmp_path / "shelf"), "chat", engine="vllm")
    model = write_endless_model(tiny, tmp_path / "model")
    (model / "tokenizer.json").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("chatglm3.engines.choice.find_spec", lambda name: name)
    assert choose_engine(model) == ("vllm", "the fastest on a GPU")
    chosen = choose_engine(model, AdapterFolders(shelf=tmp_path / "shelf"))
    assert chosen == ("transformers", "as adapter fine is DoRA, which vLLM refuses")


def test_auto_leaves_bitsandbytes_formats_to_vllm_only_with_its_plugin(tmp_path, tiny, monkeypatch):
    model = write_endless_model(tiny, tmp_path / "model")
    (model / "tokenizer.json").touch()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    installed = {"vllm": object()}
    monkeypatch.setattr("chatglm3.engines.choice.find_spec", installed.get)
    alone = ("transformers", "as vLLM needs the package vllm-bnb-plugin for bitsandbytes formats")
    assert choose_engine(model) == alone
    installed["vllm_bnb_plugin"] = object()
    assert choose_engine(model) == ("vllm", "the fastest on a GPU")
