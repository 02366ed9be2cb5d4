"""The hot numerical primitives of lensjax: plain JAX, any device, each with one signature."""

from lensjax_kernels.head import head_cross_entropy

__all__ = ["head_cross_entropy"]
