"""GGUF files of the Llama architecture, read without torch: configuration and weights, not the tokenizer.

References
----------
The GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import checkpoints
from lensjax.models.base import LanguageModel
from lensjax.models.llama import LlamaConfig, table

TENSORS: Mapping[str, str] = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A tensor's name in a GGUF file, without block number and ending -> its name in a Hugging Face checkpoint."""


def _reader(path: str | os.PathLike[str]) -> Any:
    if not Path(path).is_file():
        raise InputError(f"{os.fspath(path)}: no such file.")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError(
            f"{os.fspath(path)}: reading GGUF needs the gguf package: pip install 'lensjax[gguf]'."
        ) from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise InputError(f"{os.fspath(path)}: cannot be read as GGUF ({error}); download it again.") from error


def load_gguf_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """Read the configuration of a GGUF file.

    Parameters
    ----------
    path : str or path
        The file.

    Returns
    -------
    LlamaConfig

    Raises
    ------
    InputError
        If the file is missing or damaged, or of an architecture or rotary scaling that is not supported.
    """
    return _config(_reader(path), os.fspath(path))


def _config(reader: Any, source: str) -> LlamaConfig:
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    architecture = fields["general.architecture"].contents() if "general.architecture" in fields else None
    if architecture != "llama":
        raise InputError(f"{source}: GGUF architecture {architecture!r} is not supported; supported: llama.")
    names = [tensor.name for tensor in reader.tensors]
    if "rope_freqs.weight" in names:
        raise InputError(
            f"{source}: has rope_freqs.weight, the rotary scaling of Llama 3.1 and later, which is not read from GGUF; "
            "use the model's safetensors."
        )

    def field(name: str, *default: Any) -> Any:
        full = f"llama.{name}"
        if full in fields:
            return fields[full].contents()
        if not default:
            raise InputError(f"{source}: has no field {full}; convert the model again.")
        return default[0]

    width, heads = field("embedding_length"), field("attention.head_count")
    head_dim = field("attention.key_length", width // heads)
    if field("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{source}: only {field('rope.dimension_count')} of {head_dim} features of a head turn.")
    scaling = field("rope.scaling.type", "none")
    rope = {"rope_theta": float(field("rope.freq_base", 10_000.0)), "rope_type": "default"}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(field("rope.scaling.factor"))}
    elif scaling != "none":
        raise InputError(f"{source}: rope.scaling.type {scaling!r} is not supported; supported: none, linear.")
    embedding = next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": field("vocab_size", int(embedding.shape[1]) if embedding is not None else None),
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": float(field("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }
    for name in ("bos", "eos", "padding"):
        token = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            raw[f"{name.removesuffix('ding')}_token_id"] = token.contents()
    config = checkpoints.load_config(raw)
    assert isinstance(config, LlamaConfig)
    return config


class _Tensors(checkpoints._Tensors):
    """The tensors of a GGUF file under their Hugging Face names: shapes now, contents one at a time."""

    def __init__(self, reader: Any, config: LlamaConfig):
        self.config = config
        self.tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
        # GGUF lists dimensions from the innermost out.
        self.shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        heads = {"q_proj": self.config.heads, "k_proj": self.config.num_key_value_heads}
        kind = name.split(".")[-2]
        if kind not in heads:
            return array
        # llama.cpp turns neighbouring features, so GGUF stores a head's two halves interleaved.
        pairs = array.reshape(heads[kind], self.config.head_dim // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)


def _name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if not stem.startswith("blk."):
        full = TENSORS.get(stem, stem)
        return f"{full}.{ending}" if full == "lm_head" else f"model.{full}.{ending}"
    _, number, short = stem.split(".", 2)
    return f"model.layers.{number}.{TENSORS.get(short, short)}.{ending}"


def load_gguf(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> LanguageModel:
    """Load a model from a GGUF file of the Llama architecture, of any quantisation the gguf package reads.

    The tokenizer is not read: take it from the model's Hugging Face directory.

    Parameters
    ----------
    path : str or path
        The file.
    dtype : dtype of the parameters and of the computation

    Returns
    -------
    LanguageModel

    Raises
    ------
    InputError
        As `load_gguf_config`; also if the tensors do not fit the configuration, with all that do not in one message.
    """
    reader, source = _reader(path), os.fspath(path)
    config = _config(reader, source)
    names = table(config)
    graph, *states = nnx.split(checkpoints._abstract(config, dtype), nnx.Param, ...)
    abstract, rest = states
    flat = [(path, ".".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(abstract)]
    tensors = _Tensors(reader, config)
    found = checkpoints._check(names, {path: leaf.shape for _, path, leaf in flat}, tensors, source)
    leaves = []
    for path_, dotted, leaf in flat:
        rule, wanted = names.sources(dotted)
        # Copied, for unquantised tensors are views of the file, which may change.
        array = rule.load([tensors.read(found[name]) for name in wanted])
        leaves.append((path_, leaf.replace(jnp.array(array.astype(dtype, copy=False)))))
    return nnx.merge(graph, nnx.from_flat_state(leaves), rest)
