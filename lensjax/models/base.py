"""Base classes of the language models: causal and encoder-decoder, with logits and a loss from the fused head."""

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
from lensjax.models.layers import Embedding, attention_implementation, split_key
from lensjax.models.lora import Lora, with_dropout
from lensjax.models.registry import ModelConfig


class LanguageModel(nnx.Module):
    """A language model: a pure function of its parameters after `nnx.split(model, nnx.Param, ...)`.

    The computation follows the dtype of the parameters, with at least float32 in norms, softmax and loss.

    Attributes
    ----------
    config : ModelConfig
    execution : {"unroll", "scan"}
        How the layers are executed, see `execution.run_layers`. Set it before `nnx.split`.
    remat : bool or str
        Whether the backward pass recomputes each layer instead of storing its activations, or the name of a policy of
        `jax.checkpoint_policies`, see `execution.checkpointed`. Set it before `nnx.split`.
    attention : {"auto", "plain", "xla", "cudnn"}
        How attention is computed, see `layers.attention_implementation`. Set it before `nnx.split`. On a GPU in half
        precision "auto" is flash attention, which supports neither forward mode nor second derivatives; "plain" does.
    lora : lensjax.models.lora.Lora or None
        The settings of the adapters, if `add_lora` added any.
    head_chunk : int or None
        For how many tokens at a time `loss_sums` computes logits, see `lensjax_kernels.head_cross_entropy`. Set it
        before `nnx.split`.
    tokens, head : layers.Embedding
        The token embeddings (V, d), and the head's weight (V, d); models whose head is tied to the embeddings have no
        `head`.
    """

    config: ModelConfig
    tokens: Embedding

    def __init__(self, config: ModelConfig):
        self.config = config
        self.execution = "unroll"
        self.remat: bool | str = False
        self.attention = "auto"
        self.lora: Lora | None = None
        self.head_chunk: int | None = None

    def run_layers(self, layers: Any, x: Any, per_layer: Any, *shared: Any) -> Any:
        """Run a stack of layers with this model's settings; see `execution.run_layers`."""
        with attention_implementation(self.attention):
            return run_layers(layers, x, per_layer, *shared, execution=self.execution, remat=self.remat)

    def head_weight(self) -> jax.Array:
        """Return the head's weight (V, d), which is the table of token embeddings where the two are tied."""
        table: Embedding = getattr(self, "head", self.tokens)
        return table.embedding[...]

    def head_bias(self) -> jax.Array | None:
        """Return the head's bias (V,), or None if it has none."""
        return None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return the logits (N, T, V) for the inputs (N, T, d) of the head."""
        flat = hidden.reshape(-1, hidden.shape[-1]) @ self.head_weight().T
        bias = self.head_bias()
        return (flat if bias is None else flat + bias).reshape(*hidden.shape[:-1], -1)

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
            Enables the dropout of the configuration; without a key the model is deterministic.

        Returns
        -------
        float array (N, T, V)
        """
        raise NotImplementedError

    def loss_sums(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the summed loss of each sample, without ever storing all logits.

        Parameters
        ----------
        batch : mapping
            input_ids (N, T), attention_mask (N, T; optional), and labels as in Hugging Face, -100 where there is no
            loss. The labels of causal models are (N, T) and not shifted: this method shifts them.
        dropout_key : PRNG key, optional
            Enables dropout.

        Returns
        -------
        loss_sum : float array (N,)
            In nats.
        token_count : int array (N,)
            Number of tokens that have a loss.
        """
        raise NotImplementedError

    def check_length(self, length: int) -> None:
        """Check that an input is not longer than the model allows.

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
    """A decoder that predicts each next token; a family implements `decode`."""

    def decode(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the inputs (N*T, d) of the head for token ids and mask (N, T)."""
        raise NotImplementedError

    def hidden(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the inputs (N, T, d) of the head; arguments as in `__call__`."""
        self.check_length(input_ids.shape[-1])
        mask = jnp.ones(input_ids.shape, jnp.int32) if attention_mask is None else attention_mask
        return self.decode(input_ids, mask, dropout_key=dropout_key).reshape(*input_ids.shape, -1)

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits (N, T, V) of each position's next token; see `LanguageModel`."""
        return self.logits(with_dropout(self, dropout_key).hidden(input_ids, attention_mask, dropout_key=dropout_key))

    def loss_sums(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the summed loss of each sample; see `LanguageModel`."""
        mask = batch.get("attention_mask")
        mask = jnp.ones_like(batch["input_ids"]) if mask is None else mask
        hidden = with_dropout(self, dropout_key).hidden(batch["input_ids"], mask, dropout_key=dropout_key)
        labels = next_token_labels(batch["labels"], mask)
        return loss_sums(hidden[:, :-1], self.head_weight(), labels, bias=self.head_bias(), chunk=self.head_chunk)


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig(ModelConfig):
    """The part of the configuration that all encoder-decoder models share.

    Attributes
    ----------
    layers : int
        Layers of the encoder.
    decoder_layers : int
        Layers of the decoder.
    decoder_start_token_id : int
        The decoder's first input.
    pad_token_id : int
        The decoder's input where a label is -100.
    """

    decoder_layers: int = 0
    decoder_start_token_id: int = 0
    pad_token_id: int = 0

    @property
    def is_encoder_decoder(self) -> bool:
        """True: the encoder reads the input and the decoder predicts the labels, in separate sequences."""
        return True


class Seq2SeqLM(LanguageModel):
    """An encoder and a decoder that attends to it; a family implements `encode` and `decode`."""

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
        """Return the inputs (N, T, d) of the head.

        Parameters
        ----------
        decoder_input_ids, decoder_attention_mask : arrays (N, T)
        encoded : float array (N, S, d)
            The encoder's output.
        attention_mask : array (N, S)
            The encoder's mask.
        dropout_key : PRNG key, optional
        """
        raise NotImplementedError

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
        if decoder_attention_mask is None:
            decoder_attention_mask = jnp.ones(decoder_input_ids.shape, jnp.int32)
        keys = split_key(dropout_key, 2)
        encoded = self.encode(input_ids, mask, dropout_key=keys[0])
        return self.decode(decoder_input_ids, decoder_attention_mask, encoded, mask, dropout_key=keys[1])

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits (N, T, V) of the token that follows each decoder input.

        Parameters
        ----------
        input_ids : int32 array (N, S)
            The encoder's tokens.
        attention_mask : int or bool array (N, S), optional
            0 at padding of `input_ids`, on either side.
        decoder_input_ids : int32 array (N, T)
            The decoder's tokens, beginning with the start token; `shift_right` computes them from labels.
        decoder_attention_mask : int or bool array (N, T), optional
            0 at padding of `decoder_input_ids`; not needed for padding on the right.
        dropout_key : PRNG key, optional
            Enables the dropout of the configuration.

        Raises
        ------
        InputError
            If there are no decoder inputs, or if a sequence is longer than the model allows.
        """
        if decoder_input_ids is None:
            raise InputError(
                f"This {self.config.model_type} model is an encoder-decoder and got no decoder_input_ids; "
                "make them from the labels with its shift_right."
            )
        hidden = with_dropout(self, dropout_key).hidden(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, dropout_key=dropout_key
        )
        return self.logits(hidden)

    def shift_right(self, labels: jax.Array) -> jax.Array:
        """Return the decoder's inputs for `labels` (N, T): the start token, then all labels but the last.

        -100 becomes the padding token. Labels are padded on the right, as transformers' collators do, so the decoder
        needs no mask: no real token follows the padding.
        """
        start = jnp.full_like(labels[:, :1], self.config.decoder_start_token_id)
        shifted = jnp.concatenate([start, labels[:, :-1]], axis=1)
        return jnp.where(shifted == IGNORED, self.config.pad_token_id, shifted)

    def loss_sums(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the summed cross-entropy of each sample; see `LanguageModel`.

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
    """Return the summed cross-entropy of each sample, computed with the fused head.

    Parameters
    ----------
    hidden : float array (N, T, d)
    weight : float array (V, d)
    labels : int array (N, T)
        Already shifted: `hidden[n, t]` predicts `labels[n, t]`. There is no loss where a label is -100.
    bias : float array (V,), optional
    chunk : int, optional
        For how many tokens at a time logits are computed.

    Returns
    -------
    loss_sum : float array (N,)
        In nats.
    token_count : int array (N,)
    """
    samples, length, width = hidden.shape
    losses = head_cross_entropy(
        hidden.reshape(samples * length, width), weight, labels.reshape(samples * length), bias=bias, chunk=chunk
    )
    return losses.reshape(samples, length).sum(axis=1), jnp.sum(labels != IGNORED, axis=1)
