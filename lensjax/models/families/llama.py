"""Llama in Flax NNX (Llama 1 to 3.x, SmolLM2), and what Mistral, Qwen2, Qwen3 and Gemma 3 share with it.

References
----------
Touvron et al. 2023, LLaMA: Open and efficient foundation language models; Ainslie et al. 2023, GQA (grouped queries).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import layers
from lensjax.models.base import CausalLM
from lensjax.models.registry import (
    ROTARY_BUFFERS,
    ModelConfig,
    Rule,
    Table,
    causal_table,
    check_multiple,
    linear_rules,
    positive,
    typed,
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Configuration of a Llama-like model; fields that stand in config.json have the same name as there.

    Attributes
    ----------
    qkv_bias, out_bias : bool
        Whether the projections to queries, keys and values, and the output projection of attention, have biases.
    qk_norm : bool
        Whether each head's queries and keys are normalised before they are rotated.
    norm_offset : float
        See `layers.RMSNorm`.
    score_scale : float
        Multiplies the attention scores.
    embedding_scale : float
        Multiplies the token embeddings.
    windows : tuple of int or None
        For each layer: how many tokens a query sees, including its own; None is all.
    ropes : tuple of layers.Rotary
        For each layer.
    """

    max_length: int
    intermediate_size: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    score_scale: float = 1.0
    embedding_scale: float = 1.0
    windows: tuple[int | None, ...] = ()
    ropes: tuple[layers.Rotary, ...] = ()

    SIZES: ClassVar[dict[str, int]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    }
    """The defaults of transformers for sizes that config.json does not set; other families override them."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> LlamaConfig:
        """Read a config.json; see `ModelConfig.from_dict`."""
        bias = bool(raw.get("attention_bias", False))
        return cls.read(raw, source, qkv_bias=bias, out_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False)))

    @classmethod
    def read(cls, raw: Mapping[str, Any], source: str, **overrides: Any) -> LlamaConfig:
        """Read the settings that all Llama-like families share, and set those that a family decides itself.

        Parameters
        ----------
        raw : mapping
        source : str
        **overrides : fields of this class
            Replace what is read here, except that `head_dim` and `num_key_value_heads` are only defaults.

        Raises
        ------
        InputError
        """
        size = {name: positive(raw, name, default, source) for name, default in cls.SIZES.items()}
        width, heads, count = size["hidden_size"], size["num_attention_heads"], size["num_hidden_layers"]
        head_dim = positive(raw, "head_dim", overrides.pop("head_dim", 0) or max(width // heads, 1), source)
        if raw.get("head_dim") is None and head_dim * heads != width:
            check_multiple("hidden_size", width, "num_attention_heads", heads, source)
        key_heads = positive(raw, "num_key_value_heads", overrides.pop("num_key_value_heads", 0) or heads, source)
        check_multiple("num_attention_heads", heads, "num_key_value_heads", key_heads, source)
        length = size["max_position_embeddings"]
        if "ropes" not in overrides:
            overrides["ropes"] = (layers.rotary(raw, head_dim, length, source),) * count
        optional = ("hidden_act", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "attention_dropout")
        values = {name: typed(raw, name, getattr(cls, name), source) for name in optional if raw.get(name) is not None}
        values |= {"score_scale": head_dim**-0.5, "windows": (None,) * count} | overrides
        layers.activation(values.get("hidden_act", cls.hidden_act), source)
        return cls.base(
            raw,
            vocab_size=size["vocab_size"],
            width=width,
            heads=heads,
            layers=count,
            max_length=length,
            intermediate_size=size["intermediate_size"],
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            **values,
        )


def sliding_window(raw: Mapping[str, Any], source: str) -> int | None:
    """Return `sliding_window` of a config.json: 4096 where it is absent, None (no window) where it is null."""
    return None if raw.get("sliding_window", 4096) is None else positive(raw, "sliding_window", 4096, source)


def layer_windows(
    raw: Mapping[str, Any], window: int | None, default: list[str], source: str
) -> tuple[int | None, ...]:
    """Return each layer's window from `layer_types`.

    Parameters
    ----------
    raw : mapping
        A config.json.
    window : int or None
        Window of the layers called "sliding_attention".
    default : list of str
        The layers' types if config.json does not set them.
    source : str
        Names the configuration in error messages.

    Raises
    ------
    InputError
        If a type is unknown, or there is not one type for each layer.
    """
    types = raw.get("layer_types") or default
    if len(types) != len(default) or not set(types) <= {"full_attention", "sliding_attention"}:
        raise InputError(
            f"{source}: layer_types {types} must name full_attention or sliding_attention once for each of "
            f"{len(default)} layers; correct config.json."
        )
    if window is None and "sliding_attention" in types:
        raise InputError(f"{source}: layer_types has sliding_attention, but there is no sliding_window; add it.")
    return tuple(window if name == "sliding_attention" else None for name in types)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        queries, keys = config.heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.query = linear(config, config.width, queries, config.qkv_bias, dtype, rngs)
        self.key = linear(config, config.width, keys, config.qkv_bias, dtype, rngs)
        self.value = linear(config, config.width, keys, config.qkv_bias, dtype, rngs)
        self.out = linear(config, queries, config.width, config.out_bias, dtype, rngs)
        if config.qk_norm:
            self.query_norm = layers.RMSNorm(config.head_dim, config.rms_norm_eps, dtype, config.norm_offset)
            self.key_norm = layers.RMSNorm(config.head_dim, config.rms_norm_eps, dtype, config.norm_offset)
        self.config = config

    def __call__(
        self, x: jax.Array, mask: jax.Array, tables: tuple[jax.Array, jax.Array], key: jax.Array | None
    ) -> jax.Array:
        """Apply attention to x (N*T, d) with the mask (N, 1, T, T) and the tables of `layers.Rotary`."""
        shape = (mask.shape[0], mask.shape[-1], -1, self.config.head_dim)
        queries, keys = self.query(x).reshape(shape), self.key(x).reshape(shape)
        if self.config.qk_norm:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        mixed = layers.attention(
            layers.rotate(queries, tables),
            layers.rotate(keys, tables),
            self.value(x).reshape(shape),
            mask,
            scale=self.config.score_scale,
            dropout=self.config.attention_dropout,
            dropout_key=key,
        )
        return self.out(mixed.reshape(x.shape[0], -1))


class GatedMLP(nnx.Module):
    """MLP whose inner units are multiplied by gates (SwiGLU if the activation is silu)."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        self.gate = linear(config, config.width, config.intermediate_size, config.mlp_bias, dtype, rngs)
        self.up = linear(config, config.width, config.intermediate_size, config.mlp_bias, dtype, rngs)
        self.down = linear(config, config.intermediate_size, config.width, config.mlp_bias, dtype, rngs)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the MLP to x (N*T, d)."""
        return self.down(layers.ACTIVATIONS[self.config.hidden_act](self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each applied to the normalised residual stream."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        self.attention_norm = layers.RMSNorm(config.width, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = layers.RMSNorm(config.width, config.rms_norm_eps, dtype)
        self.mlp = GatedMLP(config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        per_layer: tuple[jax.Array | None, jax.Array | None],
        masks: list[jax.Array],
        tables: list[tuple[jax.Array, jax.Array]],
    ) -> jax.Array:
        """Apply the layer to the residual stream x (N*T, d); see `mask_and_tables`."""
        mask, table, key = mask_and_tables(per_layer, masks, tables)
        x = x + self.attention(self.attention_norm(x), mask, table, key)
        return x + self.mlp(self.mlp_norm(x))


def mask_and_tables(
    per_layer: tuple[jax.Array | None, jax.Array | None],
    masks: list[jax.Array],
    tables: list[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array | None]:
    """Return a layer's mask, rotary tables and dropout key.

    Parameters
    ----------
    per_layer : (kind, key)
        `kind` says whether the layer uses the second of the masks and tables; it is None if there is only one. `key`
        is the layer's dropout key.
    masks, tables : lists of one or two
    """
    kind, key = per_layer
    if kind is None:
        return masks[0], tables[0], key
    mask, table = jax.tree.map(lambda a, b: jnp.where(kind, b, a), (masks[0], tables[0]), (masks[1], tables[1]))
    return mask, table, key


class Llama(CausalLM):
    """A Llama-like decoder with its language-model head.

    Parameters
    ----------
    config : LlamaConfig
    dtype : dtype of the parameters
    rngs : nnx.Rngs
        The stream "params" gives the keys for the initial weights.
    """

    config: LlamaConfig
    block: ClassVar[Any] = Block

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config)
        init = layers.normal(config.initializer_range)
        self.tokens = layers.Embedding(config.vocab_size, config.width, dtype, init, rngs)
        self.layers = nnx.List([self.block(config, dtype, rngs) for _ in range(config.layers)])
        self.norm = layers.RMSNorm(config.width, config.rms_norm_eps, dtype, config.norm_offset)
        if not config.tie_word_embeddings:
            self.head = layers.Embedding(config.vocab_size, config.width, dtype, init, rngs)

    def decode(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the inputs (N*T, d) of the head; see `CausalLM`."""
        config = self.config
        x = self.tokens(input_ids.reshape(-1))
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        # Layers with the same window and rotary embedding share a mask and tables. Only differences of positions
        # matter; counting from the first real token makes the result independent of padding on the left, also in
        # rounding.
        kind_of_layer = list(zip(config.windows, config.ropes, strict=True))
        kinds = list(dict.fromkeys(kind_of_layer))
        positions = layers.positions_from_mask(attention_mask)
        x = self.run_layers(
            self.layers,
            x,
            (
                None if len(kinds) == 1 else jnp.asarray([kinds.index(kind) == 1 for kind in kind_of_layer]),
                layers.keys_per_layer(dropout_key, config.layers),
            ),
            [layers.window_mask(attention_mask, window) for window, _ in kinds],
            [rope.tables(positions, x.dtype) for _, rope in kinds],
        )
        return self.norm(x)


def linear(config: LlamaConfig, inputs: int, outputs: int, bias: bool, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """Return a linear layer with the initialisation of the configuration."""
    return layers.linear(inputs, outputs, config.initializer_range, dtype, rngs, bias=bias)


NORMS: Mapping[str, str] = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
"""Our name for a norm of a layer -> its name in checkpoints."""


def table(config: LlamaConfig, norms: Mapping[str, str] = NORMS) -> Table:
    """Return how a Hugging Face checkpoint stores the parameters; `norms` names the norms of the family's layers."""
    short = {"query": "q", "key": "k", "value": "v", "out": "o"}
    linears = {f"attention.{ours}": f"self_attn.{theirs}_proj" for ours, theirs in short.items()}
    linears |= {f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    scales = dict(norms) | {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
    rules = [Rule("tokens.embedding", "embed_tokens.weight"), Rule("norm.scale", "norm.weight")]
    for ours, theirs in linears.items():
        rules += linear_rules(f"layers.{{i}}.{ours}", f"layers.{{i}}.{theirs}")
    rules += [Rule(f"layers.{{i}}.{ours}.scale", f"layers.{{i}}.{theirs}.weight") for ours, theirs in scales.items()]
    return causal_table(
        rules,
        tied=config.tie_word_embeddings,
        embedding="embed_tokens.weight",
        prefix="model.",
        ignored=(ROTARY_BUFFERS,),
    )
