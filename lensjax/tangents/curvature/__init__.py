"""Curvature of losses: Hessian and Gauss-Newton products, traces, spectra."""
