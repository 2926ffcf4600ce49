"""The guides run: those to other libraries where these are installed."""

import runpy
import sys
from pathlib import Path

import pytest

GUIDES = Path(__file__).parent.parent / "examples" / "guides"
NEEDS = {
    "budgets": "torch",
    "calibration": "torch",
    "compile": "torch",
    "diffusers_unet": "diffusers",
    "edit_plans": "torch",
    "export": "onnxruntime",
    "hugging_face": "transformers",
    "lightning_module": "lightning",
    "lossless": "torch",
    "mixed_precision": "torch",
    "notebooks": "torch",
    "save_and_load": "torch",
    "several_calls": "torch",
    "timm_models": "timm",
    "ultralytics_yolo": "ultralytics",
}
CASES = [
    *(pytest.param(guide, (), id=guide) for guide in NEEDS),
    pytest.param("ultralytics_yolo", ("yolo11n.yaml",), id="yolo11n", marks=pytest.mark.slow),
]
"""Guides, with their arguments."""


def test_every_guide_is_run() -> None:
    assert {path.stem for path in GUIDES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize(("guide", "arguments"), CASES)
def test_guide(
    guide: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The script runs through, and downloads nothing."""
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    (tmp_path / "Arial.ttf").touch()  # the font that ultralytics would fetch for plots
    pytest.importorskip(NEEDS[guide], reason=f"the guide needs {NEEDS[guide]}")
    monkeypatch.setattr(sys, "argv", [guide, *arguments])
    runpy.run_path(str(GUIDES / f"{guide}.py"), run_name="__main__")
