"""The configuration of a GGUF file, converted to the config.json of the model's family.

References
----------
llama.cpp, whose loader defines the meaning of the fields and their defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lensjax.errors import InputError
from lensjax.models.checkpoints.gguf.file import GGUFFile
from lensjax.models.layers import Rotary
from lensjax.models.registry import MOST_LAYERS, ModelConfig, family

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of divisors of the rotary frequencies: the scaling of Llama 3.1 and later as explicit numbers."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The rotary scaling of all Llama 3.x models that Meta published; only the factor varies."""

GEMMA_27B_LAYERS = 62
"""Number of layers by which llama.cpp recognises the one Gemma 3 that scales queries by hidden_size / heads."""


class Fields:
    """The metadata fields of a GGUF file's architecture.

    Parameters
    ----------
    file : GGUFFile
    architecture : str
    """

    def __init__(self, file: GGUFFile, architecture: str):
        self.file = file
        self.architecture = architecture

    def __call__(self, name: str, *default: Any) -> Any:
        """Return a field by its name without the architecture; if it is missing, return the default.

        Raises
        ------
        InputError
            If the field is missing and there is no default.
        """
        full = f"{self.architecture}.{name}"
        if full not in self.file.fields and not default:
            raise InputError(f"{self.file.path}: has no field {full}; convert the model again.")
        return self.file.fields.get(full, *default)

    def number(self, name: str, *default: float) -> float:
        """Return the value of a field that must be a number.

        Raises
        ------
        InputError
            If the field is missing and there is no default, or if it is not a number.
        """
        value = self(name, *default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            full = f"{self.architecture}.{name}"
            raise InputError(f"{self.file.path}: {full} is {value!r}; it must be a number: convert the model again.")
        return value

    def has(self, tensor: str) -> bool:
        """Return whether the file has a tensor of this name."""
        return tensor in self.file.tensors


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Return the configuration of a GGUF file.

    Parameters
    ----------
    file : GGUFFile

    Returns
    -------
    ModelConfig
        Of the model's family; `raw` is a config.json that transformers accepts.

    Raises
    ------
    InputError
        If the architecture or one of its settings is not supported, or a field is missing.
    """
    architecture = file.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; "
            f"supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    fields = Fields(file, architecture)
    if fields("expert_count", 0):
        raise InputError(
            f"{file.path}: is a mixture of {fields('expert_count')} experts; only dense models are supported."
        )
    count = fields("block_count", 0)
    if not isinstance(count, int) or count > MOST_LAYERS:
        raise InputError(
            f"{file.path}: block_count is {count!r}; it must be a number of layers up to {MOST_LAYERS}: download the "
            "file again."
        )
    raw = ARCHITECTURES[architecture](fields)
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise InputError(f"{file.path}: has no tensor token_embd.weight; convert the model again.")
    raw |= {"vocab_size": table.shape[0], "tie_word_embeddings": not fields.has("output.weight")}
    for theirs, ours in {"bos": "bos", "eos": "eos", "padding": "pad"}.items():
        token = file.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            raw[f"{ours}_token_id"] = token
    config = family(raw["model_type"], file.path).config.from_dict(raw, file.path)
    assert isinstance(config, ModelConfig)
    return config


def _decoder(fields: Fields, model_type: str, model_class: str) -> dict[str, Any]:
    """Return the settings that all Llama-like models share, without the rotary embedding."""
    width, heads = fields.number("embedding_length"), fields.number("attention.head_count")
    return {
        "model_type": model_type,
        "architectures": [model_class],
        "hidden_size": width,
        "intermediate_size": fields("feed_forward_length"),
        "num_hidden_layers": fields("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields("attention.head_count_kv", heads),
        "head_dim": fields("attention.key_length", int(width // max(heads, 1))),
        "max_position_embeddings": fields("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
    }


def _llama(fields: Fields) -> dict[str, Any]:
    # Mistral's files also have the architecture llama. They do not store the window, and llama.cpp applies none.
    raw = _decoder(fields, "llama", "LlamaForCausalLM")
    raw |= {"rope_parameters": _rope(fields, raw["head_dim"])}
    return raw | {"attention_bias": fields.has("blk.0.attn_q.bias"), "mlp_bias": fields.has("blk.0.ffn_up.bias")}


def _qwen2(fields: Fields) -> dict[str, Any]:
    raw = _decoder(fields, "qwen2", "Qwen2ForCausalLM")
    return raw | {"rope_parameters": _rope(fields, raw["head_dim"])}


def _qwen3(fields: Fields) -> dict[str, Any]:
    raw = _decoder(fields, "qwen3", "Qwen3ForCausalLM")
    raw |= {"rope_parameters": _rope(fields, raw["head_dim"])}
    return raw | {"attention_bias": fields.has("blk.0.attn_q.bias")}


def _gemma3(fields: Fields) -> dict[str, Any]:
    raw = _decoder(fields, "gemma3_text", "Gemma3ForCausalLM")
    count, window = int(fields.number("block_count")), fields("attention.sliding_window", None) or None
    pattern = fields("attention.sliding_window_pattern", 6)
    if not isinstance(pattern, list):
        pattern = [bool((i + 1) % int(pattern)) for i in range(count)]
    types = ["sliding_attention" if window and is_windowed else "full_attention" for is_windowed in pattern]
    large = count == GEMMA_27B_LAYERS
    local_rope = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", 10_000.0)}
    return raw | {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window,
        "layer_types": types,
        "query_pre_attn_scalar": raw["hidden_size"] / raw["num_attention_heads"] if large else raw["head_dim"],
        "attn_logit_softcapping": fields("attn_logit_softcapping", None),
        "final_logit_softcapping": fields("final_logit_softcapping", None),
        "rope_parameters": {"full_attention": _rope(fields, raw["head_dim"]), "sliding_attention": local_rope},
    }


def _gpt2(fields: Fields) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": fields("context_length"),
        "n_embd": fields("embedding_length"),
        "n_layer": fields("block_count"),
        "n_head": fields("attention.head_count"),
        "n_inner": fields("feed_forward_length"),
        "layer_norm_epsilon": fields.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _phi2(fields: Fields) -> dict[str, Any]:
    width, heads = fields.number("embedding_length"), fields.number("attention.head_count")
    head_dim = int(width // max(heads, 1))
    rotated = fields.number("rope.dimension_count", head_dim)
    return {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "hidden_size": width,
        "intermediate_size": fields("feed_forward_length"),
        "num_hidden_layers": fields("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields("attention.head_count_kv", heads),
        "max_position_embeddings": fields("context_length"),
        "layer_norm_eps": fields.number("attention.layer_norm_epsilon"),
        "hidden_act": "gelu_new",
        "qk_layernorm": False,
        "partial_rotary_factor": rotated / head_dim,
        "rope_parameters": _rope(fields, int(rotated)) | {"partial_rotary_factor": rotated / head_dim},
    }


ARCHITECTURES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "llama": _llama,
    "phi2": _phi2,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
"""general.architecture -> function that returns the config.json without vocabulary, head and special tokens."""


def _rope(fields: Fields, features: int) -> dict[str, Any]:
    """Return the rope_parameters of a config.json, for heads with `features` rotated features."""
    path, rotated = fields.file.path, fields("rope.dimension_count", features)
    if rotated != features:
        raise InputError(f"{path}: only {rotated} of {features} features of a head turn, which is not supported.")
    theta = fields.number("rope.freq_base", 10_000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    old = fields("rope.scale_linear", None)
    # As in llama.cpp, a factor without a type means linear scaling.
    unscaled = fields("rope.scaling.factor", old) in (None, 0, 1)
    kind = fields("rope.scaling.type", "none" if unscaled else "linear")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": fields.number("rope.scaling.factor", *([] if old is None else [old]))}
    elif kind != "none":
        raise InputError(
            f"{path}: rope.scaling.type {kind!r} is not supported; supported: none, linear, and Llama 3's. "
            "Use a file of the model without extended context."
        )
    if not fields.has(ROPE_FACTORS):
        return rope
    if rope["rope_type"] != "default":
        raise InputError(f"{path}: has both {ROPE_FACTORS} and rope.scaling.type {kind!r}; only one is supported.")
    return rope | llama3_scaling(fields.file.read(ROPE_FACTORS), theta, features, path)


def llama3_scaling(factors: np.ndarray, theta: float, features: int, source: str) -> dict[str, Any]:
    """Return the parameters of Llama 3's rotary scaling that reproduce the divisors stored in a GGUF file.

    Parameters
    ----------
    factors : float array (features / 2,)
        Divisor of each frequency.
    theta : float
        Base of the wavelengths.
    features : int
        Rotated features of a head.
    source : str
        Names the file in error messages.

    Returns
    -------
    dict
        The fields of rope_parameters besides rope_theta. Low and high factor and context may differ from those in the
        model's config.json by a common factor, because the frequencies depend only on their ratios.

    Raises
    ------
    InputError
        If no parameters reproduce these divisors.
    """
    unscaled = Rotary(features, theta).frequencies().astype(np.float64)
    factor = float(np.max(factors, initial=1.0))
    if factors.shape != unscaled.shape or np.min(factors) < 1 - 1e-5:
        raise InputError(f"{source}: {ROPE_FACTORS} {factors.tolist()} is not the rotary scaling of Llama 3.")
    if factor <= 1 + 1e-5:
        return {}
    candidates = [LLAMA3]
    # Between the two limits, the weight of the unscaled frequency is linear in the number of turns over the context.
    weight = (1 / factors - 1 / factor) / (1 - 1 / factor)
    inside = np.flatnonzero((weight > 1e-3) & (weight < 1 - 1e-3))
    if len(inside) > 1:
        slope, offset = np.polyfit(unscaled[inside] / (2 * np.pi), weight[inside], 1)
        if offset < 0 < slope:
            high = 1 - 1 / offset
            context = round(slope * (high - 1))
            candidates.append(
                {"low_freq_factor": 1.0, "high_freq_factor": float(high), "original_max_position_embeddings": context}
            )
    for parameters in candidates:
        low, high, context = parameters.values()
        divisors = unscaled / Rotary(features, theta, "llama3", factor, low, high, float(context)).frequencies()
        if np.allclose(divisors, factors, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", "factor": factor} | parameters
    raise InputError(f"{source}: {ROPE_FACTORS} {factors.tolist()} is not the rotary scaling of Llama 3.")
