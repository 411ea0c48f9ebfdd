"""The ways to get a wrong number without an error, each with its guard, and the proof that the guard is what helps.

Every hazard is a check that passes on the library as it is. ``without`` takes the guard out: the check must then fail.
"""

from __future__ import annotations

import pytest

from cropvote import swapping
from hazards import HAZARDS


@pytest.mark.parametrize("case", HAZARDS, ids=lambda case: case.name)
def test_it_is_right_or_it_raises(case):
    case.check()


@pytest.mark.parametrize("case", HAZARDS, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo reads
def test_without_its_guard_the_check_fails(case, monkeypatch):
    """Else the check would prove nothing."""
    case.without(monkeypatch)
    swapping._classes.clear()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        case.check()
    swapping._classes.clear()
