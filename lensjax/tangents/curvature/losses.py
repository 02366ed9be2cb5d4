"""Losses in two parts, outputs and a loss of these: of any function, and the cross-entropy of language models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from lensjax_kernels.cross_entropy import IGNORED, next_token_labels

from lensjax.errors import InputError
from lensjax.tangents.frozen_model import FrozenModel, frozen_as_arguments
from lensjax.tangents.language_models import is_model, shift_args

CHUNK_ROWS = 512
CHUNK_ELEMENTS = 2**24
"""Limits of the tokens, and of the logits, that exist at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Composed:
    """A loss ``loss(outputs(params, batch), batch)``, whose Gauss-Newton matrix exists because the parts are known.

    Attributes
    ----------
    outputs : callable (params, batch) -> pytree of real arrays
    loss : callable (outputs, batch) -> real scalar
        Convex in the outputs if the Gauss-Newton matrix is to be positive semi-definite.
    """

    outputs: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], Any]

    def __call__(self, params: Any, batch: Any) -> Any:
        """Return the loss."""
        return self.loss(self.outputs(params, batch), batch)


def model_loss(model: Any) -> tuple[ModelLoss, Any]:
    """Return (f, params) so that `f(params, batch)` is a language model's mean loss, nats per labelled token.

    Parameters
    ----------
    model : `lensjax.models.LanguageModel`, or any Flax NNX module with its `loss_sums(batch)`
        A batch is a mapping: input_ids (N, T), labels (N, T), attention_mask (N, T).

    Returns
    -------
    f : ModelLoss
        Hashable; the same object for models of the same structure without frozen weights.
    params : nnx.State of the model's parameters

    Raises
    ------
    InputError
        By `f`, if a batch is not a mapping with input_ids and labels.

    Notes
    -----
    Frozen weights, such as those under LoRA adapters, belong to `f`, which is a pytree with these as its leaves.
    `hessian_trace`, `curvature_operator` and `per_example_quadratic_forms` hand them to their programs as
    arguments, and compile once for all models of the same structure. In a program of your own give it `f` as an
    argument too, or XLA keeps a copy of the weights in it: ``jax.jit(hvp)(f, params, v, batch)``.
    """
    return ModelLoss.split(model, hasattr(model, "shift_right"))


def split_loss_args(f: Any, params: Any, *args: Any) -> tuple[Any, ...]:
    """Return (f, params, *args) of a call, as `split_model_args` does, with a model's mean loss as the function.

    Raises
    ------
    InputError
        If a model is given with parameters.
    """
    if is_model(f):
        return (*frozen_as_arguments(*model_loss(f)), *shift_args(f, params, *args))
    return (*frozen_as_arguments(f, params), *args)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["frozen"], meta_fields=["graph", "separate"])
@dataclasses.dataclass(frozen=True, eq=False)
class ModelLoss(FrozenModel):
    """The cross-entropy of a language model as a function of its parameters; from `model_loss`.

    Attributes
    ----------
    graph, frozen : see `FrozenModel`; the leaves of this pytree are those of `frozen`
    separate : bool
        Whether the labels are those of a separate decoder.
    """

    separate: bool

    def sample_sums(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Return each sample's summed loss, nats, and labelled tokens, (N,) both."""
        _check(batch)
        return self.model(params).loss_sums(batch)

    def sums(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Return the summed loss, nats, and the labelled tokens."""
        losses, tokens = self.sample_sums(params, batch)
        return losses.sum(), tokens.sum()

    def __call__(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return the mean loss over labelled tokens, 0 where there are none."""
        total, tokens = self.sums(params, batch)
        return total / jnp.maximum(tokens, 1)

    def tokens(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return the number of labelled tokens."""
        return jnp.sum(self._labels(batch) != IGNORED)

    def _labels(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return the label of each row of the head's inputs, flat."""
        _check(batch)
        labels = jnp.asarray(batch["labels"])
        if not self.separate:
            labels = next_token_labels(labels, self._mask(batch))
        return labels.reshape(-1)

    @staticmethod
    def _mask(batch: Mapping[str, jax.Array]) -> jax.Array:
        mask = batch.get("attention_mask")
        return jnp.ones_like(batch["input_ids"]) if mask is None else jnp.asarray(mask)

    def head_inputs(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        """Return the inputs (M, d) of the head, its weight (V, d), and its bias (V,) if there is one.

        Raises
        ------
        InputError
            If the model does not provide them.
        """
        model = self.model(params)
        if not (hasattr(model, "hidden") and hasattr(model, "head_weight")):
            raise InputError(
                f"{type(model).__name__} has no `hidden` and `head_weight`, which its Gauss-Newton matrix needs; "
                "give Composed(outputs, loss) with the logits as outputs."
            )
        mask = self._mask(batch)
        if self.separate:
            hidden = model.hidden(batch["input_ids"], mask, model.shift_right(jnp.asarray(batch["labels"])))
        else:
            hidden = model.hidden(batch["input_ids"], mask)[:, :-1]
        bias = model.head_bias() if hasattr(model, "head_bias") else None
        inputs = (hidden.reshape(-1, hidden.shape[-1]), model.head_weight())
        return inputs if bias is None else (*inputs, bias)

    def head_gauss_newton(
        self, batch: Mapping[str, jax.Array], inputs: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """Return the Gauss-Newton product of the summed cross-entropy with respect to the head's inputs."""
        return head_gauss_newton(inputs, tangents, self._labels(batch))


def _check(batch: Any) -> None:
    """Raise InputError unless it is a language model's batch."""
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(
            f"a language model's batch must be a mapping with input_ids and labels, not {found}; one of "
            "`lensjax.tasks.batches` is, and one from a tokenizer after labels are added."
        )


def head_gauss_newton(
    inputs: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...], labels: jax.Array, *, chunk: int | None = None
) -> tuple[jax.Array, ...]:
    """Return J^T H_out J v of the summed cross-entropy of a head, with the logits as outputs, chunk by chunk.

    Parameters
    ----------
    inputs : (hidden (M, d), weight (V, d)), and the bias (V,) if there is one
        Logits are ``hidden @ weight.T + bias``.
    tangents : like `inputs`
        The vector v.
    labels : int array (M,)
        Rows with -100 have no loss; the labels of the others make no difference.
    chunk : int, optional
        Rows whose logits exist at once. Default: 512, fewer for a large vocabulary.

    Returns
    -------
    tuple like `inputs`
    """
    rows, vocabulary = inputs[0].shape[0], inputs[1].shape[0]
    chunk = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)) if chunk is None else chunk
    pieces = max(1, -(-rows // chunk))
    size = -(-rows // pieces)
    pad = pieces * size - rows

    def cut(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, pad), *((0, 0),) * (a.ndim - 1))).reshape(pieces, size, *a.shape[1:])

    wide = jnp.promote_types(jnp.float32, inputs[0].dtype)
    weight, d_weight = (a[1].astype(wide) for a in (inputs, tangents))
    counted = cut((labels != IGNORED).astype(wide))

    def piece(sums: tuple[jax.Array, ...], one: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        hidden, d_hidden, counts = (a.astype(wide) for a in one)
        logits = hidden @ weight.T
        change = d_hidden @ weight.T + hidden @ d_weight.T
        if len(inputs) == 3:
            logits, change = logits + inputs[2].astype(wide), change + tangents[2].astype(wide)
        probabilities = jax.nn.softmax(logits, axis=1)
        mean = jnp.sum(probabilities * change, axis=1, keepdims=True)
        logits_product = probabilities * (change - mean) * counts[:, None]
        weight_products = (logits_product.T @ hidden, logits_product.sum(0))[: len(sums)]
        return tuple(a + b for a, b in zip(sums, weight_products, strict=True)), logits_product @ weight

    start = tuple(jnp.zeros(a.shape, wide) for a in inputs[1:])
    sums, d_out = jax.lax.scan(piece, start, (cut(inputs[0]), cut(tangents[0]), counted))
    out = (d_out.reshape(pieces * size, -1)[:rows], *sums)
    return tuple(a.astype(b.dtype) for a, b in zip(out, inputs, strict=True))
