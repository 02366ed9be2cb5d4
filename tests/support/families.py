"""A tiny configuration of every family, and what tests do with them."""

import jax
import numpy as np
from flax import nnx

from lensjax.models.registry import FAMILIES

__all__ = ["FAMILIES", "compiled", "flat", "make_batch", "make_config", "pure"]

DECODER = {
    "vocab_size": 53,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 20,
    "ffn_dim": 20,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "sliding_window": 3,
    "sliding_window_pattern": 2,
    "partial_rotary_factor": 1.0,
}
GPT2 = {"vocab_size": 53, "n_embd": 16, "n_head": 4, "n_positions": 16, "initializer_range": 0.2}
T5 = {"vocab_size": 53, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 20}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 7}
SWITCH = {"num_experts": 3, "expert_capacity": 4}
BART = {"vocab_size": 53, "d_model": 16, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 16}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.3}


def make_config(name, layers):
    """Return the config.json of a tiny model of a family; of encoder-decoders both have so many layers."""
    own = {
        "gpt2": GPT2 | {"n_layer": layers},
        "bart": BART | {"encoder_layers": layers, "decoder_layers": layers},
        "mt5": T5 | {"num_layers": layers, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "switch_transformers": T5
        | SWITCH
        | {"num_layers": layers, "num_decoder_layers": layers}
        | {"num_sparse_encoder_layers": layers // 2, "num_sparse_decoder_layers": layers // 2},
        "t5": T5 | {"num_layers": layers},
    }
    return {"model_type": name} | own.get(name, DECODER | {"num_hidden_layers": layers})


def make_batch(samples=2, length=9, seed=0):
    ids = np.random.default_rng(seed).integers(6, 53, (samples, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask != 0, ids, -100)}


def compiled(function):
    """Compile for a program that runs once or twice: what counts is the time to compile it."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def pure(model, batch, key=None):
    """Return (summed loss as a function of the parameters, the parameters)."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return nnx.merge(graph, params, rest).loss_sums(batch, dropout_key=key)[0].sum()

    return loss, params


def flat(state):
    """Return dotted path -> array."""
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}
