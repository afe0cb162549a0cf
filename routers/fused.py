"""Functions of many small kernels, compiled into few where launches cost more than arithmetic: on a GPU."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Result = TypeVar("Result")


def fused_on_gpu(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """function as it is on the CPU; compiled, once for each shape, if its first argument is a tensor on a GPU."""

    @cache
    def compiled() -> Callable[Given, Result]:
        return torch.compile(function, dynamic=False)  # which imports the compiler, for seconds

    @wraps(function)
    def chosen(*args: Given.args, **options: Given.kwargs) -> Result:
        on_gpu = isinstance(args[0], Tensor) and args[0].is_cuda
        return (compiled() if on_gpu else function)(*args, **options)

    return chosen
