"""Peak memory of the process that runs a candidate, and its cache of compiled programs."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import resource
import sys
from pathlib import Path
from typing import Any

import jax


def reset_peak() -> bool:
    """Reset the peak memory that the system has recorded for this process; return whether it could be done."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak(was_reset: bool) -> dict[str, Any]:
    """Return the peak memory in bytes: of this run if `was_reset`, else of its process since it began.

    Returns
    -------
    dict
        ``peak_bytes``; ``peak_of``: "run" or "process"; ``device_peak_bytes_of_process`` if the devices tell it.
    """
    on_device = {}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in s for s in stats):
        on_device["device_peak_bytes_of_process"] = max(int(s["peak_bytes_in_use"]) for s in stats)
    if was_reset:
        with contextlib.suppress(OSError):  # some containers hide it
            high_water = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            if high_water:
                return {**on_device, "peak_bytes": int(high_water[1]) * 1024, "peak_of": "run"}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {**on_device, "peak_bytes": most, "peak_of": "process"}


def keep_compiled(directory: Path) -> None:
    """Cache compiled programs in a directory, for later processes on machines of the same kind."""
    kind = f"{platform.machine()} {platform.node()} {_processor()}"
    own = directory / hashlib.sha256(kind.encode()).hexdigest()[:8]
    for name, value in (
        ("jax_compilation_cache_dir", str(own)),
        ("jax_persistent_cache_min_compile_time_secs", 0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)


def _processor() -> str:
    """Return the CPU's features: a program compiled for other features might not run."""
    with contextlib.suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if flags:
            return flags[0]
    return platform.processor()
