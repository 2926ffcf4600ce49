"""The guides run: those to other libraries where these are installed."""

import runpy
from pathlib import Path

import pytest

GUIDES = Path(__file__).parent.parent / "examples" / "guides"
NEEDS = {
    "budgets": "torch",
    "calibration": "torch",
    "compile": "torch",
    "edit_plans": "torch",
    "export": "onnxruntime",
    "hugging_face": "transformers",
    "lossless": "torch",
    "mixed_precision": "torch",
    "notebooks": "torch",
    "save_and_load": "torch",
    "several_calls": "torch",
    "timm_models": "timm",
}


def test_every_guide_is_run() -> None:
    assert {path.stem for path in GUIDES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("guide", NEEDS)
def test_guide(guide: str) -> None:
    """The script runs through."""
    pytest.importorskip(NEEDS[guide], reason=f"the guide needs {NEEDS[guide]}")
    runpy.run_path(str(GUIDES / f"{guide}.py"), run_name="__main__")
