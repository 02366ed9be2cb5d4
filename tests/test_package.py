import importlib
import importlib.util
import subprocess
import sys
import tomllib

import jax
import jaxlib
import pytest
import setuptools

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


def test_every_package_is_found_for_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    here = {
        ".".join(p.parent.relative_to(ROOT / where).parts)
        for where, name in ((".", "lensjax"), ("kernels", "lensjax_kernels"))
        for p in (ROOT / where / name).rglob("__init__.py")
    }
    found = set()
    for where in settings["where"]:
        found |= set(setuptools.find_packages(str(ROOT / where), include=settings["include"]))
    assert found == here
    # A folder without __init__.py would be left out.
    for package in (ROOT / "lensjax", ROOT / "kernels" / "lensjax_kernels"):
        for module in package.rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_tangents_load_neither_jaxopt_nor_selection():
    code = "import sys, lensjax.tangents; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    unwanted = (
        "jaxopt",
        "optax",
        "lensjax.laws",
        "lensjax.select",
        "lensjax.selectors",
        "lensjax.losses",
        "lensjax.jobs",
    )
    assert not {name for name in loaded if name.startswith(unwanted)}
    assert "lensjax.tangents" in loaded


@pytest.mark.parametrize(
    "package", ["lensjax", "lensjax.laws", "lensjax.selectors", "lensjax.tangents", "lensjax.tasks"]
)
def test_no_public_function_hides_a_module_of_its_name(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert importlib.util.find_spec(f"{package}.{name}") is None
