"""Empirical neural tangent kernels: whole, in blocks, as an operator, as random features."""
