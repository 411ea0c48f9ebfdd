"""Let pytest run every Python block of the README and the docs, and every docstring's example."""

from __future__ import annotations

from doctest import ELLIPSIS

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other

pages = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"], excludes=["CHANGELOG.md", ".venv/**"])
docstrings = Sybil(parsers=[DocTestParser(optionflags=ELLIPSIS)], pattern="cropvote/*.py")
pytest_collect_file = (pages + docstrings).pytest()
