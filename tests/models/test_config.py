"""Models from their id, from a small file and from a Hugging Face config.json; what is wrong is named in one line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from models.config import MODELS, ModelConfig, load_model

# What the published config.json files say about the shape (other keys left out, one kept to be ignored).
OPT_30B = {
    "model_type": "opt", "hidden_size": 7168, "num_hidden_layers": 48, "num_attention_heads": 56, "ffn_dim": 28672,
    "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 7168, "activation_function": "relu",
}  # fmt: skip
LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN_32B = {
    "model_type": "qwen2", "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40,
    "num_key_value_heads": 8, "intermediate_size": 27648, "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip
CHATGLM = {
    "model_type": "chatglm", "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
    "multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 13696, "padded_vocab_size": 65024,
    "seq_length": 32768,
}  # fmt: skip
OWN = {key: value for key, value in asdict(MODELS["tiny-llama"]).items() if key != "model_id"}


def write(folder: Path, content: Any, name: str = "config.json") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_by_id(name: str) -> None:
    assert load_model(name) is MODELS[name]
    assert MODELS[name].model_id == name


@pytest.mark.parametrize(
    ("raw", "same_as"),
    [(OPT_30B, "opt-30b"), (LLAMA_3_8B, "llama-3-8b"), (LLAMA_2_7B, "llama-2-7b"), (QWEN_32B, "qwen2.5-32b")],
)
def test_hugging_face_config_gives_the_built_in_shape(raw: dict[str, Any], same_as: str, tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    path = write(folder, raw)
    expected = replace(MODELS[same_as], model_id="some-model")
    assert load_model(path) == expected
    assert load_model(str(folder)) == expected  # the folder of a downloaded model will do
    assert load_model(write(tmp_path, raw, "other.json")).model_id == "other"


def test_chatglm_names_and_shared_heads(tmp_path: Path) -> None:
    config = load_model(write(tmp_path, CHATGLM))
    assert (config.family, config.num_layers, config.num_kv_heads, config.ffn_size) == ("glm", 28, 2, 13696)
    assert (config.vocab_size, config.max_positions, config.gated) == (65024, 32768, True)
    unshared = load_model(write(tmp_path, CHATGLM | {"multi_query_attention": False}))
    assert unshared.num_kv_heads == 32


def test_head_dim_is_taken_when_given(tmp_path: Path) -> None:
    assert load_model(write(tmp_path, LLAMA_3_8B | {"head_dim": 64})).head_dim == 64


def test_null_stands_for_what_follows_from_the_rest(tmp_path: Path) -> None:
    config = load_model(write(tmp_path, LLAMA_2_7B | {"head_dim": None, "num_key_value_heads": None}))
    assert (config.head_dim, config.num_kv_heads) == (128, 32)


def test_own_file(tmp_path: Path) -> None:
    assert load_model(write(tmp_path, OWN, "mine.json")) == replace(MODELS["tiny-llama"], model_id="mine")
    assert load_model(write(tmp_path, OWN | {"model_id": "named"}, "mine.json")).model_id == "named"


BROKEN: list[tuple[Any, str]] = [
    ("{", "not a readable JSON model file"),
    ("[1, 2]", "expected a JSON object that describes a model, got list"),
    ({"hidden_size": 8}, "model_type is None; supported: opt"),
    ({"model_type": ["llama"]}, "model_type is ['llama']; supported: opt"),
    ({"model_type": "mamba"}, "model_type is 'mamba'; supported: opt"),
    ({k: v for k, v in LLAMA_2_7B.items() if k != "vocab_size"}, "field 'vocab_size' is missing"),
    ({k: v for k, v in OPT_30B.items() if k != "ffn_dim"}, "field 'ffn_dim' is missing"),
    (LLAMA_2_7B | {"num_attention_heads": 0}, "num_attention_heads 0 and hidden_size 4096 must be whole numbers"),
    (LLAMA_2_7B | {"hidden_size": "4096"}, "num_attention_heads 32 and hidden_size '4096' must be whole numbers"),
    (LLAMA_2_7B | {"num_attention_heads": 24}, "hidden_size 4096 cannot be divided over 24 heads; give head_dim"),
    (LLAMA_2_7B | {"num_hidden_layers": None}, "num_layers is None; it must be a whole number, 1 or more"),
    (LLAMA_2_7B | {"num_key_value_heads": 5}, "32 heads cannot share 5 key-value heads evenly"),
    (LLAMA_2_7B | {"vocab_size": -1}, "vocab_size is -1; it must be a whole number, 0 (no embedding) or more"),
    (LLAMA_2_7B | {"vocab_size": True}, "vocab_size is True; it must be a whole number, 0 (no embedding) or more"),
    (LLAMA_2_7B | {"num_key_value_heads": 0}, "num_kv_heads is 0; it must be a whole number, 1 or more"),
    (LLAMA_2_7B | {"head_dim": 0}, "head_dim is 0; it must be a whole number, 1 or more"),
    (LLAMA_2_7B | {"num_hidden_layers": 10**9}, "num_layers is 1000000000; it must be at most 1000"),
    (OWN | {"ffn_size": 10**18}, "ffn_size is 1000000000000000000; it must be at most 1000000"),
    (OWN | {"max_positions": 10**100}, "max_positions is 1" + 59 * "0" + "...; it must be at most 100000000"),
    ('{"hidden_size": ' + 5000 * "9" + "}", "not a readable JSON model file (Exceeds the limit"),
    (100_000 * "[", "not a readable JSON model file (nested too deeply)"),
    (OPT_30B | {"word_embed_proj_dim": 512}, "word_embed_proj_dim differs from hidden_size, which is not supported"),
    (OWN | {"layers": 3}, "unknown field 'layers'; known: family"),
    ({k: v for k, v in OWN.items() if k != "gated"}, "field 'gated' is missing"),
    (OWN | {"family": "bert"}, "family is 'bert'; it must be one of opt, glm, llama"),
    (OWN | {"gated": "no"}, "gated is 'no'; it must be true or false"),
    (OWN | {"ffn_size": 1.5}, "ffn_size is 1.5; it must be a whole number, 1 or more"),
    (OWN | {"num_heads": True}, "num_heads is True; it must be a whole number, 1 or more"),
]


@pytest.mark.parametrize(("content", "says"), BROKEN, ids=[says[:40] for _, says in BROKEN])
def test_broken_files_are_named_in_one_line(content: Any, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"model\.json: not a readable JSON model file"):
        load_model(str(path))


def test_unknown_ids_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model 'gpt-5' is neither a file nor one of: opt-30b, .*glm-130b"):
        load_model("gpt-5")
    with pytest.raises(ValueError, match="is neither a file nor one of"):
        load_model(str(tmp_path))  # a folder without a config.json


def test_a_config_checks_itself() -> None:
    with pytest.raises(ValueError, match="tiny-opt: head_dim is 0; it must be a whole number, 1 or more"):
        replace(MODELS["tiny-opt"], head_dim=0)
    assert isinstance(replace(MODELS["tiny-opt"], vocab_size=0), ModelConfig)
