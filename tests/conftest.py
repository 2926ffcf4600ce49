"""Shared set-up: one thread a worker, seeded randomness, hypothesis profiles, ``--update-goldens``."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

IN_CI = bool(os.environ.get("CI"))

torch.set_num_threads(1)
if not torch.accelerator.is_available():
    # It keeps a stack trace for three kinds of devices, in case that one comes: a tenth of the tests' time.
    torch.manual_seed = torch.default_generator.manual_seed
settings.register_profile(
    "fxprune",
    deadline=None,
    derandomize=IN_CI,
    max_examples=20,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fxprune")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens",
        action="store_true",
        help="rewrite tests/golden/*.txt with what the code does now; read the diff before you commit it",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-goldens") and IN_CI:
        raise pytest.UsageError("--update-goldens is refused where the environment variable CI is set.")


@pytest.fixture
def update_goldens(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten."""
    return bool(request.config.getoption("--update-goldens"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
