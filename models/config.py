"""Transformer shapes: one line a model, or a Hugging Face config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

Family = Literal["opt", "glm", "llama"]
FAMILIES = ("opt", "glm", "llama")
# The most that is believed of each size, several times that of the largest models known: beyond it numbers no longer
# fit, or a run would take for ever.
MOST = {
    "num_layers": 1000, "hidden_size": 10**5, "num_heads": 10**4, "num_kv_heads": 10**4, "head_dim": 10**4,
    "ffn_size": 10**6, "vocab_size": 10**7, "max_positions": 10**8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer.

    `gated`: the FFN has three matrices (gate, up, down) instead of two. `vocab_parallel`: the embedding is sharded
    over the tensor-parallel ranks and costs one all-reduce per forward; 0 for `vocab_size` leaves embedding and
    head out (the published Liger artifact runs layers alone).
    """

    model_id: str
    family: Family
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    gated: bool
    vocab_size: int
    max_positions: int

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value, least = getattr(self, name), 0 if name == "vocab_size" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                wanted = "0 (no embedding) or more" if name == "vocab_size" else "1 or more"
                raise ValueError(f"{self.model_id}: {name} is {_shown(value)}; it must be a whole number, {wanted}")
            if value > most:
                raise ValueError(f"{self.model_id}: {name} is {_shown(value)}; it must be at most {most}")
        if self.family not in FAMILIES:
            raise ValueError(f"{self.model_id}: family is {self.family!r}; it must be one of {', '.join(FAMILIES)}")
        if not isinstance(self.gated, bool):
            raise ValueError(f"{self.model_id}: gated is {self.gated!r}; it must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.model_id}: {self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly"
            )

    @property
    def num_parameters(self) -> int:
        """Weights of all layers and the embedding (tied head), biases and norms left out."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        ffn = (3 if self.gated else 2) * self.hidden_size * self.ffn_size
        return self.num_layers * (attention + ffn) + self.vocab_size * self.hidden_size


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


#                id               family layers hidden heads kv  dim  ffn    gated  vocab   positions
_TABLE: tuple[tuple[Any, ...], ...] = (
    ("opt-30b",        "opt",   48,  7168,  56, 56, 128, 28672, False, 50272,  2048),
    ("opt-66b",        "opt",   64,  9216,  72, 72, 128, 36864, False, 50272,  2048),
    ("glm-130b",       "glm",   70, 12288,  96, 96, 128, 32768, True,  150528, 2048),
    ("glm-130b-plain", "glm",   70, 12288, 128, 128, 96, 49152, False, 0,      2048),
    ("llama-2-7b",     "llama", 32,  4096,  32, 32, 128, 11008, True,  32000,  4096),
    ("llama-2-13b",    "llama", 40,  5120,  40, 40, 128, 13824, True,  32000,  4096),
    ("llama-2-70b",    "llama", 80,  8192,  64,  8, 128, 28672, True,  32000,  4096),
    ("llama-3-8b",     "llama", 32,  4096,  32,  8, 128, 14336, True,  128256, 8192),
    ("llama-3-70b",    "llama", 80,  8192,  64,  8, 128, 28672, True,  128256, 8192),
    ("qwen2.5-32b",    "llama", 64,  5120,  40,  8, 128, 27648, True,  152064, 32768),
    ("tiny-opt",       "opt",    4,   128,   8,  8,  16,   512, False, 512,    256),
    ("tiny-glm",       "glm",    4,   128,   8,  8,  16,   384, True,  512,    256),
    ("tiny-llama",     "llama",  4,   128,   8,  4,  16,   384, True,  512,    256),
)  # fmt: skip
# Shapes: OPT from Zhang et al. 2022 table 1; GLM-130B from its model config (gated FFN of 32768 reproduces the
# parameter count); glm-130b-plain is what the published Liger artifact runs: 128 heads of 96, an FFN of 4 x hidden,
# no embedding; Llama and Qwen from their model cards. The tiny ones are for tests and runs without a GPU.
MODELS: dict[str, ModelConfig] = {row[0]: ModelConfig(*row) for row in _TABLE}

_HF_FAMILIES: dict[str, Family] = {
    "opt": "opt", "glm": "glm", "chatglm": "glm", "llama": "llama", "mistral": "llama", "qwen2": "llama",
}  # fmt: skip


def load_model(name_or_path: str) -> ModelConfig:
    """A model by id, or from a JSON file: our own fields, or a Hugging Face config.json.

    Raises ValueError for an unknown id or a file that does not describe a model.
    """
    if name_or_path in MODELS:
        return MODELS[name_or_path]
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(f"model {name_or_path!r} is neither a file nor one of: {', '.join(MODELS)}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        # Python's own words on a number of thousands of digits end in advice to programmers.
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("; use sys.")[0]
        raise ValueError(f"{path}: not a readable JSON model file ({reason})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object that describes a model, got {type(raw).__name__}")
    known = _from_own(raw, path) if "family" in raw else _from_hugging_face(raw, path)
    try:
        return ModelConfig(**known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_own(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    names = {f.name for f in fields(ModelConfig)}
    raw = {"model_id": path.stem, **raw}
    if unknown := sorted(set(raw) - names):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; known: {', '.join(sorted(names))}")
    if missing := sorted(names - set(raw)):
        raise ValueError(f"{path}: field {missing[0]!r} is missing")
    return raw


def _from_hugging_face(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in _HF_FAMILIES:
        raise ValueError(f"{path}: model_type is {kind!r}; supported: {', '.join(_HF_FAMILIES)}")
    if kind == "opt" and raw.get("word_embed_proj_dim", raw.get("hidden_size")) != raw.get("hidden_size"):
        raise ValueError(f"{path}: word_embed_proj_dim differs from hidden_size, which is not supported")

    def need(*keys: str) -> int:
        for key in keys:
            if key in raw:
                return raw[key]  # type: ignore[no-any-return]
        raise ValueError(f"{path}: field {keys[0]!r} is missing")

    heads, hidden = need("num_attention_heads"), need("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        shown = f"num_attention_heads {_shown(heads)} and hidden_size {_shown(hidden)}"
        raise ValueError(f"{path}: {shown} must be whole numbers")
    # Published files write null for what follows from the rest; 0 is a mistake that the checks below name.
    head_dim, kv_heads = raw.get("head_dim"), raw.get("num_key_value_heads")
    if head_dim is None and hidden % heads:
        raise ValueError(f"{path}: hidden_size {hidden} cannot be divided over {heads} heads; give head_dim")
    if kv_heads is None:
        kv_heads = raw.get("multi_query_group_num", heads) if raw.get("multi_query_attention") else heads
    return dict(
        model_id=path.parent.name if path.name == "config.json" else path.stem,
        family=_HF_FAMILIES[kind],
        num_layers=need("num_hidden_layers", "num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        ffn_size=need("ffn_dim", "intermediate_size", "ffn_hidden_size", "inner_hidden_size"),
        gated=kind != "opt",
        vocab_size=need("vocab_size", "padded_vocab_size"),
        max_positions=need("max_position_embeddings", "seq_length", "max_sequence_length"),
    )
