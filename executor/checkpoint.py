"""Real checkpoints: safetensors in Hugging Face's names for OPT, Llama and Qwen2, or in our own for any family.

A folder with a Hugging Face config.json holds Hugging Face names. A folder whose config.json has our own fields
(`family` and the rest of ModelConfig; the way to bring GLM-130B) holds these names, each in torch's [out, in] order:
`layers.{i}.{attn_norm,q,k,v,out,ffn_norm,gate,up,down}.{weight,bias}`, `final_norm.{weight,bias}`, `embedding.weight`,
`lm_head.weight` (left out when tied) and, for OPT, `positions.weight` with its two unused first rows.
Only slices that this rank needs are read. Pickled weights (.bin, .pt, .pth) can run code as they load: refused.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from executor.status import Steps
from executor.weights import Traits, Wanted, Weights, assemble, default_traits
from models.config import MODELS, ModelConfig, load_model
from models.transformer import Layout

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
DTYPES = ("F64", "F32", "F16", "BF16")

# Our name -> Hugging Face's, without what stands before it and without .weight or .bias.
_OPT = {
    "attn_norm": "self_attn_layer_norm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "out": "self_attn.out_proj", "ffn_norm": "final_layer_norm", "up": "fc1", "down": "fc2",
    "embedding": "embed_tokens", "positions": "embed_positions", "final_norm": "final_layer_norm",
}  # fmt: skip
_LLAMA = {
    "attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "out": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj", "embedding": "embed_tokens", "final_norm": "norm",
}  # fmt: skip
_NAMES = {"opt": _OPT, "llama": _LLAMA}
_PREFIXES = {"opt": ("model.decoder.", "decoder."), "llama": ("model.", "")}


def load_checkpoint(
    folder: Path, config: ModelConfig, layout: Layout, rank: int, device: torch.device | str, dtype: torch.dtype
) -> Weights:
    """One rank's weights from a checkpoint folder, cast to `dtype`.

    Raises ValueError naming the file, the tensor, what was found and what was expected.
    """
    raw = _read_json(folder / "config.json")
    own = "family" in raw
    traits = default_traits(config) if own else _traits(raw, config, folder / "config.json")
    with ExitStack() as stack:
        files = _open_all(folder, stack)
        _compare(folder / "config.json", config)
        source = _Source(folder, config, files, torch.device(device), dtype, _style(folder, config, files, own))
        tied = source.find("lm_head.weight") is None
        if tied and raw.get("tie_word_embeddings") is False:
            raise ValueError(f"{folder}: tensor lm_head.weight is missing, and config.json says that it is not tied")
        return assemble(config, layout, rank, source, replace(traits, tied=tied))


def _compare(path: Path, config: ModelConfig) -> None:
    """Refuse a config.json that describes another model: the same tensors cut into other heads, say, give numbers that
    only look right. Fewer positions are fine, and fewer layers of a model that has as many as the file when whole."""
    known = load_model(str(path.absolute()))
    for name in (f.name for f in fields(ModelConfig)):
        there, here = getattr(known, name), getattr(config, name)
        if name == "model_id" or there == here or (name == "max_positions" and there > here):
            continue
        if name == "num_layers" and there > here and _is_cut(config):
            continue
        more = "; ask for the first ones with --layers" if name == "num_layers" and there > here else ""
        raise ValueError(f"{path}: {name} is {there!r}, but the model {config.model_id} has {here!r}{more}")


def _is_cut(config: ModelConfig) -> bool:
    """Whether these may be a model's first layers alone, asked for by --layers. A model from a file may always."""
    whole = MODELS.get(config.model_id)
    return whole is None or config.num_layers < whole.num_layers


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint folder needs one") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _traits(raw: dict[str, Any], config: ModelConfig, path: Path) -> Traits:
    """Constants of a Hugging Face config; anything our kernels would compute differently is refused."""
    kind = raw.get("model_type")
    if config.family == "glm" or kind not in ("opt", "llama", "mistral", "qwen2"):
        raise ValueError(f"{path}: model_type is {kind!r}; Hugging Face names are known for opt, llama, mistral, qwen2")
    required = {"do_layer_norm_before": True, "activation_function": "relu", "_remove_final_layer_norm": False,
                "hidden_act": "silu", "use_sliding_window": False, "layer_norm_elementwise_affine": True}  # fmt: skip
    for key, value in required.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}; only {value!r} is supported")
    if config.family == "opt":
        base = default_traits(config)
        return base if raw.get("enable_bias", True) else replace(base, biased=frozenset())
    window = raw.get("sliding_window") if kind == "mistral" else None
    if window is not None and window < config.max_positions:
        raise ValueError(f"{path}: sliding_window is {window!r}; only attention over all positions is supported")
    biased: set[str] = set("qkv") if kind == "qwen2" else set()
    biased |= {"q", "k", "v", "out"} if raw.get("attention_bias") else set()
    biased |= {"gate", "up", "down"} if raw.get("mlp_bias") else set()
    return Traits(
        _positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), path), _rope_theta(raw, path), frozenset(biased)
    )


def _rope_theta(raw: dict[str, Any], path: Path) -> float:
    """The base of the rotary angles; scaled variants (long-context Llama 3.1, YaRN) are refused."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters is {rope!r}; it must be a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{path}: rotary positions are of type {kind!r}; only unscaled, full ones are supported")
    return _positive("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0)), path)


def _positive(name: str, value: object, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{path}: {name} is {value!r}; it must be a number above 0")
    return float(value)


def _open_all(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every safetensors file of the checkpoint by file name, opened but not read."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("checkpoints need the safetensors package, which is not installed") from None
    files: dict[str, Any] = {}
    for name in _file_names(folder):
        try:
            files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name}: not a whole safetensors file ({error})") from None
    return files


def _file_names(folder: Path) -> list[str]:
    index = folder / INDEX
    if index.is_file():
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
            raise ValueError(f"{index}: weight_map is missing or does not map tensor names to file names")
        names = sorted(set(placed.values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{index}: it names the file {name!r}, which is not in the folder")
        return names
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(f"{folder}: only pickled weights ({pickles[0]}), which may run code as they load; "
                         "convert them to safetensors")  # fmt: skip
    raise ValueError(f"{folder}: neither model.safetensors nor {INDEX} is there")


@dataclass(frozen=True, slots=True)
class _Style:
    """How this checkpoint spells names: what stands before all of them, and our name -> its name."""

    prefix: str
    names: dict[str, str]


def _style(folder: Path, config: ModelConfig, files: dict[str, Any], own: bool) -> _Style:
    if own:
        return _Style("", {})
    names = _NAMES[config.family]
    known = {tensor for file in files.values() for tensor in file.keys()}  # noqa: SIM118 (not a dict)
    for prefix in _PREFIXES[config.family]:
        if f"{prefix}{names['embedding']}.weight" in known:
            return _Style(prefix, names)
    expected = f"{_PREFIXES[config.family][0]}{names['embedding']}.weight"
    raise ValueError(f"{folder}: tensor {expected} is missing")


@dataclass(frozen=True, slots=True)
class _Source:
    """Reads wanted slices from the open files."""

    folder: Path
    config: ModelConfig
    files: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    style: _Style
    where: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        places = {tensor: name for name, file in self.files.items() for tensor in file.keys()}  # noqa: SIM118
        object.__setattr__(self, "where", places)

    def find(self, tensor: str) -> str | None:
        """The file that holds a tensor."""
        return self.where.get(tensor)

    def __call__(self, wanted: Wanted) -> torch.Tensor:
        Steps.add()
        tensor = self._name(wanted)
        file = self.find(tensor)
        if file is None:
            raise ValueError(f"{self.folder}: tensor {tensor} is missing; expected {list(wanted.shape)}")
        view = self.files[file].get_slice(tensor)
        found, kind = list(view.get_shape()), view.get_dtype()
        if found != list(wanted.shape):
            raise ValueError(f"{self.folder / file}: tensor {tensor} is {found}; expected {list(wanted.shape)}")
        if kind not in DTYPES:
            raise ValueError(f"{self.folder / file}: tensor {tensor} has type {kind}; expected one of "
                             f"{', '.join(DTYPES)}")  # fmt: skip
        part: torch.Tensor
        part = view[wanted.low : wanted.high] if wanted.axis == 0 else view[:, wanted.low : wanted.high]
        return part.to(device=self.device, dtype=self.dtype).contiguous()

    def _name(self, wanted: Wanted) -> str:
        layer = "" if wanted.layer is None else f"layers.{wanted.layer}."
        # The head stands outside the body of the model, whatever that is called.
        prefix = "" if wanted.name == "lm_head" else self.style.prefix
        name = self.style.names.get(wanted.name, wanted.name)
        return f"{prefix}{layer}{name}.{'bias' if wanted.is_bias else 'weight'}"
