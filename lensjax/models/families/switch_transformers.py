"""Switch Transformer in Flax NNX: T5 in which some layers route each token to one of many expert MLPs.

References
----------
Fedus, Zoph and Shazeer 2022, Switch Transformers: Scaling to Trillion Parameter Models.
Zoph et al. 2022, ST-MoE: Designing Stable and Transferable Sparse Expert Models (the router's z-loss).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import layers
from lensjax.models.families.t5 import MLP, T5, UNUSED, Block, Stack, T5Config, copies, rules
from lensjax.models.lora import with_dropout
from lensjax.models.registry import Rule, Table, positive, transposed


@dataclasses.dataclass(frozen=True)
class SwitchConfig(T5Config):
    """Configuration of Switch Transformer: T5's, and the settings of the experts under their names in config.json.

    Attributes
    ----------
    num_experts : int
        Expert MLPs of a sparse layer.
    expert_capacity : int
        How many tokens of one sample an expert processes at most.
    encoder_sparse_step, decoder_sparse_step : int
        One of so many layers is sparse, beginning with the second; 1 makes all layers sparse, 0 none.
    router_bias : bool
    router_jitter_noise : float
        With dropout, the router's inputs are multiplied by uniform numbers between 1 - this and 1 + this.
    router_z_loss_coef, router_aux_loss_coef : float
        Weights of the two terms of `SwitchTransformer.router_loss`.
    """

    num_experts: int = 8
    expert_capacity: int = 64
    encoder_sparse_step: int = 2
    decoder_sparse_step: int = 2
    router_bias: bool = False
    router_jitter_noise: float = 0.01
    router_z_loss_coef: float = 0.001
    router_aux_loss_coef: float = 0.001

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32128,
        "d_model": 768,
        "d_ff": 2048,
        "num_layers": 12,
        "num_heads": 12,
    }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> SwitchConfig:
        """Read a config.json; see `ModelConfig.from_dict`."""
        if raw.get("router_dtype", "float32") != "float32":
            raise InputError(f"{source}: router_dtype is {raw['router_dtype']!r}; only 'float32' is supported.")
        count = positive(raw, "num_layers", cls.DEFAULTS["num_layers"], source)
        steps = {}
        for stack, total in (("encoder", count), ("decoder", positive(raw, "num_decoder_layers", count, source))):
            sparse = raw.get(f"num_sparse_{stack}_layers", 3)
            # An explicit step takes precedence over the number of sparse layers.
            steps[stack] = raw.get(f"{stack}_sparse_step", total // sparse if sparse > 0 else total)
        tied = raw.get("tie_word_embeddings", True)
        optional = ("router_bias", "router_jitter_noise", "router_z_loss_coef", "router_aux_loss_coef")
        return cls.read(
            raw,
            source,
            activation=raw.get("dense_act_fn", "relu"),
            tie_word_embeddings=tied,
            scale_decoder_outputs=tied,
            num_experts=positive(raw, "num_experts", 8, source),
            expert_capacity=positive(raw, "expert_capacity", 64, source),
            encoder_sparse_step=steps["encoder"],
            decoder_sparse_step=steps["decoder"],
            **{name: raw[name] for name in optional if name in raw},
        )

    def is_sparse(self, layer: int, *, decoder: bool) -> bool:
        """Return whether a layer of the encoder or decoder, counted from 0, is sparse."""
        step = self.decoder_sparse_step if decoder else self.encoder_sparse_step
        return step == 1 or (step > 0 and layer % step == 1)


@dataclasses.dataclass(frozen=True)
class Routing:
    """Sums over a sample's tokens and the sparse layers, from which the router loss is computed.

    Attributes
    ----------
    log_z : float array (N,)
        Squared log-sum-exp of the router logits.
    chosen, probability : float arrays (N, E)
        For each expert, the number of tokens for which it is the most probable, and its probabilities.
    """

    log_z: jax.Array
    chosen: jax.Array
    probability: jax.Array

    @classmethod
    def zero(cls, samples: int, experts: int) -> Routing:
        """Return zeros in JAX's default float dtype."""
        dtype = jnp.result_type(float)
        return cls(jnp.zeros(samples, dtype), *(jnp.zeros((samples, experts), dtype) for _ in range(2)))


jax.tree_util.register_dataclass(Routing, ["log_z", "chosen", "probability"], [])


class SparseMLP(nnx.Module):
    """Expert MLPs, one of which is chosen for each token; tokens beyond an expert's capacity get zero."""

    EXPERTS: ClassVar[tuple[str, ...]] = ("inner", "out")
    """The matrices with a leading axis over experts."""

    def __init__(self, config: SwitchConfig, dtype: Any, rngs: nnx.Rngs):
        shape = (config.num_experts, config.width, config.d_ff)
        init = layers.normal(config.initializer_factor * config.width**-0.5)
        self.router = nnx.Linear(
            config.width,
            config.num_experts,
            use_bias=config.router_bias,
            param_dtype=dtype,
            kernel_init=layers.normal(config.initializer_factor),
            rngs=rngs,
        )
        self.inner = nnx.Param(init(rngs.params(), shape, dtype))
        self.out = nnx.Param(init(rngs.params(), (shape[0], shape[2], shape[1]), dtype))
        self.config = config

    def __call__(self, x: jax.Array, real: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Routing]:
        """Apply to x (N*T, d) with the mask (N, T) of real tokens."""
        config, (samples, length) = self.config, real.shape
        jitter_key, inner_key = layers.split_key(key, 2)
        at_least_float32 = jnp.promote_types(jnp.float32, x.dtype)
        router_input = x.astype(at_least_float32)
        if jitter_key is not None and config.router_jitter_noise > 0:
            noise = config.router_jitter_noise
            jitter = jax.random.uniform(jitter_key, router_input.shape, router_input.dtype, 1.0 - noise, 1.0 + noise)
            router_input = router_input * jitter
        logits = self.router(router_input).reshape(samples, length, -1)
        probability = jax.nn.softmax(logits, axis=-1)
        rounded = probability.astype(x.dtype)
        choice = jax.lax.argmax(rounded, 2, jnp.int32)
        chosen = jax.nn.one_hot(choice, config.num_experts, dtype=jnp.int32)

        # Padding queues behind the real tokens, so it never takes their slots.
        is_real = (real != 0)[..., None]
        chosen_real = chosen * is_real
        behind_real = jnp.cumsum(chosen - chosen_real, 1) + chosen_real.sum(1, keepdims=True)
        queue = jnp.where(is_real, jnp.cumsum(chosen_real, 1), behind_real)
        place = jnp.sum(queue * chosen, axis=-1, dtype=jnp.int32) - 1
        capacity = min(config.expert_capacity, length)
        slots = config.num_experts * capacity
        # The slot of each token, and the token of each slot; an index one past the end means none.
        slot = jnp.where(place < capacity, choice * capacity + place, slots)
        sample = jnp.arange(samples, dtype=jnp.int32)[:, None]
        token = jnp.full((samples, slots + 1), samples * length, jnp.int32)
        token = token.at[sample, slot].set(sample * length + jnp.arange(length, dtype=jnp.int32), mode="drop")[
            :, :slots
        ]

        zero = jnp.zeros((1, config.width), x.dtype)
        tokens = jnp.concatenate([x, zero])[token.reshape(samples, config.num_experts, capacity)]
        inner = layers.ACTIVATIONS[config.activation](layers.per_expert(self.inner, tokens))
        inner = layers.drop(inner, config.dropout_rate, inner_key)
        outputs = layers.per_expert(self.out, inner).reshape(-1, config.width)
        source = jnp.where(slot < slots, sample * slots + slot, samples * slots)
        y = jnp.concatenate([outputs, zero])[source.reshape(-1)] * rounded.max(axis=-1).reshape(-1, 1)

        log_z = jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2, axis=1)
        return y, Routing(log_z, chosen.sum(1).astype(logits.dtype), probability.sum(1))


class SparseBlock(Block):
    """A layer of T5 with a sparse or a dense MLP, which also sums the statistics of the router."""

    def __call__(  # type: ignore[override]  # the layers pass on the router's sums besides the residual stream
        self,
        carry: tuple[jax.Array, Routing],
        key: jax.Array | None,
        mask: jax.Array,
        real: jax.Array,
        bias: jax.Array,
        memory: jax.Array | None,
        memory_mask: jax.Array | None,
    ) -> tuple[jax.Array, Routing]:
        """Apply the layer to the residual stream (N*T, d) and the router's sums over the layers before it."""
        x, routing = carry
        attend_key, inner_key, out_key = layers.split_key(key, 3)
        x = self.attend(x, attend_key, mask, bias, memory, memory_mask)
        if isinstance(self.mlp, SparseMLP):
            y, added = self.mlp(self.mlp_norm(x), real, inner_key)
            routing = jax.tree.map(lambda total, part: total + part.astype(total.dtype), routing, added)
        else:
            y = self.mlp(self.mlp_norm(x), inner_key)
        return x + layers.drop(y, self.config.dropout_rate, out_key), routing


class SwitchTransformer(T5):
    """Switch Transformer with its language-model head.

    Notes
    -----
    `loss_sums` is the cross-entropy only, as transformers' loss is by default. The router's losses are means over the
    whole batch there, so they are computed separately, by `router_loss`.
    An expert's capacity applies to each sample, as in transformers 5: the other samples of a batch have no influence.
    Padding gets a slot only after the sample's real tokens; in transformers this holds for padding on the right only.
    """

    config: SwitchConfig

    def blocks(self, count: int, cross: bool, dtype: Any, rngs: nnx.Rngs) -> list[Any]:
        """Return the layers of the encoder or, with `cross`, of the decoder."""
        kinds = [SparseMLP if self.config.is_sparse(i, decoder=cross) else MLP for i in range(count)]
        return [SparseBlock(self.config, kind, cross, dtype, rngs) for kind in kinds]

    def route(
        self,
        stack: Stack,
        ids: jax.Array,
        real: jax.Array,
        mask: jax.Array,
        key: jax.Array | None,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Run the encoder or decoder as `T5.run` does; `real` is the mask (N, T) of real tokens."""
        config, (samples, length) = self.config, ids.shape
        embed_key, layers_key, last_key = layers.split_key(key, 3)
        x = layers.drop(self.tokens(ids.reshape(-1)), config.dropout_rate, embed_key)
        keys = layers.keys_per_layer(layers_key, len(stack.layers))
        start: Any = (x, Routing.zero(samples, config.num_experts))
        end: Any = self.run_layers(
            stack.layers,
            start,
            keys,
            mask,
            real,
            stack.bias(length, bidirectional=memory is None),
            memory,
            memory_mask,
        )
        x = layers.drop(stack.norm(end[0]), config.dropout_rate, last_key)
        return x.reshape(samples, length, config.width), end[1]

    def route_encoder(self, ids: jax.Array, real: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Routing]:
        """Run the encoder on token ids and mask (N, S); see `route`."""
        return self.route(self.encoder, ids, real, layers.padding_mask(real), key)

    def route_decoder(
        self, ids: jax.Array, real: jax.Array, encoded: jax.Array, encoder_real: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, Routing]:
        """Run the decoder on token ids and mask (N, T), and the encoder's output (N, S, d) and mask (N, S)."""
        memory = encoded.reshape(-1, self.config.width)
        return self.route(
            self.decoder, ids, real, layers.causal_mask(real), key, memory, layers.padding_mask(encoder_real)
        )

    def encode(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the encoder's output (N, S, d); see `Seq2SeqLM`."""
        return self.route_encoder(input_ids, attention_mask, dropout_key)[0]

    def decode(
        self,
        decoder_input_ids: jax.Array,
        decoder_attention_mask: jax.Array,
        encoded: jax.Array,
        attention_mask: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the inputs (N, T, d) of the head; see `Seq2SeqLM`."""
        x = self.route_decoder(decoder_input_ids, decoder_attention_mask, encoded, attention_mask, dropout_key)[0]
        return x * self.config.width**-0.5 if self.config.scale_decoder_outputs else x

    def router_loss(self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the weighted sum of the router's z-loss and load-balancing loss for each sample.

        Parameters
        ----------
        batch, dropout_key
            As in `loss_sums`; the same key gives the same dropout.

        Returns
        -------
        float array (N,)
            transformers adds its mean to the mean loss with output_router_logits=True. As there, all positions count,
            including padding, so this loss (and no other result) depends on the padding; and an encoder or decoder
            whose layers are all sparse, or none of them, contributes 0.
        """
        labels = jnp.asarray(batch["labels"])
        ids, decoder_ids = batch["input_ids"], self.shift_right(labels)
        real = batch.get("attention_mask")
        real = jnp.ones(ids.shape, jnp.int32) if real is None else real
        keys = layers.split_key(dropout_key, 2)
        model = with_dropout(self, dropout_key)
        encoded, encoder = model.route_encoder(ids, real, keys[0])
        decoder = model.route_decoder(decoder_ids, jnp.ones(labels.shape, jnp.int32), encoded, real, keys[1])[1]
        config = self.config
        total = jnp.zeros(labels.shape[0], encoder.log_z.dtype)
        for routing, length, step, count, is_decoder in (
            (encoder, ids.shape[1], config.encoder_sparse_step, config.layers, False),
            (decoder, labels.shape[1], config.decoder_sparse_step, config.decoder_layers, True),
        ):
            tokens = length * sum(config.is_sparse(i, decoder=is_decoder) for i in range(count))
            if step <= 1 or tokens == 0:
                continue
            balance = jnp.sum(routing.chosen * routing.probability, axis=1) * config.num_experts / tokens**2
            total = total + config.router_z_loss_coef * routing.log_z / tokens + config.router_aux_loss_coef * balance
        return total


def _stack_transposed(arrays: Any) -> np.ndarray:
    return np.stack([array.T for array in arrays])


def _unstack_transposed(array: np.ndarray) -> list[np.ndarray]:
    return [part.T for part in array]


def table(config: SwitchConfig) -> Table:
    """Return how a Hugging Face checkpoint stores the parameters; its linear layers store (out, in)."""
    result = rules(config, "mlp")
    for stack, last in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{stack}.layers.{{i}}.mlp", f"{stack}.block.{{i}}.layer.{last}.mlp"
        result.append(transposed(f"{ours}.router.kernel", f"{theirs}.router.classifier.weight"))
        result.append(Rule(f"{ours}.router.bias", f"{theirs}.router.classifier.bias"))
        for part, name in (("inner", "wi"), ("out", "wo")):
            experts = tuple(f"{theirs}.experts.expert_{e}.{name}.weight" for e in range(config.num_experts))
            result.append(Rule(f"{ours}.{part}", experts, _stack_transposed, _unstack_transposed))
    return Table(rules=tuple(result), copies=copies(config), ignored=UNUSED)
