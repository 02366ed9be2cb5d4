"""Neural tangent kernels and curvature of language models, and of any differentiable function."""

from lensjax.tangents.blocks import block_for, ntk_blocks
from lensjax.tangents.bound import (
    Bound,
    Phases,
    PowerFall,
    compare_phases,
    corollary_bound,
    generalization_bound,
    layer_distances,
    power_fall,
)
from lensjax.tangents.dynamics import KernelDynamics, kernel_dynamics
from lensjax.tangents.hessian import CurvatureOperator, curvature_operator, gauss_newton_product, hvp
from lensjax.tangents.lanczos import QuadraticForm, Spectrum, example_forms, quadratic_form, spectrum
from lensjax.tangents.losses import Composed, model_loss
from lensjax.tangents.models import OUTPUTS, ntk_outputs
from lensjax.tangents.ntk import explain, gradient_norms, ntk
from lensjax.tangents.oracles import NtkOperator, ntk_operator
from lensjax.tangents.report import NtkReport, Treatment
from lensjax.tangents.sketch import SketchError, ntk_features, sketch_error
from lensjax.tangents.trace import TraceEstimate, hessian_trace

__all__ = [
    "OUTPUTS",
    "Bound",
    "Composed",
    "CurvatureOperator",
    "KernelDynamics",
    "NtkOperator",
    "NtkReport",
    "Phases",
    "PowerFall",
    "QuadraticForm",
    "SketchError",
    "Spectrum",
    "TraceEstimate",
    "Treatment",
    "block_for",
    "compare_phases",
    "corollary_bound",
    "curvature_operator",
    "example_forms",
    "explain",
    "gauss_newton_product",
    "generalization_bound",
    "gradient_norms",
    "hessian_trace",
    "hvp",
    "kernel_dynamics",
    "layer_distances",
    "model_loss",
    "ntk",
    "ntk_blocks",
    "ntk_features",
    "ntk_operator",
    "ntk_outputs",
    "power_fall",
    "quadratic_form",
    "sketch_error",
    "spectrum",
]
