"""The native model against the official code: the same numbers from the same folders; broken folders are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_folders import copied, rewrite
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GlmForCausalLM

from chatglm3 import ModelError, load_model, load_tokenizer, official

# For models this small a second thread only costs: thirty times on a busy machine.
torch.set_num_threads(1)

SMALL = ["small-fp16-bin", "small-fp32-bin", "nf4able-fp16-bin", "rope32k-fp16-bin", "deep28-fp16-bin"]
"""Folders for which the official code was also run in half precision and on long prompts."""
WHOLE = [*SMALL, "full-fp16-bin"]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


class Golden:
    """What the official code computed for one folder."""

    def __init__(self, shared: Path, name: str) -> None:
        self.folder = shared / "chatglm3/ckpt" / name
        recorded = shared / "chatglm3/model" / name
        described = json.loads(recorded.with_suffix(".json").read_text(encoding="utf-8"))
        self.cases = described.get("cases", described)
        self.tensors = load_file(recorded.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def golden(shared: Path) -> Callable[[str], Golden]:
    return lambda name: Golden(shared, name)


@pytest.fixture(scope="module")
def models(shared: Path) -> Callable[[str], GlmForCausalLM]:
    """fp32 models by folder name, loaded once."""
    loaded: dict[str, GlmForCausalLM] = {}

    def model(name: str) -> GlmForCausalLM:
        if name not in loaded:
            loaded[name] = load_model(shared / "chatglm3/ckpt" / name, dtype=torch.float32)
        return loaded[name]

    return model


@torch.no_grad()
def logits(model: GlmForCausalLM, input_ids: list, **inputs: list) -> torch.Tensor:
    return model(torch.tensor(input_ids), **{name: torch.tensor(value) for name, value in inputs.items()}).logits


def plain_logits_differ_by(model: GlmForCausalLM, golden: Golden) -> float:
    differences = []
    for name in ("plain0", "plain1", "plain2", "plain3"):
        case = golden.cases[name]
        found = logits(model, [case["input_ids"]])[0]
        differences.append((found[case["rows"]] - golden.tensors[f"{name}.logits"]).abs().max().item())
    return max(differences)


# --- the same numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_the_official_ones(models, golden, name):
    assert plain_logits_differ_by(models(name), golden(name)) < 2e-5
    for plain in ("plain0", "plain1", "plain2", "plain3"):
        case = golden(name).cases[plain]
        assert logits(models(name), [case["input_ids"]])[0].argmax(-1).tolist() == case["argmax"]


@pytest.mark.parametrize("name", WHOLE)
def test_left_padding_changes_nothing(models, golden, name):
    case, tensors = golden(name).cases["leftpad"], golden(name).tensors
    found = logits(
        models(name), case["input_ids"], attention_mask=case["attention_mask"], position_ids=case["position_ids"]
    )
    assert (found[:, -1] - tensors["leftpad.last_logits"]).abs().max() < 2e-5
    for row, mask in enumerate(case["attention_mask"]):
        without_padding = found[row][torch.tensor(mask, dtype=torch.bool)]
        assert without_padding.argmax(-1).tolist() == case["argmax_nonpad"][row]
        if f"leftpad.row{row}.logits" in tensors:
            assert (without_padding - tensors[f"leftpad.row{row}.logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", WHOLE)
def test_64_greedy_tokens_with_a_cache_are_the_official_ones(models, golden, name):
    cases, tensors, model = golden(name).cases, golden(name).tensors, models(name)
    greedy = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    for case_name in ("greedy0", "greedy1"):
        case, width = cases[case_name], len(cases[case_name]["prompt"])
        out = model.generate(torch.tensor([case["prompt"]]), **greedy, output_logits=True, return_dict_in_generate=True)
        assert out.sequences[0, width:].tolist() == case["new_tokens"]
        highest = torch.stack([step.max() for step in out.logits])
        assert (highest - tensors[f"{case_name}.step_max_logit"]).abs().max() < 1e-4
    case = cases["greedy_leftpad"]
    ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"])
    assert model.generate(ids, attention_mask=mask, **greedy)[:, ids.shape[1] :].tolist() == case["new_tokens"]


@pytest.mark.parametrize(("name", "case"), [*[(name, "long4096") for name in SMALL], ("rope32k-fp16-bin", "long20000")])
def test_long_prompts_give_the_official_logits(models, golden, name, case):
    tensors, rows = golden(name).tensors, golden(name).cases[case]["rows"]
    with torch.no_grad():
        hidden = models(name).model(tensors[f"{case}.input_ids"].long()[None]).last_hidden_state[0, rows]
        assert (models(name).lm_head(hidden) - tensors[f"{case}.logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["train_nomask", "train_mask"])
@pytest.mark.parametrize("name", WHOLE)
def test_losses_and_gradients_are_the_official_ones(models, golden, name, case):
    recorded, tensors, model = golden(name).cases[case], golden(name).tensors, models(name)
    mask = recorded["attention_mask"]
    model.zero_grad()
    loss = model(
        torch.tensor(recorded["input_ids"]),
        attention_mask=None if mask is None else torch.tensor(mask),
        labels=torch.tensor(recorded["labels"]),
    ).loss
    loss.backward()
    assert abs(loss.item() - recorded["loss"]) < 2e-5
    native = dict(model.named_parameters())
    for official_name, (shape, parts) in official.layout(model.config).items():
        gradient = torch.cat([native[part].grad for part in parts])
        assert gradient.shape == shape
        assert gradient.norm().item() == pytest.approx(recorded["grad_norms"][official_name], rel=1e-4, abs=1e-6)
        if f"grad.{official_name}" in tensors:
            assert (gradient - tensors[f"grad.{official_name}"]).abs().max() < 1e-4
    model.zero_grad()


@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("name", SMALL)
def test_half_precision_is_as_near_to_fp32_as_the_official_code(golden, name, dtype, code):
    case, tensors = golden(name).cases["plain2"], golden(name).tensors
    exact, theirs = tensors["plain2.logits"], tensors[f"half.{code}.plain2.logits"]
    ours = logits(load_model(golden(name).folder, dtype=dtype), [case["input_ids"]])[0].float()
    assert (ours - exact).norm() < 1.3 * (theirs - exact).norm()


def test_the_recorded_chats_are_repeated_token_by_token(shared, models):
    cases = json.loads((shared / "chatglm3/chat_model_cases.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(shared / "chatglm3/ckpt/full-fp16-bin")
    assert set(tokenizer.stop_ids) == set(cases["eos_token_id"])
    for case in cases["chat"]:
        ids = torch.tensor([case["prompt_ids"]])
        limit = case["kwargs"].get("max_length", 512) - ids.shape[1]
        out = models("full-fp16-bin").generate(
            ids, max_new_tokens=limit, do_sample=False, eos_token_id=list(tokenizer.stop_ids), pad_token_id=0
        )
        assert out[0, ids.shape[1] :].tolist() == case["new_ids"]


@pytest.mark.parametrize("name", ["small-fp16", "small-fp32"])
def test_safetensors_and_bin_folders_are_the_same_model(shared, models, name):
    ours, twin = models(f"{name}-bin").state_dict(), models(f"{name}-safetensors").state_dict()
    assert list(ours) == list(twin)
    assert all(torch.equal(tensor, twin[key]) for key, tensor in ours.items())


# --- the comparison can fail --------------------------------------------------------------------------------------


def test_swapped_keys_and_values_would_not_pass(golden):
    right = golden("small-fp16-bin")
    model = load_model(right.folder, dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.k_proj, layer.self_attn.v_proj = layer.self_attn.v_proj, layer.self_attn.k_proj
    assert plain_logits_differ_by(model, right) > 0.1


@pytest.mark.parametrize("fields", [{"layernorm_epsilon": 1e-3}, {"rope_ratio": 2}])
def test_a_wrong_epsilon_or_rotation_would_not_pass(golden, tmp_path, fields):
    right = golden("small-fp16-bin")
    folder = copied(right.folder, tmp_path / "model", **fields)
    assert plain_logits_differ_by(load_model(folder, dtype=torch.float32), right) > 1e-3


# --- quantised folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4-fp16-bin", "int8-fp16-bin"])
def test_official_int4_and_int8_folders_give_the_official_logits(models, golden, name):
    found = logits(models(name), [golden(name).cases["input_ids"]])[0]
    assert (found - golden(name).tensors["plain.logits"]).abs().max() < 2e-5


def test_official_int8_in_half_precision_is_as_near_as_the_official_kernel(golden):
    right = golden("int8-fp16-bin")
    exact, theirs = right.tensors["plain.logits"], right.tensors["plain.logits_official_w8a16_fp16"]
    ours = logits(load_model(right.folder), [right.cases["input_ids"]])[0].float()
    assert (ours - exact).norm() < 1.3 * (theirs - exact).norm()


def test_nf4_follows_the_16_bit_model(golden):
    right = golden("nf4able-fp16-bin")
    model = load_model(right.folder, dtype=torch.bfloat16, quantization_config=NF4)
    assert model.is_loaded_in_4bit
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    found = logits(model, [right.cases["plain2"]["input_ids"]])[0].float()
    assert torch.cosine_similarity(found, right.tensors["plain2.logits"], dim=-1).mean() > 0.9


def test_gradients_after_an_evaluation_are_those_of_a_fresh_model(golden):
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in evaluation, and then loses gradients."""
    folder = golden("nf4able-fp16-bin").folder
    case = golden("nf4able-fp16-bin").cases["train_nomask"]
    ids, labels = torch.tensor(case["input_ids"]), torch.tensor(case["labels"])

    def gradient(evaluate_first: bool) -> torch.Tensor:
        model = load_model(folder, dtype=torch.bfloat16, quantization_config=NF4)
        if evaluate_first:
            logits(model.eval(), case["input_ids"])
        model.train()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=labels).loss.backward()
        return embedded.grad

    fresh = gradient(evaluate_first=False)
    assert fresh.norm() > 0
    assert torch.equal(gradient(evaluate_first=True), fresh)


# --- native folders -------------------------------------------------------------------------------------------------


def test_a_saved_bf16_folder_is_the_same_model_here_and_in_plain_transformers(golden, tmp_path):
    model = load_model(golden("small-fp16-bin").folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again, plain = load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.dtype, plain.dtype) == (torch.bfloat16, torch.bfloat16)
    ids = [golden("small-fp16-bin").cases["plain2"]["input_ids"]]
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.equal(logits(plain, ids), logits(model, ids))


@pytest.mark.parametrize("quantisation", [NF4, BitsAndBytesConfig(load_in_8bit=True)], ids=["nf4", "int8"])
def test_a_saved_quantised_folder_is_the_same_model_here_and_in_plain_transformers(golden, tmp_path, quantisation):
    right = golden("nf4able-fp16-bin")
    model = load_model(right.folder, dtype=torch.bfloat16, quantization_config=quantisation)
    model.save_pretrained(tmp_path)
    ids = [right.cases["plain2"]["input_ids"]]
    again = load_model(tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.cosine_similarity(logits(again, ids)[0].float(), right.tensors["plain2.logits"], dim=-1).mean() > 0.9
    # In training mode 4-bit layers use the kernel that load_model has them always use.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain.train(quantisation.load_in_4bit)
    assert torch.equal(logits(plain, ids), logits(model, ids))
    with pytest.raises(ModelError, match=r"config\.json has a quantization_config"):
        load_model(tmp_path, quantization_config=NF4)


@pytest.mark.parametrize("name", ["small-fp16-bin", "small-fp16-safetensors"])
def test_weights_of_the_wanted_dtype_stay_on_disk(shared, name):
    """The parameters are the mapped pages of the files, not copies."""
    folder = shared / "chatglm3/ckpt" / name
    model = load_model(folder)
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    ranges = [tuple(int(bound, 16) for bound in pair.split("-")) for pair in mapped]
    for parameter in model.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges)


@pytest.mark.parametrize(
    ("fields", "changes", "fault"),
    [
        ({"pad_token_id": 151329}, {}, "pad_token_id is 151329, as in GLM-4"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "quant_method is 'fp8', of which nothing is known"),
        ({}, {"model.norm.weight": None}, "no weight file holds model.norm.weight"),
        ({}, {"model.norm.weight": torch.zeros(2)}, r"model.norm.weight is \(2,\), config.json wants \(64,\)"),
        ({}, {"extra": torch.zeros(2)}, "extra is not in the model of config.json"),
        ({"num_hidden_layers": "three"}, {}, "num_hidden_layers"),
    ],
)
def test_native_folders_are_checked_too(golden, tmp_path, fields, changes, fault):
    load_model(golden("small-fp16-bin").folder).save_pretrained(tmp_path / "saved")
    folder = copied(tmp_path / "saved", tmp_path / "model", **fields)
    rewrite(folder / "model.safetensors", **changes)
    with pytest.raises(ModelError, match=fault) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
