"""The kernel of a small convolutional network beside per-example gradients and their Gram product in plain JAX.

A network of 300,000 parameters (six 3 x 3 convolutions of 32 to 128 channels with biases, two of them with stride 2,
mean over the places, a dense layer) on images of 32 x 32 x 3, with one output and with ten, all pairs of outputs; and
one of depthwise and pointwise convolutions with one output. The ways take turns in one process, and medians are
compared.

    python benchmarks/ntk_cnn.py [--examples 16] [--repeats 5] [--name ntk_cnn]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
from environment import write_result

from lensjax.tangents import explain, ntk

CHANNELS = (3, 32, 64, 64, 96, 96, 128)
STRIDES = (1, 1, 2, 1, 2, 1)
NUMBERS = ("NHWC", "HWIO", "NHWC")
Run = Callable[[], Any]


def network(outputs: int, separable: bool) -> tuple[Callable[[Any, Any], Any], Any]:
    """Return f(params, image) -> (outputs,), one number without axes for one, and parameters."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)

    layers = []
    for into, out in itertools.pairwise(CHANNELS):
        layer = {"b": jnp.zeros(out), "w": draw(1, 1, into, out) if separable else draw(3, 3, into, out)}
        layers.append({**layer, "depthwise": draw(3, 3, 1, into)} if separable else layer)
    params = {"layers": layers, "head": draw(CHANNELS[-1], outputs)}

    def convolve(x: Any, w: Any, stride: int, groups: int = 1) -> Any:
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=NUMBERS, feature_group_count=groups
        )

    def f(params: Any, image: Any) -> Any:
        x = image[None]
        for layer, stride in zip(params["layers"], STRIDES, strict=True):
            if separable:
                x, stride = convolve(x, layer["depthwise"], stride, x.shape[-1]), 1
            x = jnp.maximum(convolve(x, layer["w"], stride) + layer["b"], 0)
        found = x.mean((0, 1, 2)) @ params["head"]
        return found[0] if outputs == 1 else found

    return f, params


def gram(f: Callable[[Any, Any], Any], outputs: int) -> Callable[[Any, Any], Any]:
    """Return (params, x) -> kernel, as one writes it in plain JAX."""
    differentiate = jax.grad if outputs == 1 else jax.jacrev

    @jax.jit
    def kernel(params: Any, x: Any) -> Any:
        jacobians = jax.vmap(differentiate(f), (None, 0))(params, x)
        flat = [j.reshape(len(x) * outputs, -1) for j in jax.tree.leaves(jacobians)]
        return sum(jnp.matmul(j, j.T, precision="highest") for j in flat)

    return kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="ntk_cnn", help="of the result")
    options = parser.parse_args()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(options.examples, 32, 32, 3)), jnp.float32)
    cases: dict[str, Any] = {}
    for separable, outputs in ((False, 1), (False, 10), (True, 1)):
        f, params = network(outputs, separable)
        plain = gram(f, outputs)
        runs: dict[str, Run] = {
            "lensjax": lambda f=f, params=params: ntk(f, params, x),
            "vmap(grad) and Gram": lambda plain=plain, params=params: plain(params, x),
        }
        kernels = [np.asarray(run()).reshape(options.examples * outputs, -1) for run in runs.values()]
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        case = f"{'separable' if separable else 'plain'}, {outputs} output{'s' if outputs > 1 else ''}"
        cases[case] = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "examples": options.examples,
            "method": explain(f, params, x).method,
            "seconds": seconds,
            "medians": medians,
            "ratio": medians["lensjax"] / medians["vmap(grad) and Gram"],
            "largest_difference": float(np.abs(kernels[0] - kernels[1]).max() / np.abs(kernels[1]).max()),
        }
        print(case, {k: v for k, v in cases[case].items() if k != "seconds"}, flush=True)
    write_result(options.name, {"cases": cases})


if __name__ == "__main__":
    main()
