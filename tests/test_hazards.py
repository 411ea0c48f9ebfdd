"""The known ways to a silent wrong number, each with its guard, and the proof that the guard is what prevents it.

Every hazard's check passes with the library as it is. ``without`` disables the guard, and then the check must fail.
"""

from __future__ import annotations

import pytest

from cropvote import swapping
from hazards import HAZARDS


@pytest.mark.parametrize("case", HAZARDS, ids=lambda case: case.name)
def test_it_is_right_or_it_raises(case):
    case.check()


@pytest.mark.parametrize("case", HAZARDS, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # read by dynamo
def test_without_its_guard_the_check_fails(case, monkeypatch):
    """Otherwise the check would prove nothing."""
    case.without(monkeypatch)
    swapping._classes.clear()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        case.check()
    swapping._classes.clear()
