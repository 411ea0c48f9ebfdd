"""A table of PyTorch's tools on a voting model; each entry is a check, and a row of docs/compatibility.md."""

from toolchain import compilers, engines, numbers, processes, stored, training  # noqa: F401  # they fill the table
from toolchain.table import LIMITS, RAISES, TOOLS

__all__ = ["LIMITS", "RAISES", "TOOLS"]
