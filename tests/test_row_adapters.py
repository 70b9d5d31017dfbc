"""Adapters side by side in one batch: each row answers as the model would with its adapter merged into it."""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm3 import load_model, load_tokenizer, parse_reply, prompt_ids
from chatglm3.adapters import load_adapter
from chatglm3.engines import AdapterFolders, Sampling, UnknownAdapter, UnusableAdapter, complete
from chatglm3.engines.row_adapters import MAX_LOADED, RowAdapters
from chatglm3.engines.transformers_engine import TransformersEngine
from chatglm3.quantization import NF4
from serve_app.routes import make_api
from tests.http_server import served
from tests.random_adapters import KINDS, write_adapter


@pytest.fixture(scope="module")
def shelf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shelf = tmp_path_factory.mktemp("shelf")
    for seed, (name, settings) in enumerate(KINDS.items()):
        write_adapter(tiny, shelf / name, seed, **settings)
    return shelf


@pytest.fixture(scope="module")
def engine(tiny: Path, shelf: Path) -> Iterator[TransformersEngine]:
    model = load_model(tiny, dtype=torch.float32)
    engine = TransformersEngine(model, load_tokenizer(tiny), adapters=AdapterFolders(shelf=shelf))
    yield engine
    engine.close()


def prompt(length: int, vocabulary: int = 1500) -> list[int]:
    return Random(length).choices(range(3, vocabulary), k=length)


def answers(engine: TransformersEngine, requests: list[tuple[list[int], str]]) -> list[tuple[int, ...]]:
    async def run() -> list[tuple[int, ...]]:
        jobs = [complete(engine, ids, Sampling(max_tokens=24, adapter=name)) for ids, name in requests]
        return [answer.token_ids for answer in await asyncio.gather(*jobs)]

    return asyncio.run(run())


def merged_answer(base: Path, adapter: Path | None, ids: list[int], stop_ids: tuple[int, ...]) -> tuple[int, ...]:
    model = load_model(base, dtype=torch.float32)
    if adapter:
        model = load_adapter(model, adapter).merge_and_unload()
    given = torch.tensor([ids])
    new = model.generate(given, max_new_tokens=24, do_sample=False, eos_token_id=list(stop_ids))
    return tuple(new[0, len(ids) :].tolist())


def test_rows_of_different_adapters_in_one_batch_answer_as_merged_models_do(engine, tiny, shelf):
    stop_ids = load_tokenizer(tiny).stop_ids
    requests = [(prompt(length), name) for length in (5, 40) for name in ("", *KINDS)]
    found = answers(engine, requests)
    for (ids, name), answer in zip(requests, found, strict=True):
        assert answer == merged_answer(tiny, shelf / name if name else None, ids, stop_ids), name
    assert len(set(found[: len(KINDS) + 1])) == len(KINDS) + 1  # each adapter says something of its own


@pytest.mark.parametrize("name", ["nf4able-fp16-bin-qkv-1", "nf4able-fp16-bin-qkv-dense-dense-dens-2"])
def test_old_adapters_on_query_key_value_are_served_too(shared, tiny, name):
    base, folder = shared / "chatglm3/ckpt/nf4able-fp16-bin", shared / "chatglm3/lora" / name
    tokenizer = load_tokenizer(tiny)
    engine = TransformersEngine(
        load_model(base, dtype=torch.float32), tokenizer, adapters=AdapterFolders({"old": folder})
    )
    vocabulary = load_model(base).config.vocab_size
    ids = prompt(12, vocabulary)
    found = answers(engine, [(ids, "old"), (ids, ""), (ids, "old")])
    engine.close()
    assert found[0] == found[2] == merged_answer(base, folder, ids, tokenizer.stop_ids)
    assert found[1] == merged_answer(base, None, ids, tokenizer.stop_ids) != found[0]


def test_an_adapter_sits_on_a_quantised_base(shared, tiny):
    base, folder = shared / "chatglm3/ckpt/nf4able-fp16-bin", shared / "chatglm3/lora/nf4able-fp16-bin-qkv-1"
    model = load_model(base, dtype=torch.bfloat16, quantization_config=NF4)
    engine = TransformersEngine(model, load_tokenizer(tiny), adapters=AdapterFolders({"old": folder}))
    ids = prompt(12, model.config.vocab_size)
    with_it, without = answers(engine, [(ids, "old"), (ids, "")])
    engine.close()
    assert with_it != without


def test_an_adapter_is_found_and_read_again_without_a_restart(engine, tiny, shelf):
    with pytest.raises(UnknownAdapter, match="there is no adapter 'late'; there are: attention, dora, everything"):
        answers(engine, [(prompt(9), "late")])
    with pytest.raises(UnknownAdapter):
        answers(engine, [(prompt(9), "../shelf/attention")])
    write_adapter(tiny, shelf / "late", 50, **KINDS["attention"])
    [first] = answers(engine, [(prompt(9), "late")])
    write_adapter(tiny, shelf / "late", 51, **KINDS["everything"])
    [second] = answers(engine, [(prompt(9), "late")])
    assert first != second == merged_answer(tiny, shelf / "late", prompt(9), load_tokenizer(tiny).stop_ids)
    shutil.rmtree(shelf / "late")
    with pytest.raises(UnknownAdapter):
        answers(engine, [(prompt(9), "late")])


def test_the_adapters_that_were_asked_for_last_stay_in_memory(tiny, shelf):
    folders = AdapterFolders({f"copy{number}": shelf / "attention" for number in range(3)}, shelf)
    adapters = RowAdapters(load_model(tiny, dtype=torch.float32), folders)
    assert adapters.load("copy0") is adapters.load("copy1")  # one folder
    for number in range(MAX_LOADED):
        os.utime(shelf / "dora" / "adapter_config.json", (number, 2**31 + number))  # another version
        adapters.load("dora")
    assert len(adapters.loaded) == MAX_LOADED
    assert {folder for folder, _ in adapters.loaded} == {str(shelf / "dora")}


def cut_short(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 2000)


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def rewritten(**fields: object):
    def change(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text()) | fields
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return change


def no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def of_two_ranks(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file(tensors | {name: tensors[name].repeat(2, 1)}, file)


def of_one_axis(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file(tensors | {name: tensors[name].flatten().clone()}, file)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (of_two_ranks, "has rank 8, its lora_B 4"),
        (of_one_axis, "is no matrix of an adapter"),
        (cut_short, "damaged or cut short"),
        (without_weights, "holds no adapter_model.safetensors"),
        (no_json, "not readable JSON"),
        (rewritten(peft_type="PREFIX_TUNING"), "only LORA"),
        (rewritten(modules_to_save=["lm_head"]), "modules_to_save is not served"),
        (rewritten(bias="all"), "bias is not served"),
        (rewritten(r="x", lora_alpha="y"), "cannot be used"),
    ],
)
def test_a_broken_adapter_is_one_line_and_harms_nobody(engine, shelf, spoil, reason):
    folder = shelf / "broken"
    shutil.copytree(shelf / "attention", folder)
    try:
        spoil(folder)
        [before] = answers(engine, [(prompt(9), "attention")])
        with pytest.raises(UnusableAdapter, match=reason) as broken:
            asyncio.run(engine.prepare(Sampling(adapter="broken")))
        assert "\n" not in str(broken.value)
        with pytest.raises(UnusableAdapter):
            answers(engine, [(prompt(9), "broken")])
        assert answers(engine, [(prompt(9), "attention")]) == [before]
    finally:
        shutil.rmtree(folder)


def test_a_folder_that_is_slow_to_read_keeps_nobody_else_waiting(engine, shelf, monkeypatch):
    shutil.copytree(shelf / "attention", shelf / "slow")
    arrived, read = threading.Event(), RowAdapters._read

    def slow(adapters: RowAdapters, folder: Path) -> Any:
        assert arrived.wait(60)
        return read(adapters, folder)

    async def run() -> list[tuple[int, ...]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        one = Sampling(max_tokens=4)
        await engine.prepare(replace(one, adapter="attention"))
        monkeypatch.setattr(RowAdapters, "_read", slow)
        waiting = [asyncio.create_task(complete(engine, prompt(9), replace(one, adapter="slow"))) for _ in range(6)]
        await asyncio.sleep(0.2)
        others = [await complete(engine, prompt(9), replace(one, adapter=name)) for name in ("attention", "")]
        assert not any(task.done() for task in waiting)
        arrived.set()
        return [answer.token_ids for answer in (others[0], *await asyncio.gather(*waiting))]

    try:
        assert len(set(asyncio.run(run()))) == 1
    finally:
        shutil.rmtree(shelf / "slow")


def test_clients_choose_adapters_by_the_models_name(engine, tiny, shelf, caplog):
    question: Any = [{"role": "user", "content": "北京的人口是多少？"}]
    tokenizer = load_tokenizer(tiny)

    def content(client: openai.OpenAI, model: str) -> str:
        answer = client.chat.completions.create(model=model, messages=question, max_tokens=24)
        assert answer.model == model
        return answer.choices[0].message.content

    with served(make_api(engine, tokenizer, "tiny", "chat")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny", *sorted(KINDS)]
        assert client.models.retrieve("dora").parent == "tiny"
        for name in ("tiny", "attention", "dora"):
            raw = answers(engine, [(prompt_ids(tokenizer, question), "" if name == "tiny" else name)])[0]
            assert content(client, name) == parse_reply(tokenizer.decode(raw)).content
        completion = client.completions.create(model="dora", prompt="天空", max_tokens=4)
        assert completion.model == "dora"
        with pytest.raises(openai.NotFoundError, match="'nobody' is not served here; these are: 'tiny', 'attention'"):
            content(client, "nobody")
        shutil.copytree(shelf / "attention", shelf / "broken")
        cut_short(shelf / "broken")
        for stream in (False, True):
            with pytest.raises(openai.NotFoundError) as broken:
                client.chat.completions.create(model="broken", messages=question, stream=stream)
            assert (broken.value.code, broken.value.param) == ("model_not_usable", "model")
            assert str(shelf) not in str(broken.value)
        assert f"adapter 'broken' cannot be used: {shelf}/broken" in caplog.text
        shutil.rmtree(shelf / "broken")
        assert httpx.get(f"{url}/healthz").status_code == 200


def test_an_adapter_of_another_base_is_refused(shared, tiny):
    other = shared / "chatglm3/lora/nf4able-fp16-bin-qkv-1"
    model = load_model(tiny, dtype=torch.float32)
    engine = TransformersEngine(model, load_tokenizer(tiny), adapters=AdapterFolders({"other": other}))
    with pytest.raises(UnusableAdapter, match=r"use the base it was trained on|use its own base"):
        asyncio.run(engine.prepare(Sampling(adapter="other")))
    engine.close()


def test_an_engine_without_adapters_says_so(tiny):
    engine = TransformersEngine(load_model(tiny, dtype=torch.float32), load_tokenizer(tiny))
    with pytest.raises(UnknownAdapter, match="started without any"):
        asyncio.run(engine.prepare(Sampling(adapter="x")))
    engine.close()
