"""Hessian and Gauss-Newton probes of every ported family against dense float64 matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from lensjax_kernels import rademacher_like

from lensjax.models import init_model
from lensjax.tangents import hessian_trace, model_loss
from support.families import FAMILIES, make_config

pytestmark = pytest.mark.usefixtures("quick_to_compile")

VOCABULARY = 11

TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
    "intermediate_size": 5, "ffn_dim": 5, "n_embd": 4, "n_head": 2, "d_model": 4, "d_kv": 2, "num_heads": 2,
    "d_ff": 5, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 5, "decoder_ffn_dim": 5,
    "num_experts": 2, "relative_attention_num_buckets": 4, "query_pre_attn_scalar": 2, "word_embed_proj_dim": 4,
    "max_position_embeddings": 4, "n_positions": 4, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
"""Sizes under every name that some family has for them."""

SPARSE = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}


def make(name):
    own = make_config(name, 1)
    own |= {key: value for key, value in TINY.items() if key in own or key.endswith(("token_id", "scalar", "dim"))}
    own |= SPARSE if name == "switch_transformers" else {}
    # Never initialised, which compiles a program for each shape; weights of a size that makes every part of the
    # Hessian count.
    model = nnx.eval_shape(lambda: init_model(own, jax.random.key(0), jnp.float64))
    rng = np.random.default_rng(5)
    nnx.update(model, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.5), nnx.state(model, nnx.Param)))
    ids, labels = (rng.integers(2, VOCABULARY, (2, 4)).astype(np.int32) for _ in range(2))
    mask = np.ones_like(ids)
    mask[1, 3:], labels[1, 3:], labels[0, 0] = 0, -100, -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return model, {key: jnp.asarray(value) for key, value in batch.items()}


def dense_matrices(model, batch):
    """Return the Hessian and the Gauss-Newton matrix (P, P) of the mean loss, from the logits and by hand."""
    graph, params = nnx.split(model, nnx.Param)
    start, unravel = jax.flatten_util.ravel_pytree(params)
    labels, mask = batch["labels"], batch["attention_mask"] != 0
    if not hasattr(model, "shift_right"):
        labels = jnp.where(mask[:, 1:] & mask[:, :-1], labels[:, 1:], -100)
    counted = labels != -100

    def loss(vector):
        own = nnx.merge(graph, unravel(vector))
        if hasattr(own, "shift_right"):
            logits = own(batch["input_ids"], batch["attention_mask"], own.shift_right(batch["labels"]))
        else:
            logits = own(batch["input_ids"], batch["attention_mask"])[:, :-1]
        gold = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
        return -jnp.sum(jnp.where(counted, gold, 0)) / jnp.sum(counted), logits

    def gradient_and_logits(vector):
        found = jax.grad(loss, has_aux=True)(vector)
        return found, found[1]

    (hessian, jacobian), logits = jax.jit(jax.jacfwd(gradient_and_logits, has_aux=True))(start)
    chances, jacobian = scipy.special.softmax(np.asarray(logits), -1), np.asarray(jacobian)
    jvp = chances[..., None] * (jacobian - np.einsum("ntv,ntvp->ntp", chances, jacobian)[:, :, None])
    jvp *= np.asarray(counted)[..., None, None] / counted.sum()
    return {"hessian": np.asarray(hessian), "gauss_newton": np.einsum("ntvp,ntvq->pq", jacobian, jvp, optimize=True)}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_probes_of_a_family_are_those_of_the_dense_matrices(name):
    with jax.enable_x64(True):
        model, batch = make(name)
        dense, key = dense_matrices(model, batch), jax.random.key(2)
        assert np.linalg.eigvalsh(dense["gauss_newton"]).min() > -1e-10
        difference = np.abs(dense["hessian"] - dense["gauss_newton"]).max()
        assert difference > 1e-3 * np.abs(dense["hessian"]).max()  # the two matrices differ
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        bounds = np.cumsum([a.size for a in leaves])[:-1]
        for matrix, whole in dense.items():
            estimate = hessian_trace(model, batch, key=key, probes=2, matrix=matrix, by_layer="parameter", chunk=1)
            want = []
            for own in jax.random.split(jax.random.fold_in(key, 0), 2):
                v = np.concatenate([np.ravel(a) for a in rademacher_like(own, leaves)])
                want.append([part.sum() for part in np.split(v * (whole @ v), bounds)])
            np.testing.assert_allclose(estimate.samples, want, rtol=0, atol=1e-10 * np.abs(want).max())
            assert estimate.trace == pytest.approx(sum(estimate.by_layer.values()), rel=1e-12)
            assert estimate.weight == int(model_loss(model)[0].tokens(batch))
