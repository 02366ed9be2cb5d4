"""The configuration of a GGUF file, as the config.json that a model of the same family has.

References
----------
llama.cpp, whose loader defines what the fields mean and what holds where there is none.
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
"""What the frequencies of the rotary embedding are divided by: the scaling of Llama 3.1 and later, written out."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The scaling of all Llama 3.x that Meta published; only the factor varies."""

GEMMA_27B_LAYERS = 62
"""By this llama.cpp knows the one Gemma 3 whose queries are scaled by hidden_size / heads."""


class Fields:
    """The fields of a GGUF file's architecture.

    Parameters
    ----------
    file : GGUFFile
    architecture : str
    """

    def __init__(self, file: GGUFFile, architecture: str):
        self.file = file
        self.architecture = architecture

    def __call__(self, name: str, *default: Any) -> Any:
        """Return a field by its name without the architecture, or the default, if one is given.

        Raises
        ------
        InputError
            If it is missing and there is no default.
        """
        full = f"{self.architecture}.{name}"
        if full not in self.file.fields and not default:
            raise InputError(f"{self.file.path}: has no field {full}; convert the model again.")
        return self.file.fields.get(full, *default)

    def number(self, name: str, *default: float) -> float:
        """Return a field that holds a number.

        Raises
        ------
        InputError
            If it is missing and there is no default, or if it is no number.
        """
        value = self(name, *default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            full = f"{self.architecture}.{name}"
            raise InputError(f"{self.file.path}: {full} is {value!r}; it must be a number: convert the model again.")
        return value

    def has(self, tensor: str) -> bool:
        """Tell whether the file has a tensor."""
        return tensor in self.file.tensors


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Return the configuration of a GGUF file.

    Parameters
    ----------
    file : GGUFFile

    Returns
    -------
    ModelConfig
        Of the model's family; its `raw` is a config.json for transformers.

    Raises
    ------
    InputError
        If the architecture, or what the file asks of it, is not supported, or if a field is missing.
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
    """Return what Llama-like models have in common, but for the rotary embedding."""
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
    # Mistral's files say llama too, and their windows are not in them: llama.cpp has none either.
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
    types = ["sliding_attention" if window and slides else "full_attention" for slides in pattern]
    large = count == GEMMA_27B_LAYERS
    near = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", 10_000.0)}
    return raw | {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window,
        "layer_types": types,
        "query_pre_attn_scalar": raw["hidden_size"] / raw["num_attention_heads"] if large else raw["head_dim"],
        "attn_logit_softcapping": fields("attn_logit_softcapping", None),
        "final_logit_softcapping": fields("final_logit_softcapping", None),
        "rope_parameters": {"full_attention": _rope(fields, raw["head_dim"]), "sliding_attention": near},
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
    turning = fields.number("rope.dimension_count", head_dim)
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
        "partial_rotary_factor": turning / head_dim,
        "rope_parameters": _rope(fields, int(turning)) | {"partial_rotary_factor": turning / head_dim},
    }


ARCHITECTURES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "llama": _llama,
    "phi2": _phi2,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
"""general.architecture -> what makes the config.json, but for vocabulary, head and special tokens."""


def _rope(fields: Fields, features: int) -> dict[str, Any]:
    """Return the rope_parameters of a config.json, for heads of which `features` turn."""
    path, turning = fields.file.path, fields("rope.dimension_count", features)
    if turning != features:
        raise InputError(f"{path}: only {turning} of {features} features of a head turn, which is not supported.")
    theta = fields.number("rope.freq_base", 10_000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    old = fields("rope.scale_linear", None)
    # A factor without a type scales linearly, as in llama.cpp.
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
    """Return the parameters of Llama 3's rotary scaling that give the factors of a GGUF file.

    Parameters
    ----------
    factors : float array (features / 2,)
        What each frequency is divided by.
    theta : float
        Base of the wavelengths.
    features : int
        Features of a head that turn.
    source : str
        Names the file in error messages.

    Returns
    -------
    dict
        The fields of rope_parameters besides rope_theta. Low and high factor and context may be other multiples than
        in the model's config.json: only their ratios show in the frequencies.

    Raises
    ------
    InputError
        If no parameters give these factors.
    """
    plain = Rotary(features, theta).frequencies().astype(np.float64)
    factor = float(np.max(factors, initial=1.0))
    if factors.shape != plain.shape or np.min(factors) < 1 - 1e-5:
        raise InputError(f"{source}: {ROPE_FACTORS} {factors.tolist()} is not the rotary scaling of Llama 3.")
    if factor <= 1 + 1e-5:
        return {}
    trials = [LLAMA3]
    # The share of a frequency that stays is, inside the band, linear in how often it turns over the context.
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    inside = np.flatnonzero((share > 1e-3) & (share < 1 - 1e-3))
    if len(inside) > 1:
        slope, offset = np.polyfit(plain[inside] / (2 * np.pi), share[inside], 1)
        if offset < 0 < slope:
            high = 1 - 1 / offset
            context = round(slope * (high - 1))
            trials.append(
                {"low_freq_factor": 1.0, "high_freq_factor": float(high), "original_max_position_embeddings": context}
            )
    for trial in trials:
        low, high, context = trial.values()
        computed = plain / Rotary(features, theta, "llama3", factor, low, high, float(context)).frequencies()
        if np.allclose(computed, factors, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", "factor": factor} | trial
    raise InputError(f"{source}: {ROPE_FACTORS} {factors.tolist()} is not the rotary scaling of Llama 3.")
