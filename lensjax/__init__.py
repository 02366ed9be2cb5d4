"""Choose which language model to fine-tune from small fine-tuning runs.

The names below load on first use, so that ``import lensjax`` costs little more than ``import jax``.
"""

from typing import TYPE_CHECKING

from lensjax._lazy import lazy_names
from lensjax.errors import InputError, UnsupportedBackendError

if TYPE_CHECKING:
    from lensjax.laws import Fits, fit, lens_law, power_law, rectified_law
    from lensjax.losses.curves import Curves
    from lensjax.losses.table import read_losses
    from lensjax.models import from_pretrained
    from lensjax.select.driver import run_selection
    from lensjax.select.from_losses import select_from_losses
    from lensjax.selection import Selection
    from lensjax.selectors import SELECTORS, Scores
    from lensjax.tangents import hessian_trace, kernel_dynamics, ntk, ntk_blocks, ntk_features

_HOMES = {
    "Curves": "lensjax.losses.curves",
    "read_losses": "lensjax.losses.table",
    "Fits": "lensjax.laws",
    "fit": "lensjax.laws",
    "lens_law": "lensjax.laws",
    "power_law": "lensjax.laws",
    "rectified_law": "lensjax.laws",
    "from_pretrained": "lensjax.models",
    "hessian_trace": "lensjax.tangents",
    "kernel_dynamics": "lensjax.tangents",
    "ntk": "lensjax.tangents",
    "ntk_blocks": "lensjax.tangents",
    "ntk_features": "lensjax.tangents",
    "run_selection": "lensjax.select.driver",
    "select_from_losses": "lensjax.select.from_losses",
    "Selection": "lensjax.selection",
    "SELECTORS": "lensjax.selectors",
    "Scores": "lensjax.selectors",
}

__all__ = [
    "SELECTORS",
    "Curves",
    "Fits",
    "InputError",
    "Scores",
    "Selection",
    "UnsupportedBackendError",
    "fit",
    "from_pretrained",
    "hessian_trace",
    "kernel_dynamics",
    "lens_law",
    "ntk",
    "ntk_blocks",
    "ntk_features",
    "power_law",
    "read_losses",
    "rectified_law",
    "run_selection",
    "select_from_losses",
]

__getattr__, __dir__ = lazy_names(__name__, globals(), _HOMES)
