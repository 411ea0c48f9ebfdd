"""Let pytest run every Python block of the README and the docs, and every docstring's example."""

from __future__ import annotations

from doctest import ELLIPSIS

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

pages = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"], excludes=["CHANGELOG.md", ".venv/**"])
docstrings = Sybil(parsers=[DocTestParser(optionflags=ELLIPSIS)], pattern="cropvote/*.py")
pytest_collect_file = (pages + docstrings).pytest()
