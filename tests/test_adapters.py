"""LoRA adapters: old ones on the official module names give the official logits, ours stay as they are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from chatglm3 import ModelError, load_model
from chatglm3.adapters import load_adapter, native_adapter
from chatglm3.checkpoint import read_config

BASE = "chatglm3/ckpt/nf4able-fp16-bin"
OLD = ["nf4able-fp16-bin-qkv-1", "nf4able-fp16-bin-qkv-dense-dense-dens-2"]
QKV_B = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_B.weight"


@torch.no_grad()
def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids).logits[0].float()


def copied(folder: Path, target: Path, tensors: dict | None = None, **fields: object) -> Path:
    """A copy of an adapter with other fields in its config, and other tensors."""
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (target / "adapter_config.json").write_text(json.dumps(config))
    held = load_file(folder / "adapter_model.safetensors")
    save_file(held if tensors is None else tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("name", OLD)
def test_old_adapters_give_the_official_logits(shared, name):
    golden = load_file(shared / f"chatglm3/lora/{name}/golden.safetensors")
    base = load_model(shared / BASE, dtype=torch.float32)
    plain = logits(base, golden["input_ids"])
    adapted = load_adapter(base, shared / f"chatglm3/lora/{name}")
    assert not adapted.training
    assert (logits(adapted, golden["input_ids"]) - golden["logits"]).abs().max() < 2e-5
    assert (plain - golden["logits"]).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    assert (logits(merged, golden["input_ids"]) - golden["logits"]).abs().max() < 1e-4


def test_a_swapped_split_would_not_pass(shared, tmp_path):
    """Keys' and values' rows of B the other way round."""
    folder = shared / "chatglm3/lora" / OLD[0]
    tensors = load_file(folder / "adapter_model.safetensors")
    swapped = {
        name: torch.cat([tensor[:64], tensor[96:], tensor[64:96]]) if "lora_B" in name else tensor
        for name, tensor in tensors.items()
    }
    golden = load_file(folder / "golden.safetensors")
    base = load_model(shared / BASE, dtype=torch.float32)
    adapted = load_adapter(base, copied(folder, tmp_path / "adapter", swapped))
    assert (logits(adapted, golden["input_ids"]) - golden["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", OLD)
def test_a_converted_adapter_can_be_saved_and_loaded_as_one_of_ours(shared, tmp_path, name):
    golden = load_file(shared / f"chatglm3/lora/{name}/golden.safetensors")
    load_adapter(load_model(shared / BASE, dtype=torch.float32), shared / f"chatglm3/lora/{name}").save_pretrained(
        tmp_path
    )
    again = load_adapter(load_model(shared / BASE, dtype=torch.float32), tmp_path)
    assert (logits(again, golden["input_ids"]) - golden["logits"]).abs().max() < 2e-5


def test_our_own_adapters_are_loaded_unchanged(shared, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    trained = get_peft_model(load_model(shared / BASE, dtype=torch.float32), config)
    trained.eval().save_pretrained(tmp_path)
    loaded = load_adapter(load_model(shared / BASE, dtype=torch.float32), tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(logits(loaded, ids), logits(trained, ids))
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in name]
    _, tensors = native_adapter(tmp_path, read_config(shared / BASE))
    assert all(
        torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    )


def test_an_old_adapter_file_in_pickle_form_is_read(shared, tmp_path):
    folder = copied(shared / "chatglm3/lora" / OLD[0], tmp_path / "adapter")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    golden = load_file(shared / f"chatglm3/lora/{OLD[0]}/golden.safetensors")
    adapted = load_adapter(load_model(shared / BASE, dtype=torch.float32), folder)
    assert (logits(adapted, golden["input_ids"]) - golden["logits"]).abs().max() < 2e-5


def test_an_adapter_sits_on_an_nf4_base(shared):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    golden = load_file(shared / f"chatglm3/lora/{OLD[0]}/golden.safetensors")
    base = load_model(shared / BASE, dtype=torch.bfloat16, quantization_config=nf4)
    without = torch.cosine_similarity(logits(base, golden["input_ids"]), golden["logits"], dim=-1).mean()
    adapted = load_adapter(base, shared / "chatglm3/lora" / OLD[0])
    assert torch.cosine_similarity(logits(adapted, golden["input_ids"]), golden["logits"], dim=-1).mean() > without


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING': only LORA"),
        ({"use_dora": True}, "use_dora True cannot be converted"),
        ({"bias": "lora_only"}, "bias 'lora_only' cannot be converted"),
        ({"modules_to_save": ["output_layer"]}, r"modules_to_save \['output_layer'\] cannot be converted"),
        ({"rank_pattern": {"dense": 2}}, r"rank_pattern \{'dense': 2\} cannot be converted"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' cannot be converted"),
        ({"r": 16}, "size mismatch.*: use the base it was trained on"),
    ],
)
def test_adapters_that_cannot_be_converted_are_refused_by_field(shared, tmp_path, fields, fault):
    folder = copied(shared / "chatglm3/lora" / OLD[0], tmp_path / "adapter", **fields)
    with pytest.raises(ModelError, match=fault) as error:
        load_adapter(load_model(shared / BASE), folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "fault"),
    [
        ("deep28-fp16-bin", "query_key_value.lora_B.weight has 128 rows, the base 64"),
        ("rope32k-fp16-bin", "query_key_value.lora_B.weight has 128 rows, the base 256"),
    ],
)
def test_old_adapters_of_another_base_are_refused(shared, base, fault):
    with pytest.raises(ModelError, match=fault):
        native_adapter(shared / "chatglm3/lora" / OLD[0], read_config(shared / "chatglm3/ckpt" / base))


def test_old_adapters_of_a_deeper_base_are_refused(shared):
    base = read_config(shared / BASE)
    base.num_hidden_layers = 2
    with pytest.raises(ModelError, match=r"the base has no place for .*layers.2"):
        native_adapter(shared / "chatglm3/lora" / OLD[0], base)


def test_our_adapters_of_another_base_are_refused(shared, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    get_peft_model(load_model(shared / BASE), config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"down_proj.lora_A.weight is for 192 features, the base has 172"):
        load_adapter(load_model(shared / "chatglm3/ckpt/small-fp16-bin"), tmp_path)
    shallow = read_config(shared / BASE)
    shallow.num_hidden_layers = 2
    with pytest.raises(ModelError, match=r"the base has no model.layers.2"):
        native_adapter(tmp_path, shallow)


def test_incomplete_adapters_are_named(shared, tmp_path):
    folder = shared / "chatglm3/lora" / OLD[0]
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[QKV_B]
    with pytest.raises(ModelError, match=r"layers.0.self_attn.*lora_B.* is only in adapter or base"):
        load_adapter(load_model(shared / BASE), copied(folder, tmp_path / "adapter", tensors))
    shutil.copyfile(folder / "adapter_config.json", tmp_path / "adapter_config.json")
    with pytest.raises(ModelError, match=r"holds no adapter_model.safetensors"):
        native_adapter(tmp_path, read_config(shared / BASE))
    with pytest.raises(ModelError, match=r"adapter_config.json is missing"):
        native_adapter(shared / BASE, read_config(shared / BASE))
