"""The official layout: what of it is translated, and what is refused by field."""

import json

import pytest
import torch
from model_folders import copied
from safetensors.torch import load_file

from chatglm3 import ModelError, load_model, official
from chatglm3.checkpoint import read_config
from chatglm3.weights import open_weights

SMALL = "chatglm3/ckpt/small-fp16-bin"


def test_the_real_model_has_the_layout_that_is_expected(shared):
    """Its config.json and index, without its weights."""
    config = read_config(shared / "chatglm3/official")
    index = json.loads((shared / "chatglm3/official/pytorch_model.bin.index.json").read_text())
    assert set(official.layout(config)) | {"transformer.rotary_pos_emb.inv_freq"} == set(index["weight_map"])
    size = sum(2 * torch.Size(tensor.shape).numel() for tensor in official.layout(config).values())
    assert size + 64 == index["metadata"]["total_size"]
    assert (
        config.to_diff_dict().items()
        >= {
            "vocab_size": 65024,
            "num_hidden_layers": 28,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "float16",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        }.items()
    )


@pytest.mark.parametrize("name", ["int4-fp16-bin", "int8-fp16-bin"])
def test_official_int4_and_int8_weights_are_dequantised_bit_by_bit(shared, name):
    folder = shared / "chatglm3/ckpt" / name
    recorded = load_file(shared / f"chatglm3/model/{name}.safetensors")
    expected = {key.removeprefix("dequant."): value for key, value in recorded.items() if key.startswith("dequant.")}
    config = read_config(folder)
    native = official.native_tensors(folder, open_weights(folder), config)
    assert len(expected) == 12
    for official_name, weight in expected.items():
        found = torch.cat([native[part] for part in official.layout(config)[official_name].parts])
        assert found.dtype == torch.float16
        assert torch.equal(found, weight)


def test_a_damaged_int4_matrix_is_refused(shared, tmp_path):
    folder = copied(shared / "chatglm3/ckpt/int4-fp16-bin", tmp_path / "model")
    weights, config = open_weights(folder), read_config(folder)
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    weights[name] = weights[name]._replace(tensor=weights[name].tensor[:, :-1])
    with pytest.raises(ModelError, match=r"dense_4h_to_h.weight is torch.int8 \(.*\), config.json wants \("):
        official.native_tensors(folder, weights, config)


GLM4 = {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "padded_vocab_size": 151552}


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"_name_or_path": "THUDM/chatglm2-6b"}, "this is ChatGLM2"),
        (GLM4, r"eos_token_id is \[151329, 151336, 151338\], as in GLM-4"),
        ({"padded_vocab_size": None}, "padded_vocab_size is missing, as in the first ChatGLM-6B"),
        ({"pre_seq_len": 128}, "pre_seq_len is 128, ChatGLM3-6B has None"),
        ({"add_bias_linear": True}, "add_bias_linear is True, ChatGLM3-6B has False"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"post_layer_norm": False}, "post_layer_norm is False"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"multi_query_attention": False}, "multi_query_attention is False"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"num_layers": None}, "num_layers is None, not a number"),
        ({"layernorm_epsilon": "small"}, "rms_norm_eps"),
        ({"torch_dtype": "float8"}, "torch_dtype is 'float8'"),
        ({"model_type": "llama"}, "model_type is 'llama', not 'chatglm' or 'glm'"),
        ({"num_layers": 4}, "no weight file holds transformer.encoder.layers.3."),
        ({"num_layers": 2}, "transformer.encoder.layers.2.* is not in the model of config.json"),
        ({"kv_channels": 32}, r"query_key_value.weight is torch.float16 \(128, 64\), config.json wants \(256, 64\)"),
    ],
)
def test_configs_of_other_models_are_refused_by_field(shared, tmp_path, fields, fault):
    folder = copied(shared / SMALL, tmp_path / "model", **fields)
    with pytest.raises(ModelError, match=fault) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_chatglm2_folder_is_known_by_its_tokenizer_code(shared, tmp_path):
    folder = copied(shared / SMALL, tmp_path / "model", _name_or_path="/models/mine")
    (folder / "tokenization_chatglm.py").write_text('special_tokens = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]')
    with pytest.raises(ModelError, match="this is ChatGLM2"):
        load_model(folder)
    (folder / "tokenization_chatglm.py").write_text('role_special_tokens = ["<|system|>", "<|user|>"]')
    load_model(folder)
