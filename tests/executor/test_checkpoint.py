"""Checkpoints: equal to Hugging Face's own forward pass, and to a plain DeepNorm model; bad ones name what is wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from executor.checkpoint import INDEX, load_checkpoint
from models.config import ModelConfig, load_model
from models.transformer import Layout

safetensors_torch = pytest.importorskip("safetensors.torch", reason="checkpoint tests need safetensors")

LAYOUTS = [Layout(), Layout(2, 1), Layout(2, 2), Layout(4, 1)]
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 160,
         "max_position_embeddings": 48, "initializer_range": 0.2}  # fmt: skip


def hugging_face(kind: str, folder: Path, **changes: Any) -> Any:
    """A tiny random model of Hugging Face, saved to the folder; norms and biases made random too."""
    transformers = pytest.importorskip("transformers", reason="comparison with Hugging Face needs transformers")
    made: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "opt": (transformers.OPTConfig, transformers.OPTForCausalLM,
                {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM,
                  {"intermediate_size": 96, "num_key_value_heads": 2}),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM,
                  {"intermediate_size": 96, "num_key_value_heads": 2}),
    }  # fmt: skip
    config_class, model_class, more = made[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(config_class(**SMALL | more | changes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder, **({"max_shard_size": "100KB"} if kind == "llama" else {}))
    return model


def expected_logits(model: Any, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Each sequence by itself, so that no padding is involved."""
    with torch.inference_mode():
        return torch.stack([model(row[None, :n]).logits[0, -1] for row, n in zip(ids, lengths, strict=True)])


def run(folder: Path, layout: Layout, batch: Any, make_ranks: Any) -> torch.Tensor:
    config = load_model(str(folder))
    weights = [load_checkpoint(folder, config, layout, r, "cpu", torch.float32) for r in range(layout.num_ranks)]
    logits: torch.Tensor = make_ranks(config, layout, weights).run(batch)
    return logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("opt", {}),
        ("opt", {"enable_bias": False}),
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ],
    ids=["opt", "opt-no-bias", "llama-gqa-sharded-file", "llama-tied-biased", "qwen2-rope-theta"],
)
def test_logits_equal_hugging_face(
    kind: str, changes: dict[str, Any], tmp_path: Path, make_ranks: Any, make_batch: Any
) -> None:
    model = hugging_face(kind, tmp_path, **changes)
    assert (tmp_path / INDEX).is_file() == (kind == "llama")
    batch = make_batch(load_model(str(tmp_path)))
    expected = expected_logits(model, batch.ids, batch.lengths)
    assert expected.std() > 0.1
    for layout in LAYOUTS:
        found = run(tmp_path, layout, batch, make_ranks)
        assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


GLM: dict[str, Any] = {"model_id": "small-glm", "family": "glm", "num_layers": 3, "hidden_size": 48, "num_heads": 4,
                       "num_kv_heads": 4, "head_dim": 12, "ffn_size": 80, "gated": True, "vocab_size": 96,
                       "max_positions": 32}  # fmt: skip


def save_glm(folder: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, ffn = 48, 80
    shapes = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "out": (hidden, hidden),
              "gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}  # fmt: skip
    tensors = {"embedding.weight": torch.randn(96, hidden, generator=generator)}
    for layer in range(3):
        for name, shape in shapes.items():
            tensors[f"layers.{layer}.{name}.weight"] = torch.randn(*shape, generator=generator) * shape[1] ** -0.5
            tensors[f"layers.{layer}.{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.3
    for norm in (*(f"layers.{i}.{n}" for i in range(3) for n in ("attn_norm", "ffn_norm")), "final_norm"):
        tensors[f"{norm}.weight"] = 1 + 0.3 * torch.randn(hidden, generator=generator)
        tensors[f"{norm}.bias"] = 0.3 * torch.randn(hidden, generator=generator)
    safetensors_torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(GLM))
    return tensors


def plain_glm(t: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """One sequence through a textbook post-norm model: x = LN(alpha x + f(x)), with explicit attention scores."""
    heads, dim, alpha = 4, 12, (2 * 3) ** 0.5

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        # Each pair (i, i + dim / 2) is a complex number, turned by position * 10000 ** (-2 i / dim).
        turns = torch.outer(torch.arange(len(x)), 10000.0 ** (-2 * torch.arange(dim // 2) / dim)).float()
        z = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.polar(torch.ones_like(turns), turns)[:, None]
        return torch.cat([z.real, z.imag], dim=-1)

    x = norm("layers.0.attn_norm", t["embedding.weight"][ids])
    for layer in range(3):
        at = f"layers.{layer}"
        q, k, v = (linear(f"{at}.{name}", x).view(len(ids), heads, dim) for name in "qkv")
        scores = torch.einsum("ihd,jhd->hij", rotate(q), rotate(k)) / dim**0.5
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(future, float("-inf")).softmax(-1), v)
        x = norm(f"{at}.ffn_norm", alpha * x + linear(f"{at}.out", mixed.reshape(len(ids), -1)))
        y = linear(f"{at}.down", functional.gelu(linear(f"{at}.gate", x)) * linear(f"{at}.up", x))
        x = norm(f"layers.{layer + 1}.attn_norm" if layer < 2 else "final_norm", alpha * x + y)
    return x[-1] @ t["embedding.weight"].T


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout.tp}pp{layout.pp}")
def test_glm_equals_a_plain_deepnorm_model(layout: Layout, tmp_path: Path, make_ranks: Any, make_batch: Any) -> None:
    tensors = save_glm(tmp_path)
    batch = make_batch(load_model(str(tmp_path)))
    expected = torch.stack([plain_glm(tensors, row[:n]) for row, n in zip(batch.ids, batch.lengths, strict=True)])
    found = run(tmp_path, layout, batch, make_ranks)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def load_glm(folder: Path) -> None:
    config = ModelConfig(**GLM)
    load_checkpoint(folder, config, Layout(2, 1), 1, "cpu", torch.float32)


Damage = Callable[[Path, dict[str, torch.Tensor]], None]


def resave(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors_torch.save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def keep_pickle_only(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def write(name: str, text: str) -> Damage:
    def damage(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        (folder / name).write_text(text)

    return damage


UP = "layers.1.up.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f, t: resave(f, {k: v for k, v in t.items() if k != UP}),
         rf"{UP} is missing; expected \[80, 48\]"),
        (lambda f, t: resave(f, t | {UP: torch.zeros(48, 80)}),
         rf"model.safetensors: tensor {UP} is \[48, 80\]; expected \[80, 48\]"),
        (lambda f, t: resave(f, t | {UP: torch.zeros(80, 48, dtype=torch.int8)}),
         rf"model.safetensors: tensor {UP} has type I8; expected one of F64, F32, F16, BF16"),
        (truncate, "model.safetensors: not a whole safetensors file"),
        (write("model.safetensors", ""), "model.safetensors: not a whole safetensors file"),
        (keep_pickle_only, r"only pickled weights \(pytorch_model.bin\).*convert them to safetensors"),
        (lambda f, t: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda f, t: (f / "config.json").unlink(), "config.json: no such file"),
        (write("config.json", "{"), "config.json: not a readable JSON file"),
        (write(INDEX, '{"weight_map": {"a": "part-2.safetensors"}}'), "part-2.safetensors', which is not in"),
        (write(INDEX, '{"weight_map": {"a": "../model.safetensors"}}'), "which is not in the folder"),
        (write(INDEX, "{}"), "weight_map is missing"),
        (write("config.json", '{"model_type": "chatglm"}'), "model_type is 'chatglm'"),
    ],
)  # fmt: skip
def test_damaged_checkpoints_are_refused(damage: Damage, message: str, tmp_path: Path) -> None:
    tensors = save_glm(tmp_path)
    load_glm(tmp_path)
    damage(tmp_path, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load_glm(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False; only True"),
        ("opt", {"activation_function": "gelu"}, "activation_function is 'gelu'; only 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rotary positions are of type 'llama3'"),
        ("llama", {"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big'; it must be a number above 0"),
        ("llama", {"model_type": "mistral", "sliding_window": 16}, "sliding_window is 16"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
    ],
)
def test_what_our_kernels_compute_differently_is_refused(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hugging_face(kind, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, load_model(str(tmp_path)), Layout(), 0, "cpu", torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    hugging_face("qwen2", tmp_path, tie_word_embeddings=False)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    resave(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"lm_head.weight is missing"):
        load_checkpoint(tmp_path, load_model(str(tmp_path)), Layout(), 0, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 2, "num_kv_heads": 2, "head_dim": 24}, "num_heads is 4, but the model small-glm has 2"),
        ({"max_positions": 64}, "max_positions is 32, but the model small-glm has 64"),
        ({"num_layers": 4}, "num_layers is 3, but the model small-glm has 4"),
    ],
)
def test_a_config_beside_the_weights_that_contradicts_the_model(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_glm(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, ModelConfig(**GLM | changes), Layout(), 0, "cpu", torch.float32)


def test_fewer_layers_only_if_asked_for(tmp_path: Path) -> None:
    save_glm(tmp_path)
    cut = ModelConfig(**GLM | {"num_layers": 2})
    assert len(load_checkpoint(tmp_path, cut, Layout(), 0, "cpu", torch.float32).layers) == 2
    (tmp_path / "config.json").write_text(json.dumps(GLM | {"num_layers": 5}))
    whole = ModelConfig(**GLM | {"model_id": "tiny-glm", "num_layers": 4})  # as many as that model has
    with pytest.raises(ValueError, match=r"num_layers is 5, but the model tiny-glm has 4; .* --layers"):
        load_checkpoint(tmp_path, whole, Layout(), 0, "cpu", torch.float32)
