"""Types of settings with their ranges, for the signatures of what settings build: `width: Size = 384`.

pydantic reads the bounds where settings are validated (config/unions.py). To torch and to a caller each type is a plain
int or float. An upper bound is far above what any network needs: it refuses slips of the keyboard, which would
otherwise fill the memory.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Images = Annotated[int, Ge(1), Le(10**15)]
"""Number of training images."""
Size = Annotated[int, Ge(1), Le(65_536)]
"""Width, side or number of parts."""
SizeOrZero = Annotated[int, Ge(0), Le(65_536)]
"""A size of which 0 has a meaning of its own."""
Depth = Annotated[int, Ge(1), Le(256)]
"""Number of layers or steps, one after the other."""
DepthOrZero = Annotated[int, Ge(0), Le(256)]
Steps = Annotated[int, Ge(1), Le(10_000)]
"""Number of noise levels."""
DiscreteSteps = Annotated[int, Ge(2), Le(100_000)]
"""Number of steps of a process in discrete time."""
Share = Annotated[float, Ge(0), Le(1)]
Epsilon = Annotated[float, Ge(1e-12), Le(1)]
"""Small number that keeps a divisor above 0."""
Tap = Annotated[int, Ge(-1_000), Le(1_000)]
"""Weight of a pixel in a filter."""
DropRate = Annotated[float, Ge(0), Lt(1)]
"""Probability with which values are dropped."""
Factor = Annotated[float, Gt(0), Le(1_000)]
"""What a width or a value is multiplied by."""
Positive = Annotated[float, Gt(0), Le(1e6)]
NonNegative = Annotated[float, Ge(0), Le(1e6)]
Exponent = Annotated[float, Ge(0.1), Le(100)]
LogSNR = Annotated[float, Ge(-60), Le(60)]
"""Natural logarithm of alpha²/sigma², or of anything that is compared with it."""
