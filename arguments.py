"""One check of arguments: errors name the argument, its value and what is allowed."""

import math
import numbers

COUNT = "a positive integer"
NATURAL = "an integer >= 0"
RATE = "a finite number >= 0"
POSITIVE = "a finite number above 0"
BELOW_ONE = "a number from 0 to below 1"
FRACTION = "a number from 0 to 1"
PERCENTAGE = "a percentage from 0 to 100"

_FULFILS = {COUNT: lambda x: isinstance(x, numbers.Integral) and x >= 1,
            NATURAL: lambda x: isinstance(x, numbers.Integral) and x >= 0,
            RATE: lambda x: 0 <= x < math.inf,
            POSITIVE: lambda x: 0 < x < math.inf,
            BELOW_ONE: lambda x: 0 <= x < 1,
            FRACTION: lambda x: 0 <= x <= 1,
            PERCENTAGE: lambda x: 0 <= x <= 100}


def check(allowed, **arguments):
    """Raise ValueError for the first of the arguments, by name, that is not `allowed`.

    allowed: one of the constants above, or a tuple of the values that are allowed.
    """
    for name, value in arguments.items():
        if isinstance(allowed, tuple):
            if not any(type(value) is type(choice) and value == choice for choice in allowed):
                *others, last = map(repr, allowed)
                raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")
        elif (isinstance(value, bool) or not isinstance(value, numbers.Real)
              or not _FULFILS[allowed](value)):
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
