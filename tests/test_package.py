import subprocess
import sys
import tomllib

import jax
import jaxlib
import pytest

import lensjax
from lensjax import data, environment
from support.paths import ROOT

HEAVY = ("flax", "jaxopt", "optax", "transformers", "datasets", "matplotlib", "torch", "lensjax.models", "lensjax.laws")


def test_importing_lensjax_imports_nothing_heavy_and_leaves_x64_alone():
    code = (
        "import jax, sys; before = set(sys.modules); import lensjax; print(*(set(sys.modules) - before));"
        "assert not jax.config.jax_enable_x64"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    new = set(done.stdout.split())
    assert "lensjax" in new
    assert not {m for m in new if m.startswith(HEAVY)}


def test_every_public_name_exists():
    for name in lensjax.__all__:
        assert getattr(lensjax, name) is not None
    assert set(lensjax.__all__) <= set(dir(lensjax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lensjax.nothing


def test_a_jaxlib_with_wrong_jacobians_is_refused_on_cpu_only(monkeypatch):
    environment.require_exact_backend()
    monkeypatch.setattr(jaxlib, "__version__", "0.10.2")
    with pytest.raises(lensjax.UnsupportedBackendError, match=r"jaxlib 0\.10\.2 computes wrong LayerNorm Jacobians"):
        environment.require_exact_backend()
    environment.require_exact_backend("gpu")


def test_jax_and_flax_are_pinned_as_a_pair():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [d for d in project["dependencies"] if d.startswith(("jax=", "jaxlib=", "flax="))]
    assert pins == ["jax==0.10.1", "jaxlib==0.10.1", "flax==0.12.8"]
    assert jax.__version__ == "0.10.1"


def test_published_tables_are_packaged_with_attribution():
    text = data.path("published", "README.md").read_text()
    assert "Apache License 2.0" in text
    assert "arXiv 2402.02314" in text
    for name in data.PUBLISHED:
        assert data.path("published", f"{name}.csv").is_file()


def test_every_package_is_listed_for_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    here = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "lensjax").rglob("__init__.py")}
    assert {p for p in settings["packages"] if p != "lensjax_kernels"} == here
