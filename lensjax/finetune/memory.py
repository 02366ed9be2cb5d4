"""How much memory fine-tuning takes, before any weight is loaded and anything compiled."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from lensjax.finetune.config import Plan
from lensjax.finetune.step import cast, compute_dtype, gradient_function, loss_function
from lensjax.models import Lora, abstract_model, parameter_counts
from lensjax.models.registry import ModelConfig
from lensjax.tangents.program.ir import called

MARGIN = 1.3
"""What XLA takes beside the weights over what `live_bytes` counts: 1.1 to 1.35 on CPU, see benchmarks/forecast.py."""

FUSED = frozenset(
    {
        *("abs", "add", "add_any", "and", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "div"),
        *("eq", "expand_dims", "ge", "gt", "integer_pow", "iota", "le", "lt", "max", "min", "mul", "ne", "neg", "not"),
        *("or", "pad", "reshape", "select_n", "sign", "slice", "square", "squeeze", "stop_gradient", "sub"),
        "transpose",
    }
)
"""Operations that XLA computes where their result is needed instead of keeping it."""

FUSED_INPUTS = 8  # results made of more arrays than that are kept
TRACED = (2, 4)  # layers of large models
PATTERNED = frozenset({"gemma3_text", "switch_transformers"})
"""Families whose layers differ from each other."""

LOOPS = frozenset({"scan", "while"})


def live_bytes(jaxpr: core.Jaxpr) -> int:
    """Return how many bytes exist at once, at most, beside the inputs, if a program runs as it is written.

    Each result is freed after its last use; those of cheap elementwise operations (`FUSED`) never exist, and what they
    are made of lives until the last use of theirs.
    """
    return _live(jaxpr, {})


def _live(jaxpr: core.Jaxpr, known: dict[int, int]) -> int:
    if id(jaxpr) in known:
        return known[id(jaxpr)]
    nothing: frozenset[Any] = frozenset()
    made_of: dict[Any, frozenset[Any]] = {}  # for each result, the arrays that must exist for it

    def arrays(variables: Iterable[Any]) -> frozenset[Any]:
        found = (nothing if isinstance(v, core.Literal) else made_of.get(v, nothing) for v in variables)
        return nothing.union(*found)

    last: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        sources = arrays(equation.invars)
        fused = equation.primitive.name in FUSED and len(sources) <= FUSED_INPUTS
        for result in equation.outvars:
            made_of[result] = sources if fused else frozenset([result])
        last |= dict.fromkeys(sources | arrays(equation.outvars), number)
    last |= dict.fromkeys(arrays(jaxpr.outvars), len(jaxpr.eqns))
    freed: dict[int, list[Any]] = {}
    for array, number in last.items():
        freed.setdefault(number, []).append(array)
    live = most = 0
    for number, equation in enumerate(jaxpr.eqns):
        new = sum(_bytes(v.aval) for v in equation.outvars if made_of[v] == {v})
        inside = max((_live(_bare(part), known) for part in called(equation)), default=0)
        # A loop's results are there while its body runs; other calls make theirs themselves.
        most = max(most, live + (new + inside if equation.primitive.name in LOOPS else max(new, inside)))
        live += new - sum(_bytes(array.aval) for array in freed.get(number, ()))
    known[id(jaxpr)] = most
    return most


def _bare(program: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


def _bytes(aval: Any) -> int:
    # Random keys have a type of their own, and are small.
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 16)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a fine-tuning run keeps in the memory of one device, in bytes.

    Attributes
    ----------
    weights : int
        The untouched weights, the present and the best ones, and another copy while the best ones are replaced.
    optimiser : int
        The two moments of AdamW.
    working : int
        Gradients, what the backward pass needs of the forward pass, and all else that a step makes; or an evaluation,
        where that takes more.
    """

    weights: int
    optimiser: int
    working: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.optimiser + self.working


def footprint(
    config: ModelConfig,
    plan: Plan,
    *,
    batch_size: int,
    length: int,
    platform: str,
    devices: int = 1,
    full: bool = False,
    parallel_trials: int = 1,
    limit: float = math.inf,
) -> Footprint:
    """Estimate the memory of fine-tuning from shapes alone; erring upwards.

    Parameters
    ----------
    config : ModelConfig
    plan : Plan
        Its `lora`, `micro_batch`, `precision` and `dropout` count.
    batch_size : int
        Samples of the largest batch; an evaluation takes it whole, whatever the micro-batch.
    length : int
        Tokens of the longest padded row.
    platform : {"cpu", "gpu", "tpu"}
    devices : int
        That share the samples of a batch.
    full : bool
        Whether they share weights and optimiser state too.
    parallel_trials : int
        Learning rates trained at once.
    limit : float
        Bytes; where weights and optimiser alone take more, the rest is not worked out and left at 0.
    """
    half = plan.precision == "bfloat16" or (plan.precision == "auto" and platform != "cpu")
    total, trained = weight_counts(config, plan.lora)
    frozen = total - trained
    share = devices if full else 1
    lasting = Footprint(
        weights=-(-(16 * parallel_trials * trained + (2 if half else 4) * frozen) // share),
        optimiser=-(-8 * parallel_trials * trained // share),
        working=0,
    )
    if lasting.total > limit:
        return lasting
    # On CPU, XLA computes in float32 what is asked for in bfloat16.
    traced = "bfloat16" if half and platform != "cpu" else "float32"
    rows = min(batch_size, plan.micro_batch or batch_size)
    on_each = max(1, -(-rows // devices))
    # In micro-batches, the gradients exist twice; how many there are of them does not matter.
    taken = 2 * on_each if rows < batch_size else on_each
    own = dataclasses.replace(plan, micro_batch=on_each if rows < batch_size else None, precision=traced)
    working = math.ceil(MARGIN * _working(config, own, taken, length, training=True))
    if rows < batch_size:
        # XLA takes less for it than is counted: 0.5 to 0.9 of it.
        working = max(working, _working(config, own, -(-batch_size // devices), length, training=False))
    widened = 4 * total if half and platform == "cpu" else 0
    # Gathered from the devices, weights exist as a whole while they are used.
    gathered = 4 * total if full and devices > 1 else 0
    # When weights are replaced, the gradient exists twice: as it is and clipped.
    working = parallel_trials * max(working, 9 * trained) + widened + gathered
    return dataclasses.replace(lasting, working=working)


@functools.lru_cache(maxsize=64)
def weight_counts(config: ModelConfig, lora: Lora | None) -> tuple[int, int]:
    """Return how many weights a model has, adapters among them, and how many of them are trained."""
    counts = parameter_counts(abstract_model(config, lora))
    return counts.total, counts.trainable


def _working(config: ModelConfig, plan: Plan, rows: int, length: int, *, training: bool) -> int:
    """Return `live_bytes` of the gradient or of the evaluation of a batch, on one device.

    Where all layers are alike, it grows by the same for each: a few of them are traced.
    """
    stacks = [name for name in ("layers", "decoder_layers") if getattr(config, name, 0)]
    # What a configuration says of each layer.
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    each = {name: value for name, value in fields.items() if isinstance(value, tuple) and len(value) == config.layers}
    alike = config.model_type not in PATTERNED and (plan.lora is None or plan.lora.layers is None)
    alike = alike and all(len(set(value)) == 1 for value in each.values())
    alike = alike and all(fields[name] == config.layers for name in stacks)
    if not alike or config.layers <= TRACED[1]:
        return _traced(config, plan, rows, length, training=training)

    def shallow(layers: int) -> ModelConfig:
        cut: dict[str, Any] = {name: value[:layers] for name, value in each.items()}
        return dataclasses.replace(config, **cut | dict.fromkeys(stacks, layers))

    few, more = (_traced(shallow(n), plan, rows, length, training=training) for n in TRACED)
    return more + max(more - few, 0) * (config.layers - TRACED[1]) // (TRACED[1] - TRACED[0])


@functools.lru_cache(maxsize=256)
def _traced(config: ModelConfig, plan: Plan, rows: int, length: int, *, training: bool) -> int:
    """Return `_working`, of all layers."""
    graph, *states = nnx.split(abstract_model(config, plan.lora), nnx.Param, ...)
    dtype = compute_dtype(plan.precision)
    loss_sums = loss_function(graph, dtype, dropout=plan.dropout)
    names = ("input_ids", "attention_mask", "labels")
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}

    def work(params: Any, frozen: Any, batch: Any) -> Any:
        frozen = cast(frozen, dtype)
        if training:
            return gradient_function(loss_sums, plan.micro_batch)(params, frozen, batch, jax.random.key(0))
        return loss_sums(params, frozen, batch)

    return live_bytes(jax.make_jaxpr(work)(*states, batch).jaxpr)
