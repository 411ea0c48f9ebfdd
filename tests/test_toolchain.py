"""The table of tests/toolchain, entry by entry."""

from __future__ import annotations

import functools

import pytest

from toolchain import LIMITS, RAISES, TOOLS
from toolchain.table import TWO

CASES = [
    pytest.param(
        functools.partial(tool.check, split=split) if split else tool.check,
        tool.name,
        id=f"{tool.name}, {split.name}" if split else tool.name,
        marks=[pytest.mark.slow] * (tool.slow or split is TWO)
        + [pytest.mark.xfail(strict=True, reason=LIMITS.get(tool.name, ""))] * (tool.name in LIMITS),
    )
    for tool in TOOLS
    for split in tool.splits or (None,)
]


@pytest.mark.parametrize(("check", "name"), CASES)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # of the tools
def test_tool(check, name, tmp_path):
    if name in RAISES:
        with pytest.raises(Exception, match=RAISES[name]):
            check(tmp_path)
    else:
        check(tmp_path)


def test_the_names_are_unique():
    assert len({tool.name for tool in TOOLS}) == len(TOOLS)
