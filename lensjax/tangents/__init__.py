"""Neural tangent kernels of language models, and of any differentiable function."""

from lensjax.tangents.blocks import block_for, ntk_blocks
from lensjax.tangents.models import OUTPUTS, ntk_outputs
from lensjax.tangents.ntk import explain, gradient_norms, ntk
from lensjax.tangents.oracles import NtkOperator, ntk_operator
from lensjax.tangents.report import NtkReport, Treatment
from lensjax.tangents.sketch import SketchError, ntk_features, sketch_error

__all__ = [
    "OUTPUTS",
    "NtkOperator",
    "NtkReport",
    "SketchError",
    "Treatment",
    "block_for",
    "explain",
    "gradient_norms",
    "ntk",
    "ntk_blocks",
    "ntk_features",
    "ntk_operator",
    "ntk_outputs",
    "sketch_error",
]
