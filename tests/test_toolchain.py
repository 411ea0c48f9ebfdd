"""The table of tests/toolchain, entry by entry."""

from __future__ import annotations

import pytest

from toolchain import LIMITS, RAISES, TOOLS

CASES = [
    pytest.param(
        tool,
        id=tool.name,
        marks=[pytest.mark.slow] * tool.slow
        + [pytest.mark.xfail(strict=True, reason=LIMITS.get(tool.name, ""))] * (tool.name in LIMITS),
    )
    for tool in TOOLS
]


@pytest.mark.parametrize("tool", CASES)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # of the tools
def test_tool(tool, tmp_path):
    if tool.name in RAISES:
        with pytest.raises(Exception, match=RAISES[tool.name]):
            tool.check(tmp_path)
    else:
        tool.check(tmp_path)


def test_the_names_are_unique():
    assert len({tool.name for tool in TOOLS}) == len(TOOLS)
