"""What this machine has: memory, disk, devices and speed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp

SECONDS = 1.0  # that a speed is measured for
ORDER = {"cpu": 1024, "gpu": 8192, "tpu": 8192}  # of the matrices that are multiplied for it


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where fine-tuning would run.

    Attributes
    ----------
    platform : {"cpu", "gpu", "tpu"}
    kind : str
        Of the devices.
    devices : int
    memory : int or None
        Bytes that a run may take: of each device, or, on CPUs, of all together; None if not known.
    speed : mapping of str to float
        Floating-point operations per second of one device, by the dtype of matrices that it multiplied.
    """

    platform: str
    kind: str
    devices: int
    memory: int | None
    speed: dict[str, float]


def this_machine(dtype: str) -> Machine:
    """Look at this machine; takes a second or two.

    Parameters
    ----------
    dtype : str
        To multiply matrices of; "auto" is float32 on CPUs, bfloat16 elsewhere.
    """
    found = jax.local_devices()
    platform = found[0].platform
    name = ("float32" if platform == "cpu" else "bfloat16") if dtype == "auto" else dtype
    memory = available_memory() if platform == "cpu" else (found[0].memory_stats() or {}).get("bytes_limit")
    return Machine(platform, found[0].device_kind, len(found), memory, {name: matmul_speed(name, ORDER[platform])})


@functools.cache
def matmul_speed(dtype: str, order: int) -> float:
    """Return how many floating-point operations a second multiplying square matrices makes, on average."""
    matrix = jnp.ones((order, order), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        multiply(matrix, matrix).block_until_ready()
        done += 1
    return done * 2.0 * order**3 / (time.perf_counter() - begun)


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that new processes may take: what is free, and what the control group's limit leaves.

    Parameters
    ----------
    proc, cgroups : Path
        Where the system shows itself.

    Returns
    -------
    int or None
        None where the system does not say.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (proc / "meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024)
    groups = ""
    with contextlib.suppress(OSError):
        groups = (proc / "self" / "cgroup").read_text()
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            root, limit, usage, reclaimable = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            limit, usage, reclaimable = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # The limits of all groups around it count; in a container only some of them are there to be seen.
        inner = root / group.strip("/")
        for place in (inner, *inner.parents):
            if place != root and root not in place.parents:
                break
            with contextlib.suppress(OSError, ValueError):
                most, used = int((place / limit).read_text()), int((place / usage).read_text())
                with contextlib.suppress(OSError):
                    lines = (place / "memory.stat").read_text().splitlines()
                    used -= sum(int(text.split()[1]) for text in lines if text.split()[0] == reclaimable)
                found.append(max(most - used, 0))
    return min(found, default=None)


def free_disk(place: Path) -> tuple[int, int]:
    """Return the free bytes where a directory is or would be made, and a number that names the file system."""
    present = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    return shutil.disk_usage(present).free, os.stat(present).st_dev
