"""Fixtures of more than one file; what the example needs is imported where it is used."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("tests", deadline=None)  # a busy machine is no error
settings.load_profile("tests")


@pytest.fixture
def read(tmp_path):
    """``load`` with a cache of the test's own."""
    from data import load

    return lambda path, **options: load(str(path), **{"cache": tmp_path / "cache", "validation": 1, **options})


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison: plain and layer3, seeds 0 and 1."""
    import compare
    from scripts import SMALL, call

    out = tmp_path_factory.mktemp("fer48") / "compare"
    call(compare, *SMALL, "--sites", "none", "layer3", "--seeds", 0, 1, "--out", out)
    return out
