"""Features of a language model: the hidden states that its head predicts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lensjax.errors import InputError
from lensjax.tasks import Batch, Encoded, batches


def target_features(
    model: Any, encoded: Encoded, buckets: Sequence[int], pad_id: int, *, positions: int, batch_size: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Return hidden states from which target tokens are predicted, and these tokens, for `lensjax.selectors.log_me`.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
        As it is; adapters and dropout are not looked for.
    encoded : Encoded
        Read in the order of the padded lengths, the shorter samples first, until there are enough positions.
    buckets : sequence of int
        Padded lengths, ascending; one program is compiled for each.
    pad_id : int
    positions : int
        At most.
    batch_size : int

    Returns
    -------
    float array (N, d), int array (N,)
        Of at most `positions` target tokens. The first token of a text without input is predicted from nothing, and
        left out.

    Raises
    ------
    InputError
        If there is no sample.
    """
    graph, state = nnx.split(model)
    separate = getattr(model.config, "is_encoder_decoder", False)

    # The weights are an argument: closed over, they would be constants, copied into each program.
    @jax.jit
    def hidden(state: Any, batch: Batch) -> jax.Array:
        own = nnx.merge(graph, state)
        parts = (batch["input_ids"], batch["attention_mask"])
        if separate:
            return own.hidden(*parts, own.shift_right(batch["labels"]))
        return own.hidden(*parts)[:, :-1]

    found: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    for batch in batches(encoded, batch_size=batch_size, buckets=buckets, pad_id=pad_id):
        labels = batch["labels"] if separate else batch["labels"][:, 1:]
        kept = labels >= 0
        found.append(np.asarray(hidden(state, batch))[kept])
        tokens.append(labels[kept])
        if sum(map(len, tokens)) >= positions:
            break
    if not found:
        raise InputError("there is no sample to take features of; give at least one.")
    return np.concatenate(found)[:positions], np.concatenate(tokens)[:positions]
