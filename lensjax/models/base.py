"""What every language model offers, and what causal and encoder-decoder ones share: logits and the fused-head loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from lensjax_kernels import head_cross_entropy
from lensjax_kernels.cross_entropy import IGNORED, next_token_labels

from lensjax.errors import InputError
from lensjax.models.execution import run_layers
from lensjax.models.layers import attention_implementation
from lensjax.models.lora import Lora, with_dropout
from lensjax.models.registry import ModelConfig


class LanguageModel(nnx.Module):
    """A language model: a pure function of its parameters after `nnx.split(model, nnx.Param, ...)`.

    The computation follows the dtype of the parameters, with at least float32 in norms, softmax and loss.

    Attributes
    ----------
    config : ModelConfig
    execution : {"unroll", "scan"}
        How the layers are run, see `execution.run_layers`; set before `nnx.split`.
    remat : bool or str
        Whether the backward pass recomputes each layer instead of keeping its activations, or the name of a policy of
        `jax.checkpoint_policies`, see `execution.checkpointed`; set before `nnx.split`.
    attention : {"auto", "plain", "xla", "cudnn"}
        How attention is computed, see `layers.attention_implementation`; set before `nnx.split`. On a GPU in half
        precision "auto" is flash attention, which has no forward mode and no second derivative: "plain" has both.
    lora : lensjax.models.lora.Lora or None
        The settings of its adapters, if it has some from `add_lora`.
    head_chunk : int or None
        Tokens whose logits exist at once in `loss_sums`, see `lensjax_kernels.head_cross_entropy`; set before
        `nnx.split`.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig):
        self.config = config
        self.execution = "unroll"
        self.remat: bool | str = False
        self.attention = "auto"
        self.lora: Lora | None = None
        self.head_chunk: int | None = None

    def run_layers(self, layers: Any, x: Any, each: Any, *shared: Any) -> Any:
        """Run `x = layer(x, each[i], *shared)` through a stack as this model is set; see `execution.run_layers`."""
        with attention_implementation(self.attention):
            return run_layers(layers, x, each, *shared, execution=self.execution, remat=self.remat)

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits.

        Parameters
        ----------
        input_ids : int32 array (N, T)
        attention_mask : int or bool array (N, T), optional
            0 at padding, on either side.
        dropout_key : PRNG key, optional
            Turns the configuration's dropout on; without it the model is deterministic.

        Returns
        -------
        float array (N, T, V)
        """
        raise NotImplementedError

    def loss_sums(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Sum the loss of each sample without ever keeping all logits.

        Parameters
        ----------
        batch : mapping
            input_ids (N, T), attention_mask (N, T; optional), labels as in Hugging Face: -100 where there is no loss;
            for causal models (N, T) at the positions of input_ids, for the shift happens here.
        dropout_key : PRNG key, optional
            Turns dropout on.

        Returns
        -------
        loss_sum : float array (N,), nats; token_count : int array (N,), tokens that have a loss.
        """
        raise NotImplementedError

    def check_length(self, length: int) -> None:
        """Refuse an input longer than the model has positions.

        Raises
        ------
        InputError
        """
        if self.config.max_length is not None and length > self.config.max_length:
            raise InputError(
                f"The input is {length} tokens long, but this {self.config.model_type} model has "
                f"{self.config.max_length} positions; shorten the input."
            )


class CausalLM(LanguageModel):
    """A decoder that predicts each next token: a family brings `hidden` and `head_weight`."""

    def hidden(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the inputs (N, T, d) of the head; arguments as in `__call__`."""
        raise NotImplementedError

    def head_weight(self) -> jax.Array:
        """Return the head's weight (V, d)."""
        raise NotImplementedError

    def head_bias(self) -> jax.Array | None:
        """Return the head's bias (V,), if it has one."""
        return None

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits (N, T, V) of each position's next token; see `LanguageModel`."""
        hidden = with_dropout(self, dropout_key).hidden(input_ids, attention_mask, dropout_key=dropout_key)
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.head_weight().T
        bias = self.head_bias()
        return (logits if bias is None else logits + bias).reshape(*input_ids.shape, -1)

    def loss_sums(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Sum the loss of each sample; see `LanguageModel`."""
        mask = batch.get("attention_mask")
        mask = jnp.ones_like(batch["input_ids"]) if mask is None else mask
        hidden = with_dropout(self, dropout_key).hidden(batch["input_ids"], mask, dropout_key=dropout_key)
        labels = next_token_labels(batch["labels"], mask)
        return loss_sums(hidden[:, :-1], self.head_weight(), labels, bias=self.head_bias(), chunk=self.head_chunk)


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig(ModelConfig):
    """What every encoder-decoder's configuration says besides.

    Attributes
    ----------
    layers : int
        Layers of the encoder.
    decoder_layers : int
        Layers of the decoder.
    decoder_start_token_id : int
        What the decoder reads before the first target token.
    pad_token_id : int
        What the decoder reads where a label is -100.
    """

    decoder_layers: int = 0
    decoder_start_token_id: int = 0
    pad_token_id: int = 0

    @property
    def is_encoder_decoder(self) -> bool:
        """True: inputs go to the encoder and labels to the decoder, in sequences of their own."""
        return True


class Seq2SeqLM(LanguageModel):
    """An encoder and a decoder that attends to it: a family brings `encode`, `decode` and `head_weight`."""

    config: Seq2SeqConfig

    def encode(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the encoder's output (N, S, d) for token ids and mask (N, S)."""
        raise NotImplementedError

    def decode(
        self,
        decoder_input_ids: jax.Array,
        decoder_attention_mask: jax.Array,
        encoded: jax.Array,
        attention_mask: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the inputs (N, T, d) of the head for decoder ids and mask (N, T) and an encoded input (N, S, d)."""
        raise NotImplementedError

    def head_weight(self) -> jax.Array:
        """Return the head's weight (V, d)."""
        raise NotImplementedError

    def head_bias(self) -> jax.Array | None:
        """Return the head's bias (V,), if it has one."""
        return None

    def hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        decoder_input_ids: jax.Array,
        decoder_attention_mask: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the inputs (N, T, d) of the head; arguments as in `__call__`."""
        self.check_length(max(input_ids.shape[-1], decoder_input_ids.shape[-1]))
        mask = jnp.ones(input_ids.shape, jnp.int32) if attention_mask is None else attention_mask
        decoder_mask = decoder_attention_mask
        decoder_mask = jnp.ones(decoder_input_ids.shape, jnp.int32) if decoder_mask is None else decoder_mask
        keys: tuple[jax.Array | None, ...] = (None, None)
        if dropout_key is not None:
            keys = tuple(jax.random.split(dropout_key))
        encoded = self.encode(input_ids, mask, dropout_key=keys[0])
        return self.decode(decoder_input_ids, decoder_mask, encoded, mask, dropout_key=keys[1])

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits (N, T, V) of the token after each of the decoder's.

        Parameters
        ----------
        input_ids : int32 array (N, S)
            The encoder's tokens.
        attention_mask : int or bool array (N, S), optional
            0 at padding of `input_ids`, on either side.
        decoder_input_ids : int32 array (N, T)
            The decoder's tokens, the start token first; `shift_right` makes them from labels.
        decoder_attention_mask : int or bool array (N, T), optional
            0 at padding of `decoder_input_ids`; padding on the right needs none.
        dropout_key : PRNG key, optional
            Turns the configuration's dropout on.

        Raises
        ------
        InputError
            If there are no decoder inputs, or if a sequence is longer than the model has positions.
        """
        if decoder_input_ids is None:
            raise InputError(
                f"This {self.config.model_type} model is an encoder-decoder and got no decoder_input_ids; "
                "make them from the labels with its shift_right."
            )
        hidden = with_dropout(self, dropout_key).hidden(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, dropout_key=dropout_key
        )
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.head_weight().T
        bias = self.head_bias()
        return (logits if bias is None else logits + bias).reshape(*decoder_input_ids.shape, -1)

    def shift_right(self, labels: jax.Array) -> jax.Array:
        """Return what the decoder reads to predict `labels` (N, T): the start token, then all labels but the last.

        -100 becomes the padding token. Labels are padded on the right, as transformers' collators do; the decoder
        then needs no mask, for no real token comes after the padding.
        """
        start = jnp.full_like(labels[:, :1], self.config.decoder_start_token_id)
        shifted = jnp.concatenate([start, labels[:, :-1]], axis=1)
        return jnp.where(shifted == IGNORED, self.config.pad_token_id, shifted)

    def loss_sums(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Sum the cross-entropy of each sample; see `LanguageModel`.

        Parameters
        ----------
        batch : mapping
            input_ids (N, S) and attention_mask (N, S; optional) for the encoder; labels (N, T) for the decoder, not
            shifted, -100 where there is no loss, padded on the right.
        dropout_key : PRNG key, optional
        """
        labels = jnp.asarray(batch["labels"])
        hidden = with_dropout(self, dropout_key).hidden(
            batch["input_ids"], batch.get("attention_mask"), self.shift_right(labels), dropout_key=dropout_key
        )
        return loss_sums(hidden, self.head_weight(), labels, bias=self.head_bias(), chunk=self.head_chunk)


def loss_sums(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum the cross-entropy of each sample through the fused head.

    Parameters
    ----------
    hidden : float array (N, T, d)
    weight : float array (V, d)
    labels : int array (N, T)
        Already shifted: `labels[n, t]` is what `hidden[n, t]` predicts; -100 has no loss.
    bias : float array (V,), optional
    chunk : int, optional
        Tokens whose logits exist at once.

    Returns
    -------
    loss_sum : float array (N,), nats; token_count : int array (N,).
    """
    samples, length, width = hidden.shape
    losses = head_cross_entropy(
        hidden.reshape(samples * length, width), weight, labels.reshape(samples * length), bias=bias, chunk=chunk
    )
    return losses.reshape(samples, length).sum(axis=1), jnp.sum(labels != IGNORED, axis=1)
