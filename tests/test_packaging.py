"""What pyproject.toml says about the package agrees with what is on the disk."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings the parser that Python 3.10 lacks
    tomllib = import_module("tomli")

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_packages_are_those_on_disk() -> None:
    """A new folder with Python files that pyproject.toml does not list would be missing from the wheel."""
    found = {
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, files in os.walk(ROOT / "fxprune", followlinks=True)
        if any(name.endswith(".py") for name in files)
    }
    listed = SETTINGS["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found)
    assert listed == sorted(listed)


def test_every_package_has_an_init() -> None:
    for package in SETTINGS["tool"]["setuptools"]["packages"]:
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file(), package


def test_passes_is_one_folder_with_two_paths() -> None:
    link = ROOT / "fxprune" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"
    assert link.resolve() == ROOT / "passes"
    assert SETTINGS["tool"]["setuptools"]["package-dir"] == {"fxprune.passes": "passes"}
    assert not [p for p in (ROOT / "passes").iterdir() if p.is_dir() and p.name != "__pycache__"], (
        "stays flat"
    )


def test_passes_has_one_import_name() -> None:
    """Imported as ``passes`` its classes would be others than those of ``fxprune.passes``."""
    import_module("fxprune.passes")
    done = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "fxprune.passes" in done.stderr


def test_typed_and_scripted() -> None:
    assert (ROOT / "fxprune" / "py.typed").is_file()
    module, _, function = SETTINGS["project"]["scripts"]["fxprune"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_peers_are_no_dependency() -> None:
    needed = " ".join(SETTINGS["project"]["dependencies"])
    assert "torch-pruning" not in needed
    assert "torch-pruning==1.6.1" in SETTINGS["project"]["optional-dependencies"]["bench"]


def test_installed_command() -> None:
    script = Path(sysconfig.get_path("scripts")) / "fxprune"
    if not script.exists():
        pytest.skip("fxprune is not installed in this environment")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"fxprune {SETTINGS['project']['version']} ")


@pytest.mark.slow
def test_what_is_built_can_be_installed_and_prunes(tmp_path: Path) -> None:
    """The source distribution, through a wheel, into a folder of its own; the libraries are those there."""
    versions = {name: metadata.version(name) if find_spec(name) else "0" for name in ("pip", "setuptools")}
    if versions["pip"] == "0" or int(versions["setuptools"].partition(".")[0]) < 77:
        pytest.skip("needs pip and setuptools 77")
    source, built, installed = tmp_path / "source", tmp_path / "built", tmp_path / "installed"
    source.mkdir()
    for name in ("fxprune", "passes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)

    def python(folder: Path, *args: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, *args],
            cwd=folder,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    python(source, "-c", f"from setuptools.build_meta import *; build_sdist({str(built)!r})")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(installed))
    python(tmp_path, "-m", "pip", "install", *options, *map(str, built.iterdir()))
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))\n"
    )
    path = {"PYTHONPATH": str(installed)}
    where = python(tmp_path, "-c", "import fxprune.passes; print(fxprune.passes.__file__)", **path)
    assert Path(where.strip()).is_relative_to(installed)
    command = ("prune", "net.py:make", "--input-shape", "1,3,8,8", "--no-latency", "--out", "net.safetensors")
    python(tmp_path, "-m", "fxprune", *command, **path)
    assert (tmp_path / "net.safetensors").is_file()
    code = (
        "import sys, torch, net\n"
        "model, x = net.make().eval(), torch.zeros(1, 3, 8, 8)\n"
        "options = {'ratio': 0.5, 'inner': 'eager'}\n"
        "torch.compile(model, backend='fxprune', options=options)(x)\n"
        "backend = sys.modules['fxprune.backend']\n"
        "print(backend.__file__)\n"
        "print(*backend.state_dict(model)['0.weight'].shape)\n"
    )
    where, shape = python(tmp_path, "-c", code, **path).splitlines()
    assert Path(where).is_relative_to(installed)
    assert shape == "4 3 3 3"


def test_importing_fxprune_does_not_import_torch() -> None:
    """``fxprune --help`` and usage errors need not wait for it."""
    code = "import sys, fxprune, fxprune.cli; print(sorted({'torch', 'networkx', 'rich'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_import_no_more_than_they_need() -> None:
    """What is needed for some models, formats or surfaces alone is imported when it is."""
    heavy = {"networkx", "sympy", "torch._inductor", "torchvision", "transformers", "triton"}
    heavy |= {"IPython", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pandas", "rich", "scipy"}
    code = (
        "import sys, torch; before = {*sys.modules}\n"
        "from fxprune import *\n"
        f"print(sorted({heavy} & ({{*sys.modules}} - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_where_they_are_said_to_be() -> None:
    """What a type checker is told agrees with what is imported when it is asked for."""
    fxprune = import_module("fxprune")
    tree = ast.parse((ROOT / "fxprune" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [
        node for node in tree.body if isinstance(node, ast.If) and not isinstance(node.test, ast.UnaryOp)
    ]
    told = {
        name.name: line.module
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for name in line.names
    }
    assert {name: module for name, module in told.items() if module} == fxprune._MODULES
    assert sorted(told) == sorted(fxprune.__all__) == fxprune.__all__
    assert all(getattr(fxprune, name) is not None for name in fxprune.__all__)


def test_former_names_say_the_new_one() -> None:
    for statement in ("import fxprune.cost", "from fxprune import cost", "from fxprune.cost import count"):
        with pytest.raises(ImportError, match=r"fxprune\.measure now"):
            exec(statement, {})
