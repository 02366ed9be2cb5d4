"""Outputs of language models as functions of (parameters, one example), for kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from lensjax_kernels.cross_entropy import IGNORED, next_token_labels

from lensjax.errors import InputError
from lensjax.tangents.frozen_model import FrozenModel, frozen_as_arguments

OUTPUTS = {
    "loss": "mean loss over the example's labelled tokens, nats per token",
    "loss_sum": "summed loss of the example, nats",
    "gold_probability": "mean probability of the labelled tokens",
    "gold_logit": "mean logit of the labelled tokens",
    "projections": "mean over the labelled tokens of 4 random projections of the logits; 4 outputs",
}
"""Possible outputs of a model, each with its definition and unit."""

PROJECTIONS = 4


def is_model(f: Any) -> bool:
    """Whether `f` has the interface of `lensjax.models.LanguageModel`, and so its own parameters."""
    return hasattr(f, "loss_sums") and callable(f)


def ntk_outputs(model: Any, output: str = "loss", *, seed: int = 0) -> tuple[ModelOutput, Any]:
    """Return (f, params) so that `f(params, example)` is the named output of a language model.

    Parameters
    ----------
    model : `lensjax.models.LanguageModel`, or any Flax NNX module with its `loss_sums(batch)` and `__call__`
        An example is a mapping of arrays without the batch axis: input_ids (T,), labels (T,), attention_mask (T,);
        for an encoder-decoder, whose `config.is_encoder_decoder` is true, labels (S,) have a length of their own.
    output : str
        One of `OUTPUTS`.
    seed : int
        Of the random projections.

    Returns
    -------
    f : ModelOutput
        Hashable; the same object for models of the same structure without frozen weights.
    params : nnx.State of the model's parameters

    Raises
    ------
    InputError
        If there is no such output.

    Notes
    -----
    Frozen weights, such as those under LoRA adapters, belong to `f`, which is a pytree with these as its leaves.
    `ntk`, `ntk_blocks` and the others hand them to their programs as arguments, and compile once for all models of the
    same structure. In a program of your own give it `f` as an argument too, or XLA keeps a copy of the weights in it:
    ``jax.jit(lambda f, params, x: f(params, x))(f, params, x)``.
    """
    if output not in OUTPUTS:
        raise InputError(f"output={output!r} is not known; choose one of {', '.join(OUTPUTS)}.")
    return ModelOutput.split(model, output, seed)


def model_function(model: Any, output: str) -> tuple[Any, Any]:
    """Return `ntk_outputs(model, output)`, with the arrays that the model holds beside its parameters as arguments."""
    return frozen_as_arguments(*ntk_outputs(model, output))


def split_model_args(f: Any, output: str, params: Any, *args: Any) -> tuple[Any, ...]:
    """Return (f, params, *args) of a call with a function, or with a model, which has no argument for its parameters.

    All arguments after a model are one position earlier; its last one may be given by name.

    Raises
    ------
    InputError
        If a model is given with parameters, or another function with an `output`.
    """
    if is_model(f):
        return (*model_function(f, output), *shift_args(f, params, *args))
    if output != "loss":
        raise InputError(
            f"output={output!r} is one of language models, but f is a {type(f).__name__} without `loss_sums`, "
            "which says itself what it returns; leave `output` out, or give a model of `lensjax.models`."
        )
    return (*frozen_as_arguments(f, params), *args)


def shift_args(model: Any, *args: Any) -> tuple[Any, ...]:
    """Return the arguments after the parameters of a call with a model, and so without parameters.

    Raises
    ------
    InputError
        If there is an argument for the parameters.
    """
    *others, before, last = args
    if before is not None and last is not None:
        raise InputError(
            f"{type(model).__name__} brings its own parameters, so of the {len(args)} arguments after it one is too "
            "many; leave the parameters out."
        )
    return (*others, before if last is None else last)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["frozen"], meta_fields=["graph", "output", "seed"])
@dataclasses.dataclass(frozen=True, eq=False)
class ModelOutput(FrozenModel):
    """A language model's output as a function of (parameters, one example); from `ntk_outputs`.

    Attributes
    ----------
    graph, frozen : see `FrozenModel`; the leaves of this pytree are those of `frozen`
    output, seed : as given to `ntk_outputs`
    """

    output: str
    seed: int

    def __call__(self, params: Any, example: Mapping[str, jax.Array]) -> jax.Array:
        """Return the output for one example."""
        model = self.model(params)
        batch = {name: value[None] for name, value in example.items()}
        if self.output in ("loss", "loss_sum"):
            total, tokens = model.loss_sums(batch)
            return total[0] if self.output == "loss_sum" else total[0] / jnp.maximum(tokens[0], 1)
        logits, labels = _labelled_logits(model, batch)
        weights = (labels != IGNORED) / jnp.maximum(jnp.sum(labels != IGNORED), 1)
        if self.output == "projections":
            signs = jax.random.rademacher(jax.random.key(self.seed), (logits.shape[-1], PROJECTIONS), logits.dtype)
            return weights.astype(logits.dtype) @ logits @ (signs / jnp.sqrt(logits.shape[-1]).astype(logits.dtype))
        scores = jax.nn.softmax(logits, axis=-1) if self.output == "gold_probability" else logits
        gold = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
        return jnp.sum(weights.astype(gold.dtype) * gold)


def _labelled_logits(model: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return one example's logits (T, V) and the label (T,) of each, -100 where nothing is to be predicted."""
    mask = batch.get("attention_mask")
    mask = jnp.ones_like(batch["input_ids"]) if mask is None else mask
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        labels = batch["labels"]
        return model(batch["input_ids"], mask, model.shift_right(labels))[0], labels[0]
    return model(batch["input_ids"], mask)[0, :-1], next_token_labels(batch["labels"], mask)[0]
