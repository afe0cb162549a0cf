"""Functions of many small kernels, compiled into few where launches cost more than arithmetic: on a GPU."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

SHAPES = 256  # that a function is compiled for; the compiler's own limit of 8 is passed in silence, and slow
Given = ParamSpec("Given")
Result = TypeVar("Result")


def compiled_on_gpu(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """function as it is on the CPU; compiled, once for each shape, if its first argument is a tensor on a GPU."""

    @cache
    def compiled() -> Callable[Given, Result]:
        return torch.compile(function, dynamic=False)  # which imports the compiler, for seconds

    @wraps(function)
    def chosen(*args: Given.args, **options: Given.kwargs) -> Result:
        if not (isinstance(args[0], Tensor) and args[0].is_cuda):
            return function(*args, **options)
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            return compiled()(*args, **options)

    return chosen
