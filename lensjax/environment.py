"""Which packages and which JAX backend there are, and whether that backend's numbers can be trusted."""

import importlib.metadata
import platform

import jaxlib

from lensjax.errors import UnsupportedBackendError

# jaxlib 0.10.2 on CPU: jit(vmap(jacrev)) of a LayerNorm is up to 22 % off at shapes above 2**20 elements.
WRONG_ON_CPU = frozenset({"0.10.2"})


def require_exact_backend(platform: str | None = None) -> None:
    """Refuse to run where derivatives are known to be silently wrong.

    Parameters
    ----------
    platform : str, optional
        "cpu", "gpu" or "tpu"; default: the platform JAX runs on now.

    Raises
    ------
    UnsupportedBackendError
        If the installed jaxlib is in `WRONG_ON_CPU` and the platform is the CPU.
    """
    if jaxlib.__version__ not in WRONG_ON_CPU:
        return
    if platform is None:
        import jax

        platform = jax.default_backend()
    if platform == "cpu":
        raise UnsupportedBackendError(
            f"jaxlib {jaxlib.__version__} computes wrong LayerNorm Jacobians on CPU (up to 22 % off): "
            "install jax==0.10.1 jaxlib==0.10.1."
        )


PACKAGES = ("lensjax", "jax", "jaxlib", "flax", "numpy", "transformers")
ABSENT = "not installed"  # or run from its source


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a selection depends on, in this process."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ABSENT
    return found
