"""Fixtures shared by several files; the example's modules are imported only where needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", deadline=None)  # a slow machine is not an error
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Forget what torch.compile learnt about a class's sizes in the tests before, whichever those were."""
    torch.compiler.reset()


@pytest.fixture
def read(tmp_path):
    """Return ``load`` with a cache for this test alone."""
    from data import load

    return lambda path, **options: load(str(path), **{"cache": tmp_path / "cache", "validation": 1, **options})


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a comparison: plain and layer3, seeds 0 and 1."""
    import compare
    from scripts import SMALL, call

    out = tmp_path_factory.mktemp("fer48") / "compare"
    call(compare, *SMALL, "--sites", "none", "layer3", "--seeds", 0, 1, "--out", out)
    return out
