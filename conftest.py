"""Let pytest run every Python block of the README and the docs, and every docstring's example."""

from __future__ import annotations

import os
import tempfile
from doctest import ELLIPSIS
from typing import Any

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other


def enter(namespace: dict[str, Any]) -> None:
    """Run a page in an empty folder, as its reader would."""
    namespace["_back"], namespace["_folder"] = os.getcwd(), tempfile.TemporaryDirectory()  # noqa: PTH109
    os.chdir(namespace["_folder"].name)


def leave(namespace: dict[str, Any]) -> None:
    """Back from there."""
    os.chdir(namespace["_back"])
    namespace["_folder"].cleanup()


pages = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["*.md"],
    excludes=["CHANGELOG.md", ".venv/**"],
    setup=enter,
    teardown=leave,
)
docstrings = Sybil(
    parsers=[DocTestParser(optionflags=ELLIPSIS)],
    patterns=["cropvote/*.py", "cropvote/*/*.py"],
    setup=enter,
    teardown=leave,
)
pytest_collect_file = (pages + docstrings).pytest()
