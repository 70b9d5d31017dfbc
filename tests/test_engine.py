"""The transformers engine: answers equal to generate's, and no request that harms another."""

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from random import Random

import jsonschema
import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM

from chatglm3.engines import (
    Completion,
    Delta,
    EngineDied,
    EngineError,
    Guide,
    Load,
    PromptTooLong,
    RequestError,
    Sampling,
    complete,
    load_engine,
)
from chatglm3.engines.sampling import next_tokens, steered
from chatglm3.engines.transformers_engine import PROMPT_CHUNK, TransformersEngine
from chatglm3.errors import ModelError
from chatglm3.tokenizer import ChatGlmTokenizer, load_tokenizer

CONTEXT = 2048
POISON = 777  # a token whose embedding is NaN


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> ChatGlmTokenizer:
    return load_tokenizer(tiny)


def random_model(tokenizer: ChatGlmTokenizer) -> GlmForCausalLM:
    """A ChatGLM3 in fp32 with weights large enough for answers without repetition, the same at every call."""
    torch.manual_seed(1)
    config = GlmConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=CONTEXT,
        attention_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    model = GlmForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[[*tokenizer.stop_ids, POISON]] = 0  # never among the probable: answers of any length
        model.model.embed_tokens.weight[POISON] = torch.nan
    return model


@pytest.fixture(scope="module")
def engine(tokenizer: ChatGlmTokenizer) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(random_model(tokenizer), tokenizer, max_batch=5)
    yield engine
    engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return Random(seed * CONTEXT + length).choices(range(3, POISON), k=length)


async def complete_later(engine: TransformersEngine, delay_s: float, ids: list[int], **sampling) -> Completion:
    await asyncio.sleep(delay_s)
    return await complete(engine, ids, Sampling(**sampling))


def run_all(engine: TransformersEngine, requests: list[tuple[list[int], dict]]) -> list[Completion]:
    """Answers of requests that join one after the other while earlier ones run."""

    async def run():
        jobs = [complete_later(engine, 0.01 * order, ids, **sampling) for order, (ids, sampling) in enumerate(requests)]
        return await asyncio.gather(*jobs)

    return asyncio.run(run())


def test_greedy_answers_are_those_of_generate_whoever_else_is_running(engine, tokenizer):
    prompts = [prompt(length) for length in (1, 2, 7, 33, 300, 600, 1200, 64)]
    answers = run_all(engine, [(ids, {"max_tokens": 64}) for ids in prompts])
    reference = random_model(tokenizer)
    for ids, answer in zip(prompts, answers, strict=True):
        alone = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=64, do_sample=False
        )
        assert list(answer.token_ids) == alone[0, len(ids) :].tolist()
        assert answer.finish_reason == "length"
        assert answer.text == tokenizer.decode(answer.token_ids)


def test_a_seed_gives_one_text_alone_and_among_others(engine):
    seeded = {"max_tokens": 48, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 7}
    [alone] = run_all(engine, [(prompt(20), seeded)])
    others = [(prompt(length), {"max_tokens": 40, "temperature": 1.0, "top_k": 50}) for length in (5, 700, 90, 12)]
    *_, among, other_seed = run_all(engine, [*others, (prompt(20), seeded), (prompt(20), seeded | {"seed": 8})])
    assert among == alone
    assert other_seed != alone


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.5, "seed": 7},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"temperature": 1.0, "seed": 3, "guide": Guide("regex", "[a-z0-9]{30,}")},
    ],
    ids=["greedy", "seeded", "penalties", "guide"],
)
def test_an_answer_goes_on_where_an_engine_that_died_left_off(engine, sampling):
    async def deltas_of(drawn: tuple[int, ...]) -> list[Delta]:
        asked = Sampling(max_tokens=32, drawn=drawn, **sampling)
        return [delta async for delta in engine.generate(prompt(20), asked)]

    whole = asyncio.run(deltas_of(()))
    for count in (1, 2, 3, 13, 31):
        drawn = sum((delta.token_ids for delta in whole[:count]), ())
        assert asyncio.run(deltas_of(drawn)) == whole[count:]


def test_a_stop_text_of_which_the_dead_engine_wrote_a_part_is_found(engine, tokenizer):
    [answer] = run_all(engine, [(prompt(20), {"max_tokens": 32})])
    pieces = [tokenizer.decode(answer.token_ids[:count]) for count in range(33)]
    stop = pieces[12][len(pieces[9]) :]
    [stopped] = run_all(engine, [(prompt(20), {"max_tokens": 32, "stop": (stop,)})])
    assert stopped.finish_reason == "stop"
    held = Sampling(max_tokens=32, stop=(stop,), drawn=stopped.token_ids[:-1])
    rest = asyncio.run(complete(engine, prompt(20), held))
    assert rest == Completion("", stopped.token_ids[-1:], "stop")


def test_tokens_are_drawn_as_often_as_they_are_probable():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2])).expand(20_000, -1)
    expected = {
        Sampling(temperature=1.0): [0.1, 0.4, 0.3, 0.2],
        Sampling(temperature=0.5): [1 / 30, 16 / 30, 9 / 30, 4 / 30],
        Sampling(temperature=1.0, top_k=2): [0, 4 / 7, 3 / 7, 0],
        Sampling(temperature=1.0, top_p=0.6): [0, 4 / 7, 3 / 7, 0],
        Sampling(temperature=1.0, top_k=3, top_p=0.5): [0, 4 / 7, 3 / 7, 0],
        Sampling(temperature=1.0, top_p=1e-9): [0, 1, 0, 0],
        Sampling(temperature=1e-300): [0, 1, 0, 0],
        Sampling(temperature=1.0, top_k=10**400): [0.1, 0.4, 0.3, 0.2],
    }
    for sampling, probabilities in expected.items():
        counts = Counter(next_tokens(logits, [sampling] * len(logits), [Random(3)] * len(logits)))
        assert [counts[token] / len(logits) for token in range(4)] == pytest.approx(probabilities, abs=0.012)


def test_each_row_of_a_batch_is_drawn_by_its_own_rules():
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, torch.nan, 1.0], [3.0, 2.0, 1.0], [5.0, 0.0, torch.inf]])
    samplings = [Sampling(), Sampling(), Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0)]
    assert next_tokens(logits, samplings, [Random(0)] * 4) == [1, None, 0, None]


def test_long_prompts_do_not_hold_up_the_others(engine):
    async def tokens_meanwhile() -> int:
        async with aclosing(engine.generate(prompt(4), Sampling(max_tokens=1500))) as running:
            await anext(running)
            jobs = [complete(engine, prompt(3 * PROMPT_CHUNK, seed), Sampling(max_tokens=1)) for seed in range(3)]
            long = asyncio.gather(*jobs)
            count = 0
            while not long.done():
                await anext(running)
                count += 1
            return count

    assert asyncio.run(tokens_meanwhile()) >= 8  # nine chunks are read, one between two tokens


def test_a_long_prompt_delays_a_short_one_by_one_chunk(tokenizer):
    model, both_asked, passes = random_model(tokenizer), threading.Event(), []

    def record(_, args, kwargs):
        passes.append(tuple(kwargs["input_ids"].shape))
        both_asked.wait(60)

    model.model.register_forward_pre_hook(record, with_kwargs=True)
    engine = TransformersEngine(model, tokenizer)

    async def run() -> int:
        long = asyncio.create_task(complete(engine, prompt(3 * PROMPT_CHUNK), Sampling(max_tokens=1)))
        while not passes:
            await asyncio.sleep(0.001)
        assert engine.load.running == 1
        short = asyncio.create_task(complete(engine, prompt(10), Sampling(max_tokens=1)))
        while not engine.load.waiting:
            await asyncio.sleep(0.001)
        both_asked.set()
        await short
        await long
        return len(passes)

    asyncio.run(run())
    engine.close()
    # [requests, tokens of each]: a chunk and a step of the long one, twice; then the short one is read first, and
    # answers in the step after.
    read_together = [(1, 512), (1, 1), (1, 512), (2, 1), (1, 8), (1, 504), (2, 1)]
    assert passes == [*read_together, (1, 4), (1, 1)]


def test_the_load_counts_requests_tokens_and_memory(tokenizer):
    model, passes = random_model(tokenizer), threading.Semaphore(0)

    def wait_for_a_pass(*_) -> None:
        passes.acquire()

    model.lm_head.register_forward_pre_hook(wait_for_a_pass)
    engine = TransformersEngine(model, tokenizer, max_batch=2)
    assert engine.load == Load(running=0, waiting=0, waiting_tokens=0, cache_use=0.0)

    async def run() -> Load:
        jobs = [asyncio.create_task(complete(engine, prompt(5), Sampling(max_tokens=1)))]
        while engine.load.running < 1:
            await asyncio.sleep(0.001)
        # While the first one holds the engine, the others gather, so that it finds all of them at once.
        jobs += [asyncio.create_task(complete(engine, prompt(41), Sampling(max_tokens=2))) for _ in range(3)]
        while engine.load.waiting < 3:
            await asyncio.sleep(0.001)
        passes.release()
        while (load := engine.load).cache_use < 82 / (2 * CONTEXT):
            await asyncio.sleep(0.001)
        passes.release(9)
        await asyncio.gather(*jobs)
        return load

    load = asyncio.run(run())
    engine.close()
    assert load == Load(running=2, waiting=1, waiting_tokens=41, cache_use=82 / (2 * CONTEXT))


def test_bias_forbids_and_forces_tokens(engine):
    [free] = run_all(engine, [(prompt(12), {"max_tokens": 6})])
    first = free.token_ids[0]
    [without] = run_all(engine, [(prompt(12), {"max_tokens": 6, "logit_bias": ((first, -100.0),)})])
    assert first not in without.token_ids
    [forced] = run_all(engine, [(prompt(12), {"max_tokens": 6, "logit_bias": ((99, 100.0),)})])
    assert forced.token_ids == (99,) * 6


def test_penalties_are_taken_from_the_scores_of_tokens_that_the_answer_has():
    logits = torch.tensor([[3.0, 2.5, 1.0, 0.0]]).expand(4, -1)
    samplings = [Sampling(presence_penalty=0.5), Sampling(frequency_penalty=1.5), Sampling(presence_penalty=-2.0)]
    scores = steered(logits, [*samplings, Sampling()], [[0, 0, 1], [0, 0, 1], [2], [0]], [None] * 4)
    assert scores.tolist() == [[2.5, 2.0, 1, 0], [0.0, 1.0, 1, 0], [3, 2.5, 3.0, 0], [3, 2.5, 1, 0]]


def test_penalties_see_the_answer_and_not_the_prompt(engine, tokenizer):
    fields = {"max_tokens": 40, "presence_penalty": 2.0, "frequency_penalty": 2.0, "logit_bias": ((50, 9.0), (51, 9.0))}
    [answer] = run_all(engine, [([*prompt(30), 50], fields)])
    ids = [*prompt(30), 50, *answer.token_ids]
    with torch.no_grad():
        scores = random_model(tokenizer)(torch.tensor([ids])).logits[0, 30:-1]
    scores[:, [50, 51]] += 9
    for step, row in enumerate(scores):
        for token, count in Counter(answer.token_ids[:step]).items():
            row[token] -= 2 + 2 * count
    assert list(answer.token_ids) == scores.argmax(-1).tolist()
    assert {50, 51} & set(answer.token_ids)


def test_logprobs_are_those_of_the_models_own_scores(engine, tokenizer):
    async def logprobs(**sampling) -> list:
        fields = Sampling(max_tokens=5, logprobs=3, **sampling)
        return [delta async for delta in engine.generate(prompt(33), fields)]

    for sampling in ({}, {"temperature": 1.0, "seed": 5}, {"logit_bias": ((99, 100.0),)}):
        deltas = asyncio.run(logprobs(**sampling))
        ids = [*prompt(33), *[delta.token_ids[0] for delta in deltas]]
        with torch.no_grad():
            expected = random_model(tokenizer)(torch.tensor([ids])).logits[0, 32:-1].log_softmax(-1)
        for delta, row in zip(deltas, expected, strict=True):
            [found] = delta.logprobs
            assert found.token_id == delta.token_ids[0]
            assert found.logprob == pytest.approx(row[found.token_id].item(), abs=1e-4)
            assert [token for token, _ in found.top] == row.topk(3).indices.tolist()
            assert [logprob for _, logprob in found.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    [delta] = asyncio.run(_deltas(engine, Sampling(max_tokens=1)))
    assert delta.logprobs == ()
    [delta] = asyncio.run(_deltas(engine, Sampling(max_tokens=1, logprobs=0)))
    assert [found.top for found in delta.logprobs] == [()]


async def _deltas(engine: TransformersEngine, sampling: Sampling) -> list:
    return [delta async for delta in engine.generate(prompt(33), sampling)]


SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "minLength": 1, "maxLength": 12},
        "size": {"enum": ["大", "小"]},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 99}, "maxItems": 3},
    },
    "required": ["text", "size", "counts"],
    "additionalProperties": False,
}


def test_a_guided_answer_obeys_whatever_the_model_would_say(engine):
    """A model of random weights at full temperature, with the line that begins a reply in the chat format."""
    guide = Guide("json_schema", json.dumps(SCHEMA), after="\n")
    free = {"max_tokens": 30}
    guided = {"max_tokens": 400, "temperature": 1.0, "guide": guide}
    requests = [(prompt(9), free), *[(prompt(20), guided | {"seed": seed}) for seed in range(24)], (prompt(9), free)]
    first, *answers, last = run_all(engine, requests)
    assert first == last
    assert first.finish_reason == "length"
    contents = [json.loads(answer.text.removeprefix("\n")) for answer in answers]
    for content in contents:
        jsonschema.validate(content, SCHEMA)
    assert {answer.text[0] for answer in answers} == {"\n"}
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert len({content["text"] for content in contents}) > 20


def test_every_kind_of_guide_is_obeyed(engine):
    guides = {
        "json_object": (Guide("json_object"), r"\s*\{.*\}\s*"),
        "regex": (Guide("regex", "[ab]{3}/(天|地)\n?!"), r"[ab]{3}/(天|地)\n?!"),
        "grammar": (Guide("grammar", 'start: "ja" | more\nmore: "nein" /[0-9]/'), r"ja|nein[0-9]"),
    }
    for name, (guide, pattern) in guides.items():
        requests = [(prompt(8), {"temperature": 1.0, "seed": seed, "guide": guide}) for seed in range(5)]
        for answer in run_all(engine, [(ids, fields | {"max_tokens": 600}) for ids, fields in requests]):
            if answer.finish_reason == "stop":  # an endless string of random letters is a JSON object too
                assert re.fullmatch(pattern, answer.text, re.DOTALL), (name, answer.text)
        assert answer.finish_reason == "stop" or name == "json_object"


def test_guides_that_cannot_be_followed_are_refused_and_harm_nobody(engine):
    wrong = {
        ("regex", "(?=a)b"): "look-around",
        ("regex", "(" * 60_000): "regex",
        ("regex", "((((((a{100}){100}){100}){100}){100})"): "regex",
        ("json_schema", '{"type": "strin"}'): "json_schema cannot be followed",
        ("json_schema", '{"$ref": "http://127.0.0.1/schema"}'): "json_schema cannot be followed",
        ("json_schema", '{"a":' * 10_000 + "1" + "}" * 10_000): "too many levels",
        ("json_schema", '{"type": "integer", "multipleOf": 982451653}'): "fuel exhausted",
        ("grammar", "start: nothing"): "nothing",
        ("grammar", 'start: %json {"minItems": 1000000000}'): "must not hold %json",
        ("json_schema", '{"minItems": 1000000000}'): "sum up to 1e",
        ("json_schema", json.dumps({"anyOf": [{"type": "array", "maxItems": 9000}] * 2})): "sum up to 18000",
    }
    for (kind, text), message in wrong.items():
        started = time.monotonic()
        with pytest.raises(RequestError, match=message) as refused:
            asyncio.run(engine.prepare(Sampling(guide=Guide(kind, text))))
        assert "\n" not in str(refused.value)
        assert time.monotonic() - started < 5
    with pytest.raises(RequestError, match="at most 65536 characters"):
        Guide("regex", "a" * 70_000)
    # What shows only on the way fails the one request.
    costly = Guide("json_schema", json.dumps({"type": "object", "properties": {f"v{i}": {} for i in range(3000)}}))
    with pytest.raises(RequestError, match="the json_schema cannot be followed: Parser Error: Current row has"):
        run_all(engine, [(prompt(8), {"guide": costly, "max_tokens": 300})])
    assert len(run_all(engine, [(prompt(8), {"max_tokens": 5})])[0].token_ids) == 5


def test_an_answer_ends_before_a_stop_text_and_at_a_stop_id(engine, tokenizer):
    [whole] = run_all(engine, [(prompt(9), {"max_tokens": 40})])
    mark = whole.text[20:24]
    [stopped] = run_all(engine, [(prompt(9), {"max_tokens": 40, "stop": ("never", mark)})])
    assert stopped.text == whole.text[: whole.text.index(mark)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 40

    model = random_model(tokenizer)
    with torch.no_grad():  # what the model answers fourth now also ends an answer
        model.lm_head.weight[tokenizer.stop_ids[1]] = 1.001 * model.lm_head.weight[whole.token_ids[3]]
    other = TransformersEngine(model, tokenizer)
    [ended] = run_all(other, [(prompt(9), {"max_tokens": 40})])
    other.close()
    assert ended.finish_reason == "stop"
    assert ended.token_ids == (*whole.token_ids[:3], tokenizer.stop_ids[1])
    assert ended.text == tokenizer.decode(whole.token_ids[:3])


def test_impossible_requests_are_refused_with_the_numbers_and_harm_nobody(engine, tokenizer):
    for ids, message in (([], "the prompt is empty"), ([5, -1], "outside"), ([tokenizer.vocab_size], "outside")):
        with pytest.raises(RequestError, match=message):
            engine.generate(ids, Sampling())
    with pytest.raises(RequestError, match="logit_bias has ids outside"):
        engine.generate(prompt(3), Sampling(logit_bias=((10**9, 1.0),)))
    with pytest.raises(PromptTooLong, match=r"2000 tokens and max_tokens 49 together exceed .* 2048"):
        engine.generate(prompt(2000), Sampling(max_tokens=49))
    for field, value in (("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0)):
        with pytest.raises(RequestError, match=field):
            Sampling(**{field: value})
    for values in (
        {"top_p": 1.1},
        {"top_k": -1},
        {"stop": ("",)},
        {"temperature": 10**400},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((5, 101.0),)},
        {"logit_bias": ((5, 1.0),) * 1025},
        {"logprobs": 21},
    ):
        with pytest.raises(RequestError):
            Sampling(**values)
    assert len(run_all(engine, [(prompt(2000), {"max_tokens": 48})])[0].token_ids) == 48


def test_a_request_whose_scores_are_not_numbers_fails_alone(engine):
    async def run() -> list[Completion | BaseException]:
        poisoned = [POISON, *prompt(1500)]
        given_up = asyncio.create_task(complete(engine, poisoned, Sampling(max_tokens=5)))
        while not engine.running:
            await asyncio.sleep(0.001)
        given_up.cancel()
        jobs = [
            complete_later(engine, 0.0, prompt(30), max_tokens=100),
            complete_later(engine, 0.0, poisoned, max_tokens=5),
            *[complete_later(engine, 0.3, prompt(10, seed), max_tokens=20) for seed in range(6)],
        ]
        return await asyncio.gather(*jobs, return_exceptions=True)

    for _ in range(2):  # the second time, rows that the poisoned request has had are used again
        first, failed, *later = asyncio.run(run())
        assert isinstance(failed, EngineError)
        assert "not finite numbers" in str(failed)
        assert [len(answer.token_ids) for answer in (first, *later)] == [100] + [20] * 6


def test_closing_the_iterator_frees_the_row_at_once(engine):
    async def freed_after() -> float:
        answers = [engine.generate(prompt(8, seed), Sampling(max_tokens=2000)) for seed in range(7)]
        await asyncio.gather(*[anext(answer) for answer in answers[:5]])
        waiting = asyncio.create_task(anext(answers[5]))  # all five rows are taken
        assert len(engine.running) == 5
        waiting.cancel()
        started = time.monotonic()
        for answer in answers:
            await answer.aclose()
        while engine.running:
            await asyncio.sleep(0.001)
        return time.monotonic() - started

    assert asyncio.run(freed_after()) < 5  # of 2000 tokens each


def test_a_client_whose_event_loop_ended_leaves_no_row_behind(engine):
    loop = asyncio.new_event_loop()
    answer = engine.generate(prompt(8), Sampling(max_tokens=2000))
    loop.run_until_complete(anext(answer))
    loop.close()
    deadline = time.monotonic() + 20
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.running == []


def test_a_failing_model_fails_everybody_and_says_so_once(tokenizer):
    model, died = random_model(tokenizer), threading.Event()
    engine = TransformersEngine(model, tokenizer, max_batch=2, on_fatal=died.set)

    async def run() -> list[Completion | BaseException]:
        jobs = [asyncio.create_task(complete(engine, prompt(8), Sampling(max_tokens=2000))) for _ in range(3)]
        await asyncio.sleep(0.2)

        def fail(*_):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        model.lm_head.register_forward_pre_hook(fail)
        return await asyncio.gather(*jobs, return_exceptions=True)

    assert [type(result) for result in asyncio.run(run())] == [EngineDied] * 3
    assert died.wait(30)
    assert not engine.healthy
    with pytest.raises(EngineDied, match="the engine died: RuntimeError: CUDA error"):
        engine.generate(prompt(3), Sampling())


def test_a_closed_engine_fails_what_is_under_way(tokenizer):
    engine = TransformersEngine(random_model(tokenizer), tokenizer)

    async def run() -> None:
        job = asyncio.create_task(complete(engine, prompt(8), Sampling(max_tokens=2000)))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDied, match="closed"):
            await job

    asyncio.run(run())


def test_an_unknown_engine_is_refused_by_name(tiny):
    with pytest.raises(ModelError, match="'llama' is not known; choose auto"):
        load_engine("llama", tiny)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU here can be used")
def test_a_process_with_a_gpu_that_cannot_be_used_says_so_and_does_not_go_on_without(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"was given a GPU, but PyTorch .* cannot use it \(.+\); compare nvidia-smi"):
        load_engine("auto", tiny, needs_gpu=True)


def test_auto_loads_the_tiny_model_and_says_what_it_chose(tiny, tokenizer, caplog):
    with caplog.at_level("INFO", logger="chatglm3.engines"):
        engine = load_engine("auto", tiny)
    assert "engine auto: transformers" in caplog.text
    answer = asyncio.run(complete(engine, tokenizer.prefix_ids, Sampling(max_tokens=4)))
    engine.close()
    assert 1 <= len(answer.token_ids) <= 4


def test_the_seam_needs_no_torch():
    code = "import sys, chatglm3.engines; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
