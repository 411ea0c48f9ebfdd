"""Hypothesis strategies: geometries (as plain numbers, so the oracle does not need Views) and logits."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from cropvote import Views
from oracle import Position, Scale

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
thorough = settings(quick, max_examples=300)

sides = st.integers(1, 64)
scales = st.fractions(min_value=Fraction(1, 50), max_value=1, max_denominator=50)
scale_pairs = scales | st.tuples(scales, scales)
positions = st.fractions(min_value=0, max_value=1, max_denominator=12)
position_lists = st.lists(st.tuples(positions, positions), min_size=1, max_size=5, unique=True)


@dataclass(frozen=True)
class Spec:
    """The arguments of a Views."""

    positions: list[Position]
    scale: Scale
    mirror: bool

    def views(self) -> Views:
        return Views(self.positions, scale=self.scale, mirror=self.mirror)


specs = st.builds(Spec, position_lists, scale_pairs, st.booleans())


@st.composite
def maps(draw: st.DrawFn, dtype: torch.dtype = torch.int64, min_side: int = 1, max_side: int = 24) -> Tensor:
    """Draw an NCHW map whose values all differ (if the dtype allows; bool is irregular)."""
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 3)), *(draw(st.integers(min_side, max_side)) for _ in "hw")]
    count = shape[0] * shape[1] * shape[2] * shape[3]
    values = torch.arange(count) % 2039
    if dtype == torch.bool:
        values = values * 0.618 % 1 < 0.5
    return values.to(dtype).reshape(shape)


@st.composite
def logits(draw: st.DrawFn, minus_infinity: bool = False) -> Tensor:
    """Draw float64 logits (N, V, K), multiples of 1/4 (many ties between views and classes, none in a view)."""
    count, views, classes = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(2, 5))
    finite = st.integers(-40, 40).map(lambda quarter: quarter / 4)
    row = st.lists(finite, min_size=classes, max_size=classes, unique=True)
    rows = draw(st.lists(row, min_size=count * views, max_size=count * views))
    if minus_infinity:  # never for the first class, so at least one class is possible
        masks = st.lists(st.booleans(), min_size=classes - 1, max_size=classes - 1)
        for values in rows:
            for k, masked in enumerate(draw(masks), start=1):
                values[k] = float("-inf") if masked else values[k]
    return torch.tensor(rows, dtype=torch.float64).reshape(count, views, classes)
