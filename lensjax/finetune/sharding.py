"""Where weights and samples live when a process has several devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lensjax.errors import InputError

AXIS = "devices"
COPIES = 16  # bytes for each trained weight in float32: weight, gradient and the two moments of AdamW


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices of a run.

    Attributes
    ----------
    mesh : jax.sharding.Mesh or None
        None: one device, nothing is placed.
    full : bool
        Whether weights are sharded too.
    """

    mesh: Mesh | None = None
    full: bool = False

    @property
    def devices(self) -> int:
        """How many."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def name(self) -> str:
        """The sharding as in `Plan`."""
        return "none" if self.devices == 1 else "full" if self.full else "data"

    def weights(self, tree: Any) -> Any:
        """Return a sharding for each array of a tree: split along its longest divisible axis if `full`, else whole."""
        return jax.tree.map(lambda x: NamedSharding(self._mesh, self._split(np.shape(x))), tree)

    def whole(self, tree: Any) -> Any:
        """Return the sharding of arrays that each device has all of."""
        return jax.tree.map(lambda _: NamedSharding(self._mesh, PartitionSpec()), tree)

    def put_weights(self, tree: Any) -> Any:
        """Put weights where they belong."""
        return tree if self.mesh is None else jax.device_put(tree, self.weights(tree))

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Put arrays (N, ...) so that each device has its share of the N samples."""
        if self.mesh is None:
            return dict(batch)
        rows = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return {name: jax.device_put(value, rows) for name, value in batch.items()}

    @property
    def _mesh(self) -> Mesh:
        assert self.mesh is not None
        return self.mesh

    def _split(self, shape: tuple[int, ...]) -> PartitionSpec:
        fitting = [axis for axis, length in enumerate(shape) if self.full and length % self.devices == 0]
        if not fitting:
            return PartitionSpec()
        longest = max(fitting, key=lambda axis: shape[axis])
        return PartitionSpec(*(AXIS if axis == longest else None for axis in range(len(shape))))


class UnevenBatchError(InputError):
    """Raised where the devices that are to share a batch cannot share it evenly.

    Attributes
    ----------
    problem : str
        What is wrong, without the remedy.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}.")
        self.problem = f"{problem}."


def device_memory(device: jax.Device) -> int | None:
    """Return how many bytes of memory programs may take on a device; None where it does not say, as CPUs."""
    found = (device.memory_stats() or {}).get("bytes_limit")
    return None if found is None else int(found)


def decide(
    sharding: str,
    batch_sizes: Sequence[int],
    *,
    trainable: int,
    frozen: int,
    devices: int,
    memory: float | None,
) -> tuple[int, bool]:
    """Decide how many devices share the samples of a batch, and whether they share weights and optimiser state too.

    Parameters
    ----------
    sharding : str
        As in `Plan`.
    batch_sizes : sequence of int
        Samples that are computed at once; the devices in use divide each.
    trainable, frozen : int
        Weights.
    devices : int
        How many there are.
    memory : float or None
        Bytes that programs may take on one device; None: not known, and taken to be enough.

    Returns
    -------
    (int, bool)
        One device shares nothing.

    Raises
    ------
    UnevenBatchError
        If "data" or "full" is asked for, and the devices do not divide the batch.
    """
    if devices == 1 or sharding == "none":
        return 1, False
    shared = math.gcd(*batch_sizes, devices)
    if sharding != "auto" and shared < devices:
        samples = " and ".join(map(str, batch_sizes))
        raise UnevenBatchError(
            f"sharding {sharding}: {devices} devices do not divide {samples} samples evenly",
            f"choose a batch size (or micro-batch) that is a multiple of {devices}",
        )
    if shared == 1:
        return 1, False
    room = math.inf if memory is None else memory / 2
    return shared, sharding == "full" or (sharding == "auto" and COPIES * trainable + 4 * frozen > room)


def place(
    sharding: str, batch_sizes: Sequence[int], *, trainable: int, frozen: int, devices: Sequence[jax.Device] | None
) -> Placement:
    """Choose the devices of a run, as `decide` says.

    Parameters
    ----------
    sharding, batch_sizes, trainable, frozen
        As in `decide`.
    devices : sequence of jax.Device, optional
        Default: all of this process. Where they are named, weights are put there even if it is one device.

    Raises
    ------
    UnevenBatchError
        As `decide`.
    """
    found = list(jax.local_devices() if devices is None else devices)
    count, full = decide(
        sharding,
        batch_sizes,
        trainable=trainable,
        frozen=frozen,
        devices=len(found),
        memory=device_memory(found[0]),
    )
    if count == 1 and devices is None:
        return Placement()
    return Placement(Mesh(np.array(found[:count]), (AXIS,), axis_types=(AxisType.Auto,)), full)
