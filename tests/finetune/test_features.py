"""Features are what the head predicts from, with the tokens that it is to predict."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from lensjax.errors import InputError
from lensjax.finetune import target_features
from lensjax.models import init_model
from lensjax.tasks import Encoded, batches

SMALL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "gpt2": {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "t5": {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1}
    | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "tie_word_embeddings": False},
}


def samples(separate, prompts):
    rng = np.random.default_rng(0)
    ids = tuple(rng.integers(1, 40, length).astype(np.int32) for length in (7, 12, 5, 9))
    return Encoded(ids, np.array(prompts), 0, separate=separate)


@pytest.mark.parametrize(
    ("family", "prompts"), [("gpt2", (2, 5, 1, 3)), ("gpt2", (0, 0, 0, 0)), ("t5", (2, 5, 1, 3))], ids=str
)
def test_the_head_on_features_gives_the_model_s_losses(family, prompts):
    model = init_model({"model_type": family, **SMALL, **CONFIGS[family]}, jax.random.key(0))
    encoded = samples(family == "t5", prompts)
    features, tokens = target_features(model, encoded, (8, 16), 0, positions=100, batch_size=2)
    expected = [model.loss_sums(batch) for batch in batches(encoded, batch_size=2, buckets=(8, 16), pad_id=0)]
    assert len(tokens) == len(features) == sum(float(counts.sum()) for _, counts in expected)
    # The first token of a text without prompt is predicted from nothing.
    assert len(tokens) == sum(len(ids) - max(p, family == "gpt2") for ids, p in zip(encoded.ids, prompts, strict=True))
    logits = features @ np.asarray(model.head_weight()).T
    losses = -log_softmax(logits, axis=-1)[np.arange(len(tokens)), tokens]
    assert losses.sum() == pytest.approx(sum(float(sums.sum()) for sums, _ in expected), rel=1e-5)


def test_no_more_than_asked_for_and_none_is_refused():
    model = init_model({"model_type": "gpt2", **SMALL, **CONFIGS["gpt2"]}, jax.random.key(0))
    features, tokens = target_features(model, samples(False, (2, 5, 1, 3)), (16,), 0, positions=6)
    assert features.shape == (6, 8)
    assert tokens.shape == (6,)
    with pytest.raises(InputError, match="there is no sample to take features of"):
        target_features(model, Encoded((), np.array([], int), 0), (16,), 0, positions=6)
