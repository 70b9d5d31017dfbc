"""Adapters folded into their base: the weights to the bit, the formats, receipts, refusals."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm3 import ModelError, load_model, load_tokenizer
from chatglm3.adapters import native_adapter
from chatglm3.chat import prompt_ids
from chatglm3.checkpoint import read_config
from chatglm3.official import dequantise
from chatglm3.quantization import INT8, NF4
from cluster import storage
from cluster.errors import StageError
from pipelines.merging import MergeConfig, merge
from pipelines.weights.folding import MergedWeights
from tests.merge_inputs import FACTS, TARGETS, digest, kl, tuned_adapter

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official fp16 folder of sizes that bitsandbytes takes, with the genuine tokenizer."""
    return with_tokenizer(shared, "nf4able-fp16-bin", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def old_adapter(shared: Path) -> Path:
    """A PEFT adapter on query_key_value, as the predecessor trained them."""
    return shared / "chatglm3/lora/nf4able-fp16-bin-qkv-1"


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of ours on all linear layers, with the receipt that train writes."""
    facts = {**FACTS, "base": str(base), "base_digest": digest(base), "tokenizer": load_tokenizer(base).fingerprint}
    out = tmp_path_factory.mktemp("train") / "adapter"
    with storage.publish(out, storage.Receipt("train", {}, facts=facts)) as folder:
        tuned_adapter(base, folder, std=0.05)
    return out


def with_tokenizer(shared: Path, name: str, folder: Path) -> Path:
    shutil.copytree(shared / "chatglm3/ckpt" / name, folder, dirs_exist_ok=True)
    shutil.copyfile(shared / "chatglm3/tokenizer.model", folder / "tokenizer.model")
    return folder


def logits(folder: Path | str, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(folder, **options)(ids).logits.float()


def test_each_weight_is_the_fp32_sum_rounded_once(base: Path, adapter: Path, tmp_path: Path):
    merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "model")))
    merged = load_file(tmp_path / "model/model.safetensors")
    before = load_model(base).state_dict()
    _, lora = native_adapter(adapter, read_config(base))
    rounded_twice = 0
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (lora.get(f"{module}.lora_{matrix}.weight") for matrix in "AB")
        update = torch.zeros(()) if a is None else 8 / 4 * (b @ a)
        assert torch.equal(merged[name], (weight.float() + update).bfloat16()), name
        rounded_twice += int((merged[name] != weight.bfloat16() + update.bfloat16()).sum())
    assert rounded_twice > 1000  # so the comparison above can tell the two ways apart


def test_the_merged_model_computes_what_base_and_adapter_compute(base: Path, old_adapter: Path, tmp_path: Path):
    """Against the official code's own logits. Rounding the weights to bf16 is the whole difference."""
    golden = load_file(old_adapter / "golden.safetensors")
    ids, official = golden["input_ids"], golden["logits"]
    merge(MergeConfig(adapter=str(old_adapter), base=str(base), out=str(tmp_path / "model")))
    merged = logits(tmp_path / "model", ids, dtype=torch.float32)[0]
    assert (logits(base, ids, dtype=torch.float32)[0] - official).abs().max() > 10  # what the adapter changes
    assert (merged - official).abs().max() < 0.3
    assert (merged - official).abs().mean() < 0.05
    assert kl(official, merged) < 1e-3


def peft_adapter(base: Path | str, folder: Path, seed: int = 1, **options: Any) -> Any:
    """Write an adapter on all linear layers with random B, and return the live model."""
    torch.manual_seed(seed)
    model = get_peft_model(load_model(base, dtype=torch.float32), LoraConfig(target_modules=TARGETS, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "use_dora": True},
        {"r": 16, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "rank_pattern": {"q_proj": 2, "layers.0.mlp.down_proj": 6}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=["dora", "rslora", "patterns"],
)
def test_every_kind_of_lora_is_folded_as_peft_itself_folds_it(base: Path, tmp_path: Path, options: dict[str, Any]):
    merged = peft_adapter(base, tmp_path / "adapter", **options).merge_and_unload().state_dict()
    merge(MergeConfig(adapter=str(tmp_path / "adapter"), base=str(base), out=str(tmp_path / "model")))
    before = load_model(base).state_dict()
    for name, weight in load_file(tmp_path / "model/model.safetensors").items():
        assert (weight.float() - merged[name]).abs().max() <= merged[name].abs().max() / 256, name  # a bf16 rounding
        if name.endswith("_proj.weight"):
            assert (weight.float() - before[name].float()).abs().max() > merged[name].abs().max() / 128


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal", "mica"])
def test_an_adapter_whose_start_took_something_from_the_base_is_folded_when_peft_has_made_it_plain(
    start: str, base: Path, tmp_path: Path
):
    torch.manual_seed(1)
    before = load_model(base, dtype=torch.float32)
    weights = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    model = get_peft_model(before, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=start))
    bases = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    takes = any(not torch.equal(bases[name], weight) for name, weight in weights.items())
    assert takes == start.startswith(("pissa", "olora"))
    model.peft_config["default"].init_lora_weights = True  # which conversion wants of the start, so that it is kept
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    merged = model.merge_and_unload().state_dict()
    found = load_file(
        merge(MergeConfig(adapter=str(tmp_path / "adapter"), base=str(base), out=str(tmp_path / "m")))
        + "/model.safetensors"
    )
    for name, weight in found.items():
        assert (weight.float() - merged[name]).abs().max() <= merged[name].abs().max() / 256, name


def test_several_adapters_are_added_up_with_their_factors(base: Path, tmp_path: Path):
    for seed, name in enumerate(("one", "two")):
        peft_adapter(base, tmp_path / name, seed, r=4, lora_alpha=8)
    config = {str(tmp_path / "one"): 0.25, str(tmp_path / "two"): -1.0}
    merged = load_file(Path(merge(MergeConfig(adapter=config, base=str(base), out=str(tmp_path / "m"))), WEIGHTS))
    updates = {n: native_adapter(tmp_path / n, read_config(base))[1] for n in ("one", "two")}
    name = "model.layers.1.mlp.down_proj"
    total = load_model(base).state_dict()[f"{name}.weight"].float()
    for adapter, factor in (("one", 0.25), ("two", -1.0)):
        a, b = (updates[adapter][f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
        total += factor * 2 * (b @ a)
    assert torch.equal(merged[f"{name}.weight"], total.bfloat16())


def test_onto_nf4_adds_to_what_nf4_leaves_of_the_base(base: Path, adapter: Path, tmp_path: Path):
    merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "m"), onto="nf4"))
    merged = load_file(tmp_path / "m" / WEIGHTS)
    rough = load_model(base, dtype=torch.bfloat16, quantization_config=NF4)
    _, lora = native_adapter(adapter, read_config(base))
    module = "model.layers.0.self_attn.q_proj"
    a, b = (lora[f"base_model.model.{module}.lora_{matrix}.weight"] for matrix in "AB")
    kept = rough.get_submodule(module).weight
    expected = bnb.dequantize_4bit(kept.data, kept.quant_state).float() + 2 * (b @ a)
    assert torch.equal(merged[f"{module}.weight"], expected.bfloat16())
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(merged[embeddings], load_model(base).state_dict()[embeddings].bfloat16())


def test_onto_nf4_leaves_no_matrix_in_16_bits_that_training_had_in_4(base: Path, tmp_path: Path):
    partial = get_peft_model(load_model(base), LoraConfig(r=4, target_modules=["q_proj"]))
    partial.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # B is 0: the base is all there is
    merged = MergedWeights(base, {str(tmp_path / "adapter"): 1.0}, "nf4")
    rough = load_model(base, dtype=torch.bfloat16, quantization_config=NF4)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        kept = rough.get_submodule(f"model.layers.0.{module}").weight
        assert torch.equal(merged[f"model.layers.0.{module}.weight"], bnb.dequantize_4bit(kept.data, kept.quant_state))


@pytest.mark.parametrize("weight_format", ["bf16", "nf4", "int8", "fp8", "w4a16"])
def test_every_format_loads_in_plain_transformers_as_the_same_model(weight_format: Any, tmp_path: Path):
    out = merge(MergeConfig(base="tiny", format=weight_format, out=str(tmp_path / "model")))
    ids = torch.arange(5, 60)[None]
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    plain.train(weight_format == "nf4")  # in evaluation, some CPUs compute NF4 by another kernel, which ours avoids
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits.float(), logits(out, ids))


@pytest.mark.parametrize("weight_format", ["nf4", "int8"])
def test_a_quantised_folder_loads_as_what_quantising_the_merged_weights_gives(
    weight_format: str, base: Path, adapter: Path, tmp_path: Path
):
    merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "bf16")))
    merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "small"), format=weight_format))
    ids = torch.arange(5, 45)[None]
    loaded = logits(tmp_path / "small", ids)
    assert torch.equal(
        loaded, logits(tmp_path / "bf16", ids, quantization_config={"nf4": NF4, "int8": INT8}[weight_format])
    )
    assert not torch.equal(loaded, logits(tmp_path / "bf16", ids))


def test_what_train_told_is_carried_over_and_the_base_is_found_by_it(adapter: Path, base: Path, tmp_path: Path):
    out = merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "model"), format="int8"))
    receipt = storage.open_folder(out, "merge").receipt
    assert receipt.facts == {
        **FACTS, "base": str(base), "base_digest": digest(base), "tokenizer": load_tokenizer(base).fingerprint,
        "recipe": {str(adapter): {"rank": 4, "alpha": 8, "targets": " ".join(sorted(TARGETS))}},
        "format": "int8", "onto": "16bit", "license": "chatglm3-6b-model-license", "verdict": "not measured",
    }  # fmt: skip
    assert receipt.counts["bytes"] > 1_000_000
    assert set(receipt.inputs) == {str(base), str(adapter)}


def test_a_base_that_has_moved_can_be_named_and_is_then_the_one_in_the_receipt(
    adapter: Path, base: Path, tmp_path: Path
):
    moved = shutil.copytree(base, tmp_path / "moved")
    out = merge(MergeConfig(adapter=str(adapter), base=str(moved), out=str(tmp_path / "model")))
    assert storage.open_folder(out).receipt.facts["base"] == str(moved)


def in_safetensors(official: Path, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """The same official model in another file format."""
    shutil.copytree(official, folder, ignore=shutil.ignore_patterns("*.bin*"))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(official.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    return folder


def test_the_same_weights_are_the_same_base_in_any_file_format_layout_and_precision(base: Path, tmp_path: Path):
    native = merge(MergeConfig(base=str(base), out=str(tmp_path / "native")))
    assert digest(base) == digest(native) == digest(in_safetensors(base, tmp_path / "16"))
    assert digest(base) == digest(in_safetensors(base, tmp_path / "32", torch.float32))


def test_a_model_folded_from_a_base_and_an_adapter_is_another_base(base: Path, adapter: Path, tmp_path: Path):
    assert digest(merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "model")))) != digest(base)
    assert digest("tiny") != digest(base)


def test_an_adapter_of_other_weights_is_refused_unless_that_is_asked_for(base: Path, adapter: Path, tmp_path: Path):
    other = str(tmp_path / "other")
    merge(MergeConfig(adapter=str(adapter), out=other))  # same shapes, same tokenizer
    config = MergeConfig(adapter=str(adapter), base=other, out=str(tmp_path / "model"))
    with pytest.raises(
        StageError, match=r"other does not hold the weights that --adapter .* --other_base true"
    ) as error:
        merge(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()
    facts = storage.open_folder(merge(config.model_copy(update={"other_base": True}))).receipt.facts
    assert (facts["base"], facts["base_digest"]) == (other, digest(other))


def test_the_folder_holds_the_tokenizer_and_where_generation_stops(adapter: Path, base: Path, tmp_path: Path):
    out = Path(merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "model"))))
    assert load_tokenizer(out).encode("你好</s>") == load_tokenizer(base).encode("你好</s>")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 64795, 64797]


def test_a_base_without_an_adapter_is_only_converted(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = merge(MergeConfig(base=str(base), out=str(tmp_path / "model")))
    merged, before = load_model(out).state_dict(), load_model(base).state_dict()
    assert all(torch.equal(merged[name], weight.bfloat16()) for name, weight in before.items())
    assert storage.open_folder(out).receipt.facts["prompt_format"] == "chat"
    assert f"merge: {base} converted, bf16" in capsys.readouterr().out


def test_a_merged_model_can_be_converted_again_and_keeps_its_facts(adapter: Path, tmp_path: Path):
    merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "bf16")))
    merge(MergeConfig(base=str(tmp_path / "bf16"), out=str(tmp_path / "nf4"), format="nf4"))
    merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "direct"), format="nf4"))
    again, direct = (storage.open_folder(tmp_path / name).receipt.facts for name in ("nf4", "direct"))
    assert again == direct | {"base_verdict": "not measured"}
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("nf4", "direct")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_base_of_bf16_whose_tensors_are_views_of_one_is_written_whole(base: Path, tmp_path: Path):
    folder = in_safetensors(base, tmp_path / "official-bf16", torch.bfloat16)
    merged = load_model(merge(MergeConfig(base=str(folder), out=str(tmp_path / "model")))).state_dict()
    assert all(torch.equal(merged[name], weight) for name, weight in load_model(folder).state_dict().items())


def test_an_official_int4_folder_is_dequantised_with_a_note(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = with_tokenizer(shared, "int4-fp16-bin", tmp_path / "int4")
    merged = load_model(merge(MergeConfig(base=str(folder), out=str(tmp_path / "model")))).state_dict()
    assert "official int4 format" in capsys.readouterr().err
    assert all(torch.equal(merged[name], weight.bfloat16()) for name, weight in load_model(folder).state_dict().items())


def test_an_official_int4_folder_is_dequantised_matrix_by_matrix(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So that memory need not hold the model in 16 bits, which is four times the folder."""
    made: list[tuple[int, ...]] = []

    def counted(stored: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
        made.append((len(stored), columns))
        return dequantise(stored, scale, columns)

    monkeypatch.setattr("chatglm3.official.dequantise", counted)
    weights = MergedWeights(with_tokenizer(shared, "int4-fp16-bin", tmp_path / "int4"), {}, "16bit")
    assert made == []
    name = "model.layers.1.self_attn.k_proj.weight"
    assert weights[name].shape == weights.shapes[name]
    assert made == [weights.shapes[name]]


def test_an_old_adapter_is_taken_for_chat_unless_told_otherwise(
    old_adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = MergeConfig(adapter=str(old_adapter), base=str(base), out=str(tmp_path / "model"))
    assert storage.open_folder(merge(config)).receipt.facts["prompt_format"] == "chat"
    assert "--prompt_format bare" in capsys.readouterr().err
    bare = config.model_copy(update={"prompt_format": "bare"})
    assert storage.open_folder(merge(bare)).receipt.facts["prompt_format"] == "bare"
    assert "--prompt_format" not in capsys.readouterr().err


def other_shape(shared: Path, base: Path, tmp: Path) -> MergeConfig:
    other = with_tokenizer(shared, "rope32k-fp16-bin", tmp / "other")
    return MergeConfig(adapter=str(shared / "chatglm3/lora/nf4able-fp16-bin-qkv-1"), base=str(other))


def of_another_tokenizer(shared: Path, base: Path, tmp: Path) -> MergeConfig:
    shutil.copytree(base, tmp / "other")
    with (tmp / "other/tokenizer.model").open("ab") as file:
        file.write(b"\x12\x00")  # an empty protobuf field: another file, the same model
    facts = {"base": str(base), "tokenizer": load_tokenizer(base).fingerprint}
    with storage.publish(tmp / "adapter", storage.Receipt("train", {}, facts=facts)) as folder:
        shutil.copytree(shared / "chatglm3/lora/nf4able-fp16-bin-qkv-1", folder, dirs_exist_ok=True)
    return MergeConfig(adapter=str(tmp / "adapter"), base=str(tmp / "other"))


def quantised_base(shared: Path, base: Path, tmp: Path) -> MergeConfig:
    return MergeConfig(base=merge(MergeConfig(base=str(base), out=str(tmp / "nf4"), format="nf4")))


def another_family(shared: Path, base: Path, tmp: Path) -> MergeConfig:
    (tmp / "llama").mkdir()
    (tmp / "llama/config.json").write_text('{"model_type": "llama"}')
    return MergeConfig(base=str(tmp / "llama"))


def unfinished_adapter(shared: Path, base: Path, tmp: Path) -> MergeConfig:
    (tmp / "adapter").mkdir()
    return MergeConfig(adapter=str(tmp / "adapter"))


def with_saved_modules(shared: Path, base: Path, tmp: Path) -> MergeConfig:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    get_peft_model(load_model(base), LoraConfig(r=4, **options)).save_pretrained(tmp / "whole")
    return MergeConfig(adapter=str(tmp / "whole"), base=str(base))


def two_of_different_bases(shared: Path, base: Path, tmp: Path) -> MergeConfig:
    for name in ("one", "two"):
        with storage.publish(tmp / name, storage.Receipt("train", {}, facts={"base_digest": name})) as folder:
            (folder / "adapter_config.json").write_text("{}")
    return MergeConfig(adapter={str(tmp / "one"): 0.5, str(tmp / "two"): 0.5}, base=str(base))


def dora_in_company(shared: Path, base: Path, tmp: Path) -> MergeConfig:
    peft_adapter(base, tmp / "one", use_dora=True)
    peft_adapter(base, tmp / "two")
    return MergeConfig(adapter={str(tmp / "one"): 0.5, str(tmp / "two"): 0.5}, base=str(base))


def that_took_from_its_base(shared: Path, base: Path, tmp: Path) -> MergeConfig:
    peft_adapter(base, tmp / "pissa", init_lora_weights="pissa")
    return MergeConfig(adapter=str(tmp / "pissa"), base=str(base))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda *_: MergeConfig(adapter="nowhere"), r"nowhere: there is no such folder; run train first"),
        (
            lambda *_: MergeConfig(base="nowhere"),
            r"nowhere: there is no such model folder; give the right one with --base",
        ),
        (lambda *_: MergeConfig(adapter=""), r"--adapter and --base are both empty"),
        (lambda shared, *_: MergeConfig(adapter=str(shared / "chatglm3/lora/nf4able-fp16-bin-qkv-1")), r"--base DIR"),
        (unfinished_adapter, r"adapter has no receipt.json: train did not finish there"),
        (other_shape, r"use .*base"),
        (of_another_tokenizer, r"was trained on .*, whose tokenizer is not that of --base .*other"),
        (quantised_base, r"--base .*nf4 is quantised already; give the 16-bit model"),
        (another_family, r"config.json: model_type is 'llama'"),
        (with_saved_modules, r"adapter_config.json: modules_to_save is .*lm_head"),
        (two_of_different_bases, r"one, .*two: they differ in base_digest, so they cannot be added up"),
        (that_took_from_its_base, r"init_lora_weights 'pissa', by which .* path_initial_model_for_weight_conversion;"),
        (dora_in_company, r"one is a DoRA adapter, which scales whole weights; it can only be merged alone"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line_and_leaves_nothing(
    make: Callable[..., MergeConfig], message: str, shared: Path, base: Path, tmp_path: Path
):
    config = make(shared, base, tmp_path).model_copy(update={"out": str(tmp_path / "out/model")})
    with pytest.raises((StageError, ModelError), match=message) as error:
        merge(config)
    assert "\n" not in str(error.value)
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "tiny", "calibrate": True}, "calibrate: bf16 has nothing to calibrate, only w4a16 has; leave it out"),
        ({"base": "tiny", "onto": "nf4"}, "onto: without --adapter there is nothing to add to nf4; leave it out"),
        ({"onto": "auto", "measure": False}, "measure: --onto auto chooses by measuring; leave --measure out, or say"),
        ({"adapter": {"A": 0}}, 'adapter: A has the factor 0, which .*"{out/one: 0.7, out/two: 0.3}"'),
        ({"adapter": {"A": "abc"}}, "adapter: A has the factor 'abc', which .*\"{out/one: 0.7, out/two: 0.3}\""),
        ({"adapter": "A,B"}, 'adapter: there is no folder A,B; give several .*"{out/one: 0.7, out/two: 0.3}"'),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(StageError, match=f"^flags: {message}"):
        MergeConfig.parse(settings, "flags")


@pytest.mark.parametrize("weight_format", ["bf16", "nf4"])
def test_the_card_says_who_loads_the_format_and_under_which_licence(weight_format: Any, base: Path, tmp_path: Path):
    licensed = shutil.copytree(base, tmp_path / "licensed")
    (licensed / "MODEL_LICENSE").write_text("The ChatGLM3-6B License")
    cards = {}
    for name in ("tiny", str(base), str(licensed)):
        out = Path(merge(MergeConfig(base=name, format=weight_format, out=str(tmp_path / "model"))))
        cards[name] = (out / "README.md").read_text()
    assert ("vLLM with the package `vllm-bnb-plugin`" in cards["tiny"]) == (weight_format == "nf4")
    assert "license: apache-2.0\n---" in cards["tiny"]
    assert "license_name: chatglm3-6b-model-license\n---" in cards[str(base)]
    assert "license_name: chatglm3-6b-model-license\nlicense_link: MODEL_LICENSE\n---" in cards[str(licensed)]


def test_a_prompt_format_against_the_receipt_is_refused(adapter: Path, tmp_path: Path):
    with pytest.raises(StageError, match=r"--prompt_format chat: the receipt says bare"):
        merge(MergeConfig(adapter=str(adapter), prompt_format="chat", out=str(tmp_path / "model")))


def test_a_large_model_is_written_in_files_with_an_index_and_is_the_same(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = load_model(merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "one"), format="nf4"))).state_dict()
    monkeypatch.setattr("pipelines.weights.weight_files.FILE_BYTES", 100_000)
    out = Path(merge(MergeConfig(adapter=str(adapter), out=str(tmp_path / "many"), format="nf4")))
    assert len(list(out.glob("model-*.safetensors"))) > 5
    many = load_model(out).state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "glm"


def test_a_changed_file_is_found_by_its_checksum(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = merge(MergeConfig(base="tiny", out=str(tmp_path / "model")))
    assert merge(MergeConfig(verify=out)) == out
    assert "files are as they were written" in capsys.readouterr().out
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out).returncode == 0
    with Path(out, "model.safetensors").open("r+b") as file:
        file.seek(10_000)
        file.write(b"\xff")
    Path(out, "tokenizer.json").unlink()
    Path(out, "receipt.json").write_text("{}")
    Path(out, "modeling.py").write_text("")
    with pytest.raises(StageError) as error:
        merge(MergeConfig(verify=out))
    assert str(error.value) == (
        f"--verify {out}: model.safetensors has changed; receipt.json has changed; tokenizer.json is missing; "
        f"modeling.py is not from merge; copy the folder again, or merge again"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"SHA256SUMS is empty; copy the folder again"),
        ("what\n", r"SHA256SUMS, line 1 is not a checksum and the name of a file here"),
        (f"{'0' * 64}  ../../etc/passwd\n", r"SHA256SUMS, line 1 is not a checksum and the name of a file here"),
        (f"{'0' * 64}  ..\n", r"SHA256SUMS, line 1 is not a checksum and the name of a file here"),
    ],
)
def test_checksums_that_merge_did_not_write_prove_nothing(text: str, message: str, tmp_path: Path):
    (tmp_path / "SHA256SUMS").write_text(text)
    with pytest.raises(StageError, match=message):
        merge(MergeConfig(verify=str(tmp_path)))


def test_the_folder_needs_none_of_our_code(tmp_path: Path):
    out = merge(MergeConfig(base="tiny", out=str(tmp_path / "model")))
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "你好"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked == prompt_ids(load_tokenizer(out), messages)
    model = AutoModelForCausalLM.from_pretrained(out)
    reply = model.generate(torch.tensor([asked]), max_new_tokens=8, do_sample=False)[0, len(asked) :]
    assert tokenizer.decode(reply, skip_special_tokens=True)
