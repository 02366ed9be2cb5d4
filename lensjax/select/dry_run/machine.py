"""The machine that a dry run is for: its devices, memory, disk and speed."""

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

MEASURE_SECONDS = 1.0  # for how long matrices are multiplied to measure a speed
MATRIX_ORDER = {"cpu": 1024, "gpu": 8192, "tpu": 8192}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where fine-tuning would run.

    Attributes
    ----------
    platform : {"cpu", "gpu", "tpu"}
    kind : str
        What the devices are called.
    devices : int
    memory : int or None
        Bytes that a run may take: on each device, or, for CPUs, on all together; None if not known.
    speed : mapping of str to float
        Floating-point operations per second of one device when multiplying matrices, by their dtype.
    """

    platform: str
    kind: str
    devices: int
    memory: int | None
    speed: dict[str, float]


def inspect_machine(dtype: str) -> Machine:
    """Return the devices, the free memory and the measured speed of this machine; takes a second or two.

    Parameters
    ----------
    dtype : str
        Of the matrices whose products are timed; "auto" is float32 on CPUs, bfloat16 elsewhere.
    """
    devices = jax.local_devices()
    platform = devices[0].platform
    name = ("float32" if platform == "cpu" else "bfloat16") if dtype == "auto" else dtype
    memory = available_memory() if platform == "cpu" else (devices[0].memory_stats() or {}).get("bytes_limit")
    speed = {name: matmul_speed(name, MATRIX_ORDER[platform])}
    return Machine(platform, devices[0].device_kind, len(devices), memory, speed)


@functools.cache
def matmul_speed(dtype: str, order: int) -> float:
    """Return the floating-point operations per second of multiplying square matrices of that order, on average."""
    matrix = jnp.ones((order, order), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < MEASURE_SECONDS:
        multiply(matrix, matrix).block_until_ready()
        done += 1
    return done * 2.0 * order**3 / (time.perf_counter() - begun)


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that new processes may take: the free memory, or less if a control group's limit leaves less.

    Parameters
    ----------
    proc, cgroups : Path
        Where the system's process and control-group files are.

    Returns
    -------
    int or None
        None where the system does not tell.
    """
    free = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (proc / "meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024)
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
        # The limits of all enclosing groups count; a container shows only some of them.
        inner = root / group.strip("/")
        for place in (inner, *inner.parents):
            if place != root and root not in place.parents:
                break
            with contextlib.suppress(OSError, ValueError):
                most, used = int((place / limit).read_text()), int((place / usage).read_text())
                with contextlib.suppress(OSError):
                    lines = (place / "memory.stat").read_text().splitlines()
                    used -= sum(int(text.split()[1]) for text in lines if text.split()[0] == reclaimable)
                free.append(max(most - used, 0))
    return min(free, default=None)


def free_disk(place: Path) -> tuple[int, int]:
    """Return the free bytes where a directory is or would be made, and the device number of its file system."""
    present = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    return shutil.disk_usage(present).free, os.stat(present).st_dev
