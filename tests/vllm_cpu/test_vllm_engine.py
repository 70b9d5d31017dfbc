"""The vLLM engine beside the embedded one, on CPU: `make test-vllm` runs these in an environment of its own."""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import below
from chatglm3.chat import question_ids
from chatglm3.engines import (
    AdapterFolders,
    Completion,
    Engine,
    EngineError,
    Guide,
    PromptTooLong,
    RequestError,
    Sampling,
    UnknownAdapter,
    complete,
    load_engine,
    pacing,
)
from chatglm3.errors import ModelError
from chatglm3.tiny import FOLDER
from chatglm3.tiny.exam import demo_lessons
from chatglm3.tokenizer import ChatGlmTokenizer, load_tokenizer
from tests.test_merging import peft_adapter

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GREEDY = Sampling(max_tokens=48)
STOP_IDS = load_tokenizer(FOLDER).stop_ids
ENDLESS = Sampling(max_tokens=1500, logit_bias=tuple((token, -100.0) for token in STOP_IDS))
GREETING = "你好，你能做什么？"
Run = Callable[[Awaitable[Any]], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One event loop for all tests: vLLM stays in the first that asks it."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as merge writes it."""
    from pipelines.merging import MergeConfig, merge

    return Path(merge(MergeConfig(base="tiny", out=str(tmp_path_factory.mktemp("merged") / "model"))))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters of the tiny model."""
    shelf = tmp_path_factory.mktemp("shelf")
    peft_adapter("tiny", shelf / "first", seed=1, lora_alpha=64)
    peft_adapter("tiny", shelf / "second", seed=2, r=4, lora_alpha=32)
    peft_adapter("tiny", shelf / "dora", seed=3, use_dora=True)
    return shelf


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatGlmTokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def embedded(folder: Path) -> Iterator[Engine]:
    engine = load_engine("transformers", folder, dtype="float32", max_batch=16)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def vllm(folder: Path, shelf: Path) -> Iterator[Engine]:
    engine = load_engine("vllm", folder, dtype="float32", max_batch=16, adapters=AdapterFolders(shelf=shelf))
    yield engine
    engine.close()


def ask(run: Run, engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
    """Answers to prompts that are asked at once."""

    async def gathered() -> list[Completion]:
        return await asyncio.gather(*(complete(engine, prompt, sampling) for prompt in prompts))

    answers: list[Completion] = run(gathered())
    return answers


@pytest.fixture(scope="module")
def prompts(tokenizer: ChatGlmTokenizer) -> list[list[int]]:
    """A greeting, and questions about five documents."""
    asked = [[{"role": "user", "content": GREETING}], *(lesson.messages[:-1] for lesson in demo_lessons(15))]
    return [question_ids(tokenizer, messages, "chat") for messages in asked]


def test_greedy_answers_are_those_of_the_embedded_engine(
    run: Run, vllm: Engine, embedded: Engine, prompts: list[list[int]]
):
    found, wanted = (ask(run, engine, prompts, GREEDY) for engine in (vllm, embedded))
    assert found == wanted


def test_clients_take_turns_where_requests_wait(run: Run, vllm: Engine, prompts: list[list[int]]):
    answered: list[str] = []

    async def ask(client: str) -> None:
        await complete(vllm, prompts[0], replace(ENDLESS, max_tokens=100, client=client))
        answered.append(client)

    async def flood() -> None:
        await asyncio.gather(*(ask("flooding") for _ in range(48)), ask("quiet"))

    run(flood())
    assert len(answered) == 49
    assert answered.index("quiet") < 33  # it was in the second of the engine's batches of 16, not in the fourth


def test_the_last_piece_of_an_answer_waits_for_no_other_stream(
    run: Run, vllm: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    undisturbed = ask(run, vllm, prompts[:3], GREEDY)
    monkeypatch.setattr(pacing, "PAUSE_PER_STREAM_S", 10.0)

    async def answers() -> list[Completion]:
        async with asyncio.timeout(10):  # of a pause of thirty seconds
            return await asyncio.gather(*(complete(vllm, prompt, GREEDY) for prompt in prompts[:3]))

    assert run(answers()) == undisturbed


def test_an_answer_goes_on_where_an_engine_that_died_left_off(
    run: Run, vllm: Engine, embedded: Engine, prompts: list[list[int]]
):
    [whole] = ask(run, embedded, prompts[1:2], GREEDY)
    going_on = replace(GREEDY, drawn=whole.token_ids[:3])
    found, wanted = (ask(run, engine, prompts[1:2], going_on) for engine in (vllm, embedded))
    assert found == wanted
    assert found[0].token_ids == whole.token_ids[3:] != ()
    for other in ({"presence_penalty": 1.0}, {"guide": Guide("regex", "a")}):
        with pytest.raises(RequestError, match="vLLM cannot go on"):
            vllm.generate(prompts[0], replace(going_on, **other))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each process is bound to a core of its own")
def test_two_processes_share_each_layer_and_change_no_token(
    run: Run, vllm: Engine, folder: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # unless told, it wants a memory node for each
    shared = load_engine("vllm", folder, dtype="float32", max_batch=16, tensor_parallel=2)
    try:
        assert ask(run, shared, prompts, GREEDY) == ask(run, vllm, prompts, GREEDY)
    finally:
        shared.close()


def test_heads_that_cannot_be_shared_out_are_refused(folder: Path):
    with pytest.raises(ModelError, match="heads cannot be shared out"):
        load_engine("vllm", folder, tensor_parallel=3)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"group_size": 128}}}},
    ],
)
def test_weights_that_cannot_be_shared_out_are_refused_before_they_are_loaded(
    folder: Path, tmp_path: Path, quantization: dict[str, Any]
):
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ModelError, match="weights cannot be shared out so many ways; merge with --format bf16"):
        load_engine("vllm", copy, tensor_parallel=2)


def test_speculation_changes_no_token(run: Run, vllm: Engine, folder: Path, prompts: list[list[int]]):
    guessing = load_engine("vllm", folder, dtype="float32", max_batch=16, speculate=True)
    try:
        assert ask(run, guessing, prompts, GREEDY) == ask(run, vllm, prompts, GREEDY)
        with pytest.raises(RequestError, match="logit_bias cannot be kept with speculate=true"):
            guessing.generate(prompts[0], ENDLESS)
    finally:
        guessing.close()


def test_a_stop_text_ends_the_answer_where_the_embedded_engine_ends_it(
    run: Run, vllm: Engine, embedded: Engine, prompts: list[list[int]]
):
    plain = ask(run, vllm, prompts[:1], GREEDY)[0].text
    cut = Sampling(max_tokens=48, stop=(plain[5:7],))
    found, wanted = (ask(run, engine, prompts[:1], cut)[0] for engine in (vllm, embedded))
    assert found == wanted
    assert found.text == plain[:5]


def test_logprobs_are_those_of_the_embedded_engine(run: Run, vllm: Engine, embedded: Engine, prompts: list[list[int]]):
    async def logprobs(engine: Engine) -> list[tuple[int, float, list[int]]]:
        async with aclosing(engine.generate(prompts[1], Sampling(max_tokens=8, logprobs=3))) as deltas:
            return [
                (each.token_id, each.logprob, [token for token, _ in each.top])
                async for delta in deltas
                for each in delta.logprobs
            ]

    found, wanted = run(logprobs(vllm)), run(logprobs(embedded))
    assert [(token, top) for token, _, top in found] == [(token, top) for token, _, top in wanted]
    assert [logprob for _, logprob, _ in found] == pytest.approx([logprob for _, logprob, _ in wanted], abs=1e-3)


def test_a_guide_shapes_the_answer_as_in_the_embedded_engine(
    run: Run, vllm: Engine, embedded: Engine, prompts: list[list[int]]
):
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    guided = Sampling(max_tokens=40, guide=Guide("json_schema", schema, after="\n"))
    found, wanted = (ask(run, engine, prompts[:1], guided)[0] for engine in (vllm, embedded))
    assert found.text == wanted.text
    assert found.text.startswith('\n {"a"')


def test_a_seed_gives_the_same_answer_again_whatever_else_is_asked(run: Run, vllm: Engine, prompts: list[list[int]]):
    drawn, other = (replace(ENDLESS, max_tokens=24, temperature=2.0, seed=seed) for seed in (7, 8))
    alone = ask(run, vllm, prompts[:1], drawn)[0]
    assert ask(run, vllm, prompts, drawn)[0] == alone
    assert ask(run, vllm, prompts[:1], other)[0] != alone
    minus_one = replace(drawn, seed=-1)  # which is no seed to vLLM
    assert ask(run, vllm, prompts[:1], minus_one) == ask(run, vllm, prompts[:1], minus_one)


@pytest.mark.parametrize("name", ["first", "second"])
def test_an_adapter_answers_as_the_model_merged_with_it(
    name: str, run: Run, vllm: Engine, shelf: Path, prompts: list[list[int]], tmp_path: Path
):
    from pipelines.merging import MergeConfig, merge

    settings: dict[str, Any] = {"base": "tiny", "measure": False, "onto": "16bit"}
    merged = merge(MergeConfig(adapter=str(shelf / name), out=str(tmp_path / "merged"), **settings))
    alone = load_engine("transformers", merged, dtype="float32", max_batch=16)
    try:
        wanted = [answer.text for answer in ask(run, alone, prompts, GREEDY)]
    finally:
        alone.close()
    named = Sampling(max_tokens=48, adapter=name)
    found = [answer.text for answer in ask(run, vllm, prompts, named)]
    # bf16 rounds the merged weights, so that near ties may fall the other way.
    assert sum(map(str.__eq__, found, wanted)) >= len(prompts) - 2
    assert found != [answer.text for answer in ask(run, vllm, prompts, GREEDY)]


def test_an_adapter_that_is_written_again_answers_anew_and_its_older_copy_is_dropped_when_nobody_needs_it(
    run: Run, folder: Path, prompts: list[list[int]], tmp_path: Path
):
    peft_adapter("tiny", tmp_path / "law", seed=1, lora_alpha=64)
    engine = load_engine("vllm", folder, dtype="float32", max_batch=16, adapters=AdapterFolders(shelf=tmp_path))
    copies = Path(engine._converted.name)
    named = Sampling(max_tokens=48, adapter="law")

    async def rewritten_beside_an_answer() -> list[str]:
        long, texts = replace(named, max_tokens=200, logit_bias=ENDLESS.logit_bias), []
        async with aclosing(engine.generate(prompts[0], long)) as deltas:
            texts.append((await anext(deltas)).text)
            peft_adapter("tiny", tmp_path / "law", seed=2, lora_alpha=64)
            await complete(engine, prompts[0], named)
            assert len(list(copies.iterdir())) == 2
            texts += [delta.text async for delta in deltas]
        return texts

    try:
        [alone] = ask(run, engine, prompts[:1], replace(named, max_tokens=200, logit_bias=ENDLESS.logit_bias))
        [first] = ask(run, engine, prompts[:1], named)
        assert "".join(run(rewritten_beside_an_answer())) == alone.text
        [second] = ask(run, engine, prompts[:1], named)
        assert second != first
        assert len(list(copies.iterdir())) == 1
        assert list(run(engine._llm.list_loras())) == [2]
        peft_adapter("tiny", tmp_path / "wide", seed=3, r=65)
        with pytest.raises(ModelError, match="its rank is 65, and vLLM was started for 64 at most"):
            ask(run, engine, prompts[:1], replace(named, adapter="wide"))
    finally:
        engine.close()


def test_what_cannot_be_done_is_refused_and_the_others_are_answered(
    run: Run, vllm: Engine, prompts: list[list[int]], tokenizer: ChatGlmTokenizer
):
    wanted = ask(run, vllm, prompts[:1], GREEDY)
    for ids, sampling, error in (
        ([], GREEDY, RequestError),
        ([tokenizer.vocab_size + 7], GREEDY, RequestError),
        (prompts[0] * 1000, GREEDY, PromptTooLong),
        (prompts[0], Sampling(guide=Guide("regex", "(")), RequestError),
        (prompts[0], Sampling(temperature=0.005), RequestError),  # which vLLM would raise to 0.01
        (prompts[0], Sampling(adapter="third"), UnknownAdapter),
        (prompts[0], Sampling(adapter="dora"), ModelError),
    ):
        with pytest.raises(error):
            ask(run, vllm, [ids], sampling)
    assert ask(run, vllm, prompts[:1], GREEDY) == wanted


def test_a_client_that_goes_away_frees_its_place(run: Run, vllm: Engine, prompts: list[list[int]]):
    async def leave() -> int:
        async with aclosing(vllm.generate(prompts[0], ENDLESS)) as deltas:
            async for _ in deltas:
                break
        for _ in range(100):
            await complete(vllm, prompts[0], Sampling(max_tokens=1))
            if vllm.load.running == 0:
                return 0
            await asyncio.sleep(0.05)
        return vllm.load.running

    assert run(leave()) == 0


def test_repeated_prompts_are_found_in_the_prefix_cache(run: Run, vllm: Engine, prompts: list[list[int]]):
    longest = max(prompts, key=len)
    ask(run, vllm, [longest], GREEDY)
    before = vllm.load.prefix_hits
    ask(run, vllm, [longest], GREEDY)
    assert vllm.load.prefix_hits - before > len(longest) * 3 // 4


def test_an_official_download_is_refused_with_the_remedy(tiny: Path):
    with pytest.raises(ModelError, match=r"convert it once: python -m pipelines merge --base"):
        load_engine("vllm", tiny)


def kill_vllm() -> None:
    for process in below(os.getpid(), "EngineCore"):
        process.kill()


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_killed_process_fails_its_requests_and_calls_for_the_end(
    run: Run, folder: Path, prompts: list[list[int]], is_busy: bool
):
    end = threading.Event()
    engine = load_engine("vllm", folder, dtype="float32", on_fatal=end.set)

    async def killed() -> None:
        async for _ in engine.generate(prompts[0], ENDLESS):
            kill_vllm()

    if is_busy:
        with pytest.raises(EngineError):
            run(killed())
    else:
        kill_vllm()
    assert end.wait(10)
    assert not engine.healthy
    with pytest.raises(EngineError):
        engine.generate(prompts[0], GREEDY)
    engine.close()
