"""Neural tangent kernels and curvature of language models, and of any differentiable function."""

from lensjax.tangents.curvature.lanczos import (
    QuadraticForm,
    Spectrum,
    per_example_quadratic_forms,
    quadratic_form,
    spectrum,
)
from lensjax.tangents.curvature.losses import Composed, model_loss
from lensjax.tangents.curvature.operator import CurvatureOperator, curvature_operator, gauss_newton_product, hvp
from lensjax.tangents.curvature.trace import TraceEstimate, hessian_trace
from lensjax.tangents.dynamics import KernelDynamics, kernel_dynamics
from lensjax.tangents.kernel.blockwise import block_for, ntk_blocks
from lensjax.tangents.kernel.features import SketchError, ntk_features, sketch_error
from lensjax.tangents.kernel.ntk import explain, gradient_norms, ntk
from lensjax.tangents.kernel.operator import NtkOperator, ntk_operator
from lensjax.tangents.kernel.report import NtkReport, Treatment
from lensjax.tangents.language_models import OUTPUTS, ntk_outputs

__all__ = [
    "OUTPUTS",
    "Composed",
    "CurvatureOperator",
    "KernelDynamics",
    "NtkOperator",
    "NtkReport",
    "QuadraticForm",
    "SketchError",
    "Spectrum",
    "TraceEstimate",
    "Treatment",
    "block_for",
    "curvature_operator",
    "explain",
    "gauss_newton_product",
    "gradient_norms",
    "hessian_trace",
    "hvp",
    "kernel_dynamics",
    "model_loss",
    "ntk",
    "ntk_blocks",
    "ntk_features",
    "ntk_operator",
    "ntk_outputs",
    "per_example_quadratic_forms",
    "quadratic_form",
    "sketch_error",
    "spectrum",
]
