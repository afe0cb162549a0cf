"""Numbers on a command line, for argparse's type."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def number(kind: type[Number], least: Number) -> Callable[[str], Number]:
    """Reads an int or a float, finite and at least so large, or says which word is not that."""

    def read(text: str) -> Number:
        try:
            value = kind(text)
            if least <= value < math.inf:
                return value
        except ValueError:
            pass
        name = "whole number" if kind is int else "number"
        raise ArgumentTypeError(f"must be a {name} of at least {least}; got {text}")

    return read
