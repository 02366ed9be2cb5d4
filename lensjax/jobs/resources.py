"""What a process that runs a candidate knows of itself: its peak memory, and its programs kept for the next one."""

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
    """Let the system measure this process's peak memory anew; return whether it does."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak(was_reset: bool) -> dict[str, Any]:
    """Return the peak memory in bytes, and of what: of this run, or of its process since it began."""
    found = {}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in s for s in stats):
        found["device_peak_bytes_of_process"] = max(int(s["peak_bytes_in_use"]) for s in stats)
    if was_reset:
        with contextlib.suppress(OSError):  # some containers hide it
            high = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            if high:
                return {**found, "peak_bytes": int(high[1]) * 1024, "peak_of": "run"}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {**found, "peak_bytes": most, "peak_of": "process"}


def keep_compiled(directory: Path) -> None:
    """Keep this process's compiled programs in a directory, for the next process on the same kind of machine."""
    kind = f"{platform.machine()} {platform.node()} {_processor()}"
    own = directory / hashlib.sha256(kind.encode()).hexdigest()[:8]
    for name, value in (
        ("jax_compilation_cache_dir", str(own)),
        ("jax_persistent_cache_min_compile_time_secs", 0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)


def _processor() -> str:
    """Return the CPU's features: programs compiled for others might not run."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[0]
    return platform.processor()
