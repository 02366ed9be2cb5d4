"""The folder kernels/ must never be taken for the Hugging Face distribution of that name."""

import subprocess
import sys

from support.paths import ROOT


def test_transformers_does_not_take_our_folder_for_its_kernels_package():
    # From the root the folder is an importable namespace package, so `kernels` is found; it must still count as absent.
    program = (
        "from transformers.utils import is_kernels_available\n"
        "from importlib.metadata import packages_distributions\n"
        "installed = 'kernels' in packages_distributions()\n"
        "print(is_kernels_available() and not installed)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


def test_the_folder_itself_is_no_package():
    # An __init__.py here would make it a regular package, which hides an installed `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "lensjax_kernels" / "__init__.py").exists()
