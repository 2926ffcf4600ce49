"""The command line: what it loads, what it refuses and in which words, and what it leaves on the disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

import fxprune
from fxprune.__main__ import main as command
from fxprune.cli import loading, main
from fxprune.cli.loading import load
from fxprune.cli.options import CRITERIA, parse_shape
from fxprune.errors import (
    CheckpointError,
    ExampleInputsError,
    ModelSpecError,
    OutputError,
    VerificationError,
)
from fxprune.exporting import capture_program, export
from fxprune.files import load_checkpoint
from fxprune.importance import BUILT_IN
from fxprune.saving import plans_in

NETS = """
    import torch
    from torch import nn

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
            )

    def build():
        return Net()

    def widened(width):
        return nn.Linear(3, width)

    def broken():
        raise OSError("no disk")

    class Holder:
        @staticmethod
        def make():
            return nn.Linear(3, 3)

    ready = nn.Linear(3, 3)
    number = 7

    def text():
        return "a model"

    def weightless():
        return nn.Linear(3, 3, device="meta")

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(*list(Net())[:-1]), nn.Linear(8, 5)

        def forward(self, images):
            y = self.head(torch.cat([self.body(image[None]) for image in images]))
            return [row[row > row.mean()] if row.mean() > 0 else row for row in y]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder that holds ``nets.py``, importable only from there."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("nets", "nets_with_inputs", "nets_bad", "nets_data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail, and return its one line of error."""
    code: Any
    try:
        code = main(argv)
    except SystemExit as usage:  # of argparse, before anything is imported
        code = usage.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


class TestModels:
    @pytest.mark.parametrize("path", ["build", "Net", "ready", "Holder.make"])
    def test_factories(self, folder: Path, path: str) -> None:
        loaded = load(f"nets:{path}", shapes=[(1, 3)])
        assert isinstance(loaded.model, nn.Module)
        assert not loaded.model.training
        assert [x.shape for x in loaded.inputs] == [(1, 3)]

    def test_same_seed_same_model(self, folder: Path) -> None:
        one, two, other = (load("nets:build", shapes=[(1, 3, 8, 8)], seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.model[0].weight, two.model[0].weight)
        assert torch.equal(one.inputs[0], two.inputs[0])
        assert not torch.equal(one.model[0].weight, other.model[0].weight)

    @pytest.mark.parametrize(
        ("definition", "expected"),
        [
            ("example_inputs = torch.zeros(2, 3)", Tensor),
            ("example_inputs = (torch.zeros(2, 3),)", tuple),
            ("def example_inputs(): return {'input': torch.zeros(2, 3)}", dict),
        ],
    )
    def test_example_inputs_of_the_module(self, folder: Path, definition: str, expected: type) -> None:
        text = f"import torch\nmodel = torch.nn.Linear(3, 3)\n{definition}\n"
        (folder / "nets_with_inputs.py").write_text(text)
        assert isinstance(load("nets_with_inputs:model").inputs, expected)
        # What the command line says wins.
        assert load("nets_with_inputs:model", shapes=[(7, 3)]).inputs[0].shape == (7, 3)

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("resnet18", "write torchvision:NAME"),
            ("torchvision:resnet19", "did you mean resnet18"),
            ("torchvision:zzz", "such as resnet18"),
            ("nowhere:build", "there is no module 'nowhere'"),
            ("nets:bulid", "it has build"),
            ("nets:widened", r"needs arguments \(width\)"),
            ("nets:broken", "failed to make a model: OSError: no disk"),
            ("nets:number", "is a int, which cannot make a model"),
            ("nets:text", "gave a value of type str, not a torch.nn.Module"),
            ("nets:weightless", "weight, bias on the meta device"),
        ],
    )
    def test_refused(self, folder: Path, spec: str, words: str) -> None:
        with pytest.raises(ModelSpecError, match=words):
            load(spec, shapes=[(1, 3)])

    def test_module_that_fails_to_import(self, folder: Path) -> None:
        (folder / "nets_bad.py").write_text("import not_there\n")
        with pytest.raises(ModelSpecError, match="importing nets_bad failed: No module named 'not_there'"):
            load("nets_bad:build")
        (folder / "nets_bad.py").write_text("1 / 0\n")
        with pytest.raises(ModelSpecError, match="ZeroDivisionError"):
            load("nets_bad:build")

    def test_weights_are_torchvisions(self, folder: Path) -> None:
        with pytest.raises(ModelSpecError, match="has no weights 'BEST'; it has IMAGENET1K_V1, DEFAULT"):
            load("torchvision:resnet18", weights="BEST")
        with pytest.raises(ModelSpecError, match="for torchvision: and timm: models only"):
            load("nets:build", weights="DEFAULT")

    def test_download_that_fails(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision

        def offline(*_: Any, **__: Any) -> nn.Module:
            raise OSError("Name or service not known")

        monkeypatch.setattr(torchvision.models, "get_model", offline)
        with pytest.raises(ModelSpecError, match=r"cannot load the weights DEFAULT .* --checkpoint FILE"):
            load("torchvision:resnet18", weights="DEFAULT")

    @pytest.mark.parametrize(
        ("name", "size"), [("shufflenet_v2_x0_5", 224), ("inception_v3", 299), ("swin_v2_t", 256)]
    )
    def test_default_sizes(self, name: str, size: int) -> None:
        loaded = load(f"torchvision:{name}")
        assert loaded.inputs[0].shape == (1, 3, size, size)
        assert loaded.weights.startswith("random")

    @pytest.mark.parametrize(
        "spec", ["nets:build", "torchvision:r3d_18", "torchvision:lraspp_mobilenet_v3_large"]
    )
    def test_unknown_inputs(self, folder: Path, spec: str) -> None:
        with pytest.raises(ExampleInputsError, match="add --input-shape"):
            load(spec)

    def test_several_inputs_take_the_models_type(self, folder: Path) -> None:
        (folder / "nets_with_inputs.py").write_text(
            "import torch\nmodel = torch.nn.Bilinear(2, 3, 4).double()\n"
        )
        inputs = load("nets_with_inputs:model", shapes=[(5, 2), (5, 3)]).inputs
        assert [(tuple(x.shape), x.dtype) for x in inputs] == [
            ((5, 2), torch.float64),
            ((5, 3), torch.float64),
        ]

    def test_bad_example_inputs(self, folder: Path) -> None:
        text = "import torch\nmodel = torch.nn.Linear(3, 3)\nexample_inputs = [1]\n"
        (folder / "nets_with_inputs.py").write_text(text)
        with pytest.raises(ExampleInputsError, match="example_inputs is a list"):
            load("nets_with_inputs:model")


@pytest.mark.parametrize("text", ["1,3,224,224", "1x3x224x224", "1, 3, 224, 224"])
def test_shapes(text: str) -> None:
    assert parse_shape(text) == (1, 3, 224, 224)


@pytest.mark.parametrize("text", ["", "1,,3", "a,b", "1,0,3", "-1,3", "1.5,2", "[]", "[3,4", "[3;0]"])
def test_bad_shapes(text: str) -> None:
    with pytest.raises(ExampleInputsError, match="for example --input-shape 1,3,224,224"):
        parse_shape(text)


def test_shapes_of_lists() -> None:
    """In brackets stand the tensors of an input that is a list."""
    assert parse_shape("[3,48,64; 3x32x32]") == [(3, 48, 64), (3, 32, 32)]
    assert parse_shape(" [3,48,64]") == [(3, 48, 64)]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight


class TestCheckpoints:
    @pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth", "wrapped.pt"])
    def test_loads(self, tmp_path: Path, name: str) -> None:
        source, target, path = nn.BatchNorm1d(3), nn.BatchNorm1d(3), tmp_path / name
        nn.init.normal_(source.weight)
        if name == "a.safetensors":
            save_file(source.state_dict(), path)
        else:
            state = source.state_dict()
            torch.save({"state_dict": state, "epoch": 3} if name == "wrapped.pt" else state, path)
        load_checkpoint(target, path)
        assert torch.equal(source.weight, target.weight)

    def test_prefixes_and_nests(self, tmp_path: Path) -> None:
        """DataParallel and torch.compile rename what they hold, and trainers nest it."""
        source, target, path = nn.BatchNorm1d(3), nn.BatchNorm1d(3), tmp_path / "a.pt"
        nn.init.normal_(source.weight)
        wrapped = nn.DataParallel(torch.compile(source)).state_dict()
        assert all(name.startswith("module._orig_mod.") for name in wrapped)
        torch.save({"epoch": 3, "state_dict": {"model": wrapped}}, path)
        load_checkpoint(target, path)
        assert torch.equal(source.weight, target.weight)

    def test_tied_tensors_are_stored_once(self, tmp_path: Path) -> None:
        source, target, path = Tied(), Tied(), tmp_path / "a.safetensors"
        save_model(source, str(path))
        load_checkpoint(target, path)
        assert torch.equal(source.embed.weight, target.head.weight)
        assert target.head.weight is target.embed.weight

    @pytest.mark.parametrize(
        ("state", "words"),
        [
            ({"weight": torch.zeros(2, 3)}, "it lacks bias"),
            (
                {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x": torch.zeros(1)},
                "the model has no x",
            ),
            (
                {"weight": torch.zeros(9, 3), "bias": torch.zeros(2)},
                r"shapes differ: weight \(file \[9, 3\], model \[2, 3\]\)",
            ),
            ({f"module.{i}": torch.zeros(1) for i in range(9)}, r"the model has no module\.0.*and 6 more"),
            ({}, "no tensors"),
            ({"epoch": 3}, "epoch, which are no tensors"),
            ([1, 2], "holds a list"),
        ],
    )
    def test_misfits(self, tmp_path: Path, state: Any, words: str) -> None:
        model, path = nn.Linear(3, 2), tmp_path / "a.pt"
        before = model.weight.clone()
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=words) as caught:
            load_checkpoint(model, path)
        assert str(path) in str(caught.value)
        assert torch.equal(model.weight, before)

    @pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
    @pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
    def test_damaged(self, tmp_path: Path, name: str, damage: str) -> None:
        path, state = tmp_path / name, nn.Linear(30, 20).state_dict()
        if name == "a.pt":
            torch.save(state, path)
        else:
            save_file(state, path)
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\x07noise" * 50}[damage])
        with pytest.raises(CheckpointError, match=str(path)):
            load_checkpoint(nn.Linear(30, 20), path)

    def test_code_is_never_run(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save(nn.Linear(3, 2), path)
        with pytest.raises(CheckpointError, match="runs no code from checkpoints"):
            load_checkpoint(nn.Linear(3, 2), path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no checkpoint file"):
            load_checkpoint(nn.Linear(3, 2), tmp_path / "nowhere.pt")


class TestOutput:
    @pytest.mark.parametrize(
        ("out", "words"),
        [
            ("a.pt", r"try a\.pt2"),
            ("nowhere/a.pt2", "there is no folder"),
            ("taken.pt2", "it is a folder"),
            pytest.param(
                "/proc/a.pt2",
                "takes no files",
                marks=pytest.mark.skipif(
                    sys.platform != "linux", reason="a folder that even root cannot write"
                ),
            ),
        ],
    )
    def test_refused_before_any_work(
        self,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        out: str,
        words: str,
    ) -> None:
        (folder / "taken.pt2").mkdir()
        monkeypatch.setattr(loading, "load_source", lambda *_, **__: pytest.fail("work was started"))
        line = refused(capsys, "prune", "nets:build", "--out", out)
        assert re.search(words, line)
        assert sorted(p.name for p in folder.iterdir()) == ["nets.py", "taken.pt2"]

    def test_batch_size_is_free(self, tmp_path: Path) -> None:
        model, path = nn.Linear(3, 2), tmp_path / "a.pt2"
        written = export(model, torch.zeros(1, 3), path)
        assert written.sizes == "any batch"
        assert written.bytes == path.stat().st_size
        assert model.training
        x = torch.randn(7, 3)
        torch.testing.assert_close(torch.export.load(path).module()(x), model(x))
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt2"]

    def test_sizes_are_free_where_the_network_takes_others(self, tmp_path: Path) -> None:
        """Images of any size; of one only, where they are flattened."""
        x = torch.randn(1, 3, 8, 8)
        for last, said in (
            (nn.AdaptiveAvgPool2d(1), "any batch, height, width"),
            (nn.Identity(), "any batch; height, width as in the example"),
        ):
            head = nn.LazyLinear(2)
            model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), last, nn.Flatten(), head).eval()
            model(x)
            written = export(model, x, tmp_path / "a.pt2")
            assert written.sizes == said
            other = torch.randn(5, 3, *((11, 12) if "any batch, height" in said else (8, 8)))
            torch.testing.assert_close(torch.export.load(written.path).module()(other), model(other))

    def test_keyword_inputs(self) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor, extra: dict[str, Tensor], flag: bool = False) -> dict[str, Tensor]:
                return {"sum": x + extra["y"]}

        inputs = {"x": torch.zeros(2, 3), "extra": {"y": torch.zeros(2, 3)}}
        exported = capture_program(Net(), (), inputs)
        assert exported.sizes == "any batch, length"
        found = exported.program.module()(x=torch.ones(5, 3), extra={"y": torch.ones(5, 3)})
        assert found["sum"].shape == (5, 3)

    def test_batch_size_is_fixed_where_it_must_be(self) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.view(2, 3) + 1

        exported = capture_program(Net(), (torch.zeros(2, 3),), {})
        assert exported.sizes.startswith("the example's sizes only")
        assert exported.program.module()(torch.ones(2, 3)).shape == (2, 3)

    def test_what_cannot_be_exported(self) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x if x.sum().item() > 0 else -x

        with pytest.raises(OutputError, match=r"torch\.export refuses"):
            capture_program(Net(), (torch.zeros(2, 3),), {})

    def test_interrupted_write_keeps_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.pt2"
        path.write_text("old")

        def full(_: Any, file: Path, **__: Any) -> None:
            file.write_text("half")
            raise OSError("No space left on device")

        monkeypatch.setattr(torch.export, "save", full)
        with pytest.raises(OutputError, match="No space left"):
            export(nn.Linear(3, 2), torch.zeros(1, 3), path)
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt2"]


class TestErrors:
    """Each is one line on stderr and exit code 2, and leaves no file."""

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["nets:build"], "add --input-shape"),
            (["nets:build", "--input-shape", "1,3,x"], "cannot read --input-shape"),
            (["nets:build", "--ratio", "1"], "--ratio: 1 is not a share"),
            (["nets:build", "--ratio", "-0.1"], "--ratio: -0.1 is not a share"),
            (["nets:build", "--heads", "1"], "--heads: 1 is not a share"),
            (["nets:build", "--ratio", "nan"], "nan is not a share"),
            (["nets:build", "--ratio", "50%"], "50% is not a share"),
            (["nets:build", "--input-shape", "1,3,8,8", "--ratio", "0.5", "--macs", "0.5"], "contradict"),
            (["nets:build", "--params", "0"], "larger than 0"),
            (["nets:build", "--input-shape", "1,3,8,8", "--params", "0.01"], "the least that can be reached"),
            (["nets:build", "--input-shape", "1,3,8,8", "--keep", "nothing"], "the nearest are"),
            (["torchvision:resnet"], "did you mean"),
            (["nets:build", "--checkpoint", "nowhere.pt"], "there is no file nowhere.pt"),
            (["nets:build", "--calibrate", "."], ". is a folder"),
            (["nets:build", "--input-shape", "1,99999999,99999999,3"], "cannot make an input"),
            (["nets:build", "--input-shape", "1,99999999999999999999999"], "cannot make an input"),
        ],
    )
    def test_one_line(
        self, folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
    ) -> None:
        assert words in refused(capsys, "prune", *argv, "--out", "a.pt2")
        assert [p.name for p in folder.iterdir()] == ["nets.py"]

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["prune", "own.py:leaves"], "own.py:leaves failed to make a model: SystemExit: 0"),
            (["prune", "script:build"], "importing script failed: SystemExit: 3"),
            (["prune", "script.py:build"], "running script.py failed: SystemExit: 3"),
            (["plan", "own.py:build", "--importance", "own.py:bare"], "AssertionError, raised at"),
            (["plan", "own.py:build", "--importance", "own.py:fails"], "own.py:7 in fails (--debug shows"),
            (["plan", "own.py:build", "--importance", "own.py:gives_up"], "SystemExit: 4, raised at"),
            (["plan", "own.py:build", "--calibrate", "own.py:loader"], "OSError: disk gone, raised at"),
            (["plan", "own.py:build", "--calibrate", "one.safetensors"], "single numbers alone"),
            (["plan", "own.py:build", "--checkpoint", "junk.pt"], "junk.pt cannot be read"),
            (["plan", "empty:build"], "empty)"),
            (["bench", "own.py:build", "--input-shape", "1,5"], "does not run on its inputs (1x5: random"),
            (["export", "own.py:build", "--input-shape", "1,5", "--out", "a.pt2"], "does not run on its"),
            (["bench", "own.py:Bare"], "in forward: AssertionError"),
        ],
    )
    def test_what_their_own_files_do(
        self, folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
    ) -> None:
        """Codes with which a user's code leaves the process are none of ours, and its errors are its own."""
        own = """\
            import torch, sys
            def build(): return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
            example_inputs = torch.zeros(1, 3)
            def leaves(): sys.exit(0)
            def bare(group): assert group is None
            def fails(group):
                raise ValueError("no scores")
            def gives_up(group): sys.exit(4)
            def loader():
                yield torch.zeros(2, 3)
                raise OSError("disk gone")
            class Bare(torch.nn.Module):
                def forward(self, x): assert x is None
            """
        (folder / "own.py").write_text(textwrap.dedent(own))
        (folder / "script.py").write_text("import sys\nsys.exit(3)\n")
        (folder / "junk.pt").write_bytes(b"junk")
        (folder / "empty").mkdir()
        save_file({"x": torch.tensor(1.0)}, "one.safetensors")
        before = {path.name for path in folder.iterdir()}
        assert words in refused(capsys, *argv)
        assert {path.name for path in folder.iterdir()} == before

    def test_debug_shows_where(self, folder: Path) -> None:
        with pytest.raises(ModelSpecError):
            main(["prune", "nets:nothing", "--debug"])

    def test_malformed_arguments(self, capsys: pytest.CaptureFixture[str]) -> None:
        for argv in (["prune"], ["prune", "nets:build", "--ratio", "half"], ["prun"]):
            with pytest.raises(SystemExit) as caught:
                main(argv)
            assert caught.value.code == 2
        assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())

    def test_unexpected_error(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("oh")

        monkeypatch.setattr(loading, "load_source", fail)
        line = refused(capsys, "prune", "nets:build")
        assert "unexpected ZeroDivisionError: oh" in line
        assert "--debug" in line

    def test_interrupt(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(loading, "load_source", interrupt)
        assert command(["prune", "nets:build"]) == 130

    def test_a_signal_ends_a_process_as_is_written(self, tmp_path: Path) -> None:
        """Ctrl-C while the model is made: the documented exit code, no traceback, no file."""
        lines = (
            "import pathlib, time",
            "",
            "def build():",
            "    pathlib.Path('here').touch()",
            "    time.sleep(60)",
        )
        (tmp_path / "slow.py").write_text("\n".join(lines))
        argv = ["prune", "slow.py:build", "--out", "half.safetensors", "--plan-out", "plan.json"]
        start = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # may be ignored
        )
        start += "; from fxprune.__main__ import main; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", start, *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(fxprune.__file__).parents[1])},
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (tmp_path / "here").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1].endswith("interrupted\n")
        assert process.returncode == 130
        assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"slow.py", "here"}

    @pytest.mark.parametrize(
        ("stage", "whole"),
        [
            ("fxprune.analyze", []),
            ("fxprune.plan", []),
            ("fxprune.PruningPlan.apply", []),
            ("fxprune.verify", []),
            ("fxprune.measure.measure_latency", []),
            ("fxprune.pages.report_html", ["plan.json"]),
            ("fxprune.saving.save_file", ["plan.json", "report.html"]),
            ("torch.export.save", ["plan.json", "report.html", "half.safetensors"]),
        ],
    )
    def test_an_interrupt_leaves_no_broken_file(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, whole: list[str]
    ) -> None:
        def interrupt(*given: Any, **_: Any) -> None:
            for path in given:  # a part of the file is there
                if isinstance(path, (str, Path)):
                    Path(path).write_text("half of it")
            raise KeyboardInterrupt

        monkeypatch.setattr(stage, interrupt)
        out = ["--out", "half.safetensors", "--out", "half.pt2", "--report", "report.html"]
        out += ["--plan-out", "plan.json"]
        (folder / "half.pt2").write_text("from before")
        assert command(["prune", "nets:build", "--input-shape", "1,3,8,8", *out]) == 130
        named = {path.name for path in folder.iterdir()}
        assert named == {"nets.py", "half.pt2", *whole}
        assert (folder / "half.pt2").read_text() == "from before"

    def test_nothing_is_written_when_verification_fails(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def differ(*_: Any) -> None:
            raise VerificationError("node conv differs")

        monkeypatch.setattr(fxprune, "verify", differ)
        argv = ["prune", "nets:build", "--input-shape", "1,3,8,8", "--out", "a.pt2", "--no-latency"]
        argv += ["--plan-out", "plan.json", "--report", "report.html"]
        assert main(argv) == 1
        assert capsys.readouterr().err.splitlines()[-1] == "error: node conv differs"
        assert [p.name for p in folder.iterdir()] == ["nets.py"]


class TestHelp:
    def test_no_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 0
        assert "fxprune prune torchvision:resnet18" in capsys.readouterr().out

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert torch.__version__.partition("+")[0] in capsys.readouterr().out


class TestEndToEnd:
    def test_prunes_and_writes(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["prune", "nets:build", "--input-shape", "1,3,8,8", "--ratio", "0.5", "--out", "half.pt2"]
        assert main(argv) == 0
        captured = capsys.readouterr()
        for step in ("weights", "capture", "plan", "rewrite", "verify", "latency", "write"):
            assert f"{step}  " in captured.err
        rows = {line.split("  ")[0]: line for line in captured.out.splitlines()}
        for row in ("parameters", "MACs", "weights on disk", "latency"):
            assert row in rows
        # 3·8·9+8 + 16 + 8·8·9+8 + 8·5+5 = 869 become 3·4·9+4 + 8 + 4·4·9+4 + 4·5+5 = 293.
        assert rows["parameters"].split()[1:] == ["869", "293", "0.34x"]
        pruned = torch.export.load("half.pt2").module()
        assert pruned(torch.randn(3, 3, 8, 8)).shape == (3, 5)
        assert sorted(p.name for p in folder.iterdir()) == ["half.pt2", "nets.py"]

    def test_checkpoint_reaches_the_result(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = load("nets:build", shapes=[(1, 3, 8, 8)], seed=5).model
        save_file(source.state_dict(), "mine.safetensors")
        argv = ["prune", "nets:build", "--input-shape", "1,3,8,8", "--checkpoint", "mine.safetensors"]
        assert main([*argv, "--ratio", "0", "--out", "same.pt2", "--no-latency"]) == 0
        captured = capsys.readouterr()
        assert "from mine.safetensors" in captured.err
        assert "latency" not in captured.out
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(torch.export.load("same.pt2").module()(x), source(x))

    def test_parts_are_written_as_weights(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """What is pruned by regions is no exported program; the file narrows the original."""
        argv = ["prune", "nets:Detector", "--input-shape", "[3,8,8; 3,6,9]", "--no-latency"]
        line = refused(capsys, *argv, "--out", "half.pt2")
        assert "try half.safetensors" in line
        assert [p.name for p in folder.iterdir()] == ["nets.py"]
        assert main([*argv, "--out", "half.safetensors"]) == 0
        assert "[3x8x8, 3x6x9]: random" in capsys.readouterr().err
        loaded = load("nets:Detector", shapes=[[(3, 8, 8), (3, 6, 9)]])
        pruned = fxprune.load(load("nets:Detector", shapes=[(1,)], seed=7).model, "half.safetensors")
        (plan,) = plans_in(Path("half.safetensors"))[1]
        for got, wanted in zip(pruned(*loaded.inputs), plan.apply(loaded.model)(*loaded.inputs), strict=True):
            assert torch.equal(got, wanted)

    def test_budgets_and_selection(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = [
            "prune",
            "nets:build",
            "--input-shape",
            "1,3,8,8",
            "--params",
            "0.7",
            "--global",
            "--round-to",
            "2",
        ]
        assert main([*argv, "--max-ratio", "0.9", "--size-mb", "1", "--no-latency", "--no-verify"]) == 0
        captured = capsys.readouterr()
        assert "not verified" in captured.out
        assert "params 0.7, size_mb 1 by l2, global ranking" in captured.err
        rows = {line.split("  ")[0]: line.split() for line in captured.out.splitlines()}
        assert 0.5 < float(rows["parameters"][-1].rstrip("x")) <= 0.7

    @pytest.mark.parametrize(
        ("importance", "said"),
        [
            (["wanda", "--calibrate", "nets_data:batches"], "by wanda"),
            (["nets_data:criterion"], "by nets_data:criterion"),
            (["nets_data:make"], "by nets_data:make"),
            (["nets_data:scores"], "by nets_data:scores"),
        ],
    )
    def test_any_criterion(
        self, folder: Path, capsys: pytest.CaptureFixture[str], importance: list[str], said: str
    ) -> None:
        (folder / "nets_data.py").write_text(
            "import torch, fxprune\n"
            "batches = [torch.randn(2, 3, 8, 8)]\n"
            "pairs = [(batches[0], torch.tensor([0, 1]))]\n"
            "criterion = fxprune.importance.Taylor(torch.nn.functional.cross_entropy, pairs)\n"
            "def make(): return fxprune.importance.Activation(batches)\n"
            "def scores(group): return -torch.arange(group.size)\n"
        )
        argv = ["plan", "nets:build", "--input-shape", "1,3,8,8", "--out", "plan.json"]
        assert main([*argv, "--importance", *importance]) == 0
        assert said in capsys.readouterr().err
        if importance == ["nets_data:scores"]:
            plan = fxprune.PruningPlan.load(folder / "plan.json")
            assert [*map(list, plan.removed.values())] == [[4, 5, 6, 7]] * 2

    def test_criteria_and_data_that_will_not_do(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder / "nets_data.py").write_text("import torch\nother, batch = [torch.zeros(2, 5, 8, 8)], 3\n")
        argv = ["plan", "nets:build", "--input-shape", "1,3,8,8"]
        for importance, said in (("taylor", "taylor needs a loss"), ("wandar", "did you mean wanda?")):
            with pytest.raises(SystemExit):
                main([*argv, "--importance", importance])
            assert said in capsys.readouterr().err
        for more, said in (
            (["--importance", "wanda"], "needs inputs: add --calibrate DATA"),
            (
                ["--calibrate", "nets_data:other"],
                "does not take the first batch that --calibrate nets_data:other gives",
            ),
            (["--calibrate", "nets_data:batch"], "gave a value of type int; it should be a list of batches"),
            (["--lossless", "--ratio", "0.2", "--global"], "leave out --ratio and --global"),
        ):
            assert said in refused(capsys, *argv, *more)

    def test_exact_only_without_a_file(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["prune", "nets:build", "--input-shape", "1,3,8,8", "--exact-only", "--importance", "random"]
        assert main([*argv, "--no-latency"]) == 0
        assert "exact groups only" in capsys.readouterr().err
        assert [p.name for p in folder.iterdir()] == ["nets.py"]


class TestCommands:
    """Plan, apply, verify, export, count and bench; and what they say to machines."""

    SOURCE = ("nets:build", "--input-shape", "1,3,8,8")

    def data(self, capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*argv, "--json", "--quiet"]) == code
        captured = capsys.readouterr()
        assert captured.err == ""
        found: dict[str, Any] = json.loads(captured.out)
        assert found["command"] == argv[0]
        return found

    def test_from_plan_to_file(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        planned = self.data(capsys, "plan", *self.SOURCE, "--ratio", "0.5", "--out", "plan.json")
        assert planned["removed"] == 8
        applied = self.data(
            capsys,
            "apply",
            *self.SOURCE,
            "plan.json",
            "--out",
            "half.safetensors",
            "--out",
            "half.pt2",
            "--no-latency",
        )
        assert (applied["before"]["params"], applied["after"]["params"]) == (869, 293)
        assert [file["path"] for file in applied["files"]] == ["half.safetensors", "half.pt2"]
        assert sorted(p.name for p in folder.iterdir()) == [
            "half.pt2",
            "half.safetensors",
            "nets.py",
            "plan.json",
        ]
        model = load("nets:build", shapes=[(1, 3, 8, 8)]).model
        x = torch.randn(3, 3, 8, 8)
        trainable = fxprune.load(model, "half.safetensors")
        torch.testing.assert_close(torch.export.load("half.pt2").module()(x), trainable(x))
        for pruned in ("half.safetensors", "plan.json"):
            assert "exact" in self.data(capsys, "verify", *self.SOURCE, "--pruned", pruned)["verdict"]
            counted = self.data(capsys, "count", *self.SOURCE, "--pruned", pruned)
            assert counted["after"] == applied["after"]
        seconds = self.data(capsys, "bench", *self.SOURCE, "--pruned", "half.safetensors")["seconds"]
        assert set(seconds) == {"before", "after"}

    def test_a_trained_network_is_not_what_its_plan_says(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pruned = fxprune.prune(load("nets:build", shapes=[(1,)]).model, torch.zeros(1, 3, 8, 8))
        pruned.get_parameter("0.weight").data.mul_(2)
        fxprune.save(pruned, "trained.safetensors")
        assert main(["verify", *self.SOURCE, "--pruned", "trained.safetensors"]) == 1
        assert "first differs" in capsys.readouterr().err

    def test_dry_run(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["prune", *self.SOURCE, "--dry-run", "--plan-out", "plan.json", "--out", "half.pt2"]
        assert main(argv) == 0
        assert "*.weight[0] (x2)       8 ->      4" in capsys.readouterr().out
        assert sorted(p.name for p in folder.iterdir()) == ["nets.py", "plan.json"]
        assert fxprune.PruningPlan.load("plan.json").settings["ratio"] == 0.5

    def test_lossless(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = load("nets:build", shapes=[(1,)]).model
        with torch.no_grad():
            for tensor in (model[0].weight, model[0].bias, model[1].bias):
                tensor[:3] = 0
        save_file(model.state_dict(), "sparse.safetensors")
        argv = ["prune", *self.SOURCE, "--checkpoint", "sparse.safetensors", "--lossless", "--no-latency"]
        assert main([*argv, "--out", "small.safetensors"]) == 0
        assert "the same as the original" in capsys.readouterr().out
        small = fxprune.load(load("nets:build", shapes=[(1,)]).model, "small.safetensors")
        assert small.get_parameter("0.weight").shape[0] == 5
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(small(x), model.eval()(x))
        assert main(["prune", *self.SOURCE, "--lossless", "--no-latency"]) == 3

    def test_nothing_removed_has_a_code_of_its_own(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = ["prune", "nets:ready", "--input-shape", "1,3", "--no-latency"]
        assert main(argv) == 3
        assert "nothing was removed" in capsys.readouterr().err
        assert main([*argv, "--ratio", "0"]) == 0
        assert main([*argv, "--dry-run"]) == 3

    def test_inference_only_is_said(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["export", *self.SOURCE, "--out", "whole.pt2"]) == 0
        assert main(["prune", *self.SOURCE, "--no-latency", "--out", "half.pt2"]) == 0
        assert "--out half.safetensors writes a form that can be trained" in capsys.readouterr().err
        extra = {"fxprune": ""}
        torch.export.load("half.pt2", extra_files=extra)
        assert "This program is for inference" in extra["fxprune"]

    def test_files_and_calibration(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "apart").mkdir()
        (folder / "nets.py").rename(folder / "apart" / "mine.py")
        save_file({"images": torch.randn(6, 3, 8, 8)}, "images.safetensors")
        source = ["apart/mine.py:build", "--input-shape", "1,3,8,8", "--no-latency"]
        assert main(["prune", *source, "--calibrate", "images.safetensors", "--out", "fit.safetensors"]) == 0
        assert "calibration" in capsys.readouterr().err
        fitted = fxprune.load(load("apart/mine.py:build", shapes=[(1,)]).model, "fit.safetensors")
        assert fitted(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
        assert "there is no file apart/other.py" in refused(capsys, "count", "apart/other.py:build")

    def test_branches_and_depth(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = "from test_branches import Residual, Unit\n\ndef build():\n    "
        (folder / "nets.py").write_text(f"{text}return Residual([Unit('plain', 8), Unit('plain', 8)])\n")
        save_file({"images": torch.randn(16, 3, 6, 6)}, "images.safetensors")
        source = ["nets:build", "--input-shape", "1,3,6,6"]
        assert main(["inspect", *source]) == 0
        assert "2 residual branches, which can go as a whole" in capsys.readouterr().out
        argv = ["prune", *source, "--no-latency", "--report", "page.html"]
        assert main([*argv, "--ratio", "0", "--branch", "units.1", "--out", "short.safetensors"]) == 0
        (plan,) = plans_in(Path("short.safetensors"))[1]
        assert (plan.branches, plan.removed) == (("units.1",), {})
        page = Path("page.html").read_text()
        assert page.count("<td>goes</td>") == page.count("<td>stays</td>") == 1
        more = ["--params", "0.6", "--calibrate", "images.safetensors", "--depth", "1"]
        capsys.readouterr()
        assert main([*argv, *more, "--json", "--dry-run"]) == 0
        assert set(json.loads(capsys.readouterr().out)["settings"]["branches_tried"]) == {"0", "1"}

    def test_timm(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("timm")
        assert load("timm:resnet10t").inputs[0].shape[1] == 3
        with pytest.raises(ModelSpecError, match="did you mean"):
            load("timm:resnet10u")

    def test_hugging_face(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A folder with a configuration, no cache in the results, and no code of the folder."""
        pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, **sizes}
        (folder / "config.json").write_text(json.dumps(config))
        loaded = load(f"hf:{folder}")
        assert list(loaded.inputs) == ["input_ids"]
        assert set(loaded.model(**loaded.inputs).keys()) == {"logits"}
        with pytest.raises(ModelSpecError, match=r"there is no nowhere.config\.json"):
            load("hf:nowhere")

    def test_criteria_are_those_that_need_no_data(self) -> None:
        assert list(CRITERIA) == list(BUILT_IN)

    @pytest.mark.parametrize(
        "argv",
        [
            ["--help"],
            ["prune", "--help"],
            ["prune", "--ratoi"],
            ["nothing"],
            [],
            ["prune", "resnet18"],
            ["prune", "torchvision:resnet18", "--out", "half.foo"],
            ["plan", "torchvision:resnet18", "--ratio", "1.5"],
            ["plan", "torchvision:resnet18", "--ratio", "0.5", "--macs", "0.5"],
            ["plan", "torchvision:resnet18", "--macs", "nan"],
            ["plan", "torchvision:resnet18", "--round-to", "0"],
            ["plan", "torchvision:resnet18", "--max-ratio", "3"],
            ["plan", "torchvision:resnet18", "--seed", "99999999999999999999"],
            ["plan", "torchvision:resnet18", "--checkpoint", "nowhere.pt"],
            ["plan", "torchvision:resnet18", "--calibrate", "nowhere.pt"],
            ["apply", "torchvision:resnet18", "nowhere.json"],
            ["count", "torchvision:resnet18", "--pruned", "nowhere.json"],
            ["plan", "nowhere.py:build"],
            ["plan", "hf:nowhere"],
            ["apply", "torchvision:resnet18", "plan.json", "--out", "half.foo"],
            ["inspect", "torchvision:resnet18", "--input-shape", "a,b"],
            ["count", "nets.py:build", "--weights", "DEFAULT"],
            ["export", "torchvision:resnet18", "--out", "half.foo"],
            ["verify", "torchvision:resnet18", "--pruned", "half.foo"],
        ],
    )
    def test_help_and_wrong_usage_do_not_wait_for_torch(self, argv: list[str]) -> None:
        code = f"""
import sys
from fxprune.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
sys.stdout.write(f"imported {{'torch' in sys.modules}}")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("imported False")


# -- small faults ----------------------------------------------------------------------------------


def test_the_checkpoint_that_is_read_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision

    path = tmp_path / "net.safetensors"
    save_file(torchvision.models.squeezenet1_1().state_dict(), path)
    before = path.read_bytes()
    link = tmp_path / "same.safetensors"
    link.symlink_to(path)
    for out in (path, tmp_path / "." / path.name, link):
        command = ["prune", "torchvision:squeezenet1_1", "--checkpoint", str(path), "--out", str(out)]
        assert main(command) == 2
        assert "it is a file that is read" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("words", [["--rat", "0.5"], ["--glob"], ["--input", "1,3,32,32"], ["--no-lat"]])
def test_options_have_whole_names(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["prune", "torchvision:resnet18", *words])
    assert error.value.code == 2
    assert "fxprune prune does not take --" in capsys.readouterr().err


TOKENS = """
import torch
from torch import nn

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 5)
    def forward(self, ids, mask=None):
        h = self.table(ids)
        h = h if mask is None else h * mask[..., None]
        return self.b(self.a(h).relu())

class Positions(Tokens):
    def forward(self, x):
        return self.b(self.a(x + self.table(torch.arange(x.shape[1]))).relu())
"""


@pytest.mark.parametrize(
    ("factory", "shapes", "whole"),
    [
        ("Tokens", ["2,7"], [True]),
        ("Tokens", ["2,7", "2,7"], [True, False]),
        ("Positions", ["2,7,16"], [False]),
    ],
)
def test_token_models_get_whole_numbers(
    factory: str, shapes: list[str], whole: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"tokens_{abs(hash((factory, len(shapes))))}"
    (tmp_path / f"{name}.py").write_text(TOKENS)
    loaded = load(f"{name}:{factory}", shapes=[parse_shape(text) for text in shapes])
    assert [not tensor.is_floating_point() for tensor in loaded.inputs] == whole
    if whole[0]:
        assert int(loaded.inputs[0].max()) < 50


@pytest.mark.parametrize("form", ["{stem}.py", "./{stem}.py", "folder/../{stem}.py", "{folder}/{stem}.py"])
def test_a_model_in_a_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    stem = f"file_{abs(hash(form))}"
    (tmp_path / f"{stem}_part.py").write_text("from torch import nn\nwidth = 8\n")
    (tmp_path / f"{stem}.py").write_text(
        f"from {stem}_part import nn, width\ndef build():\n    return nn.Linear(4, width)\n"
    )
    spec = form.format(stem=stem, folder=tmp_path) + ":build"
    assert load(spec, shapes=[(1, 4)]).model.out_features == 8


@pytest.mark.parametrize(
    ("nest", "said"),
    [
        (lambda s: s, ()),
        (lambda s: {"state_dict": s}, ("found under 'state_dict'",)),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, ("names without 'module.'",)),
        (
            lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
            ("found under 'model'", "names without '_orig_mod.'", "names without 'module.'"),
        ),
    ],
)
def test_what_is_taken_off_a_checkpoint_is_said(nest: Any, said: tuple[str, ...], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    torch.save(nest(model.state_dict()), tmp_path / "c.pt")
    assert load_checkpoint(nn.Sequential(nn.Linear(3, 2)), tmp_path / "c.pt") == said
