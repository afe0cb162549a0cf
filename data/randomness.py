"""All randomness: generators seeded by name, and noise as a pure function of integers; no global generator."""

import hashlib

import torch
from torch import Tensor

# Multipliers and shifts of splitmix64's finaliser (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def seed_of(*names: object) -> int:
    """A seed in [0, 2^63) that depends on the names alone: equal on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


def generator(*names: object) -> torch.Generator:
    """A CPU generator seeded by its names."""
    return torch.Generator().manual_seed(seed_of(*names))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch's >> keeps the sign


def mix(*keys: Tensor | int) -> Tensor:
    """Mix integers into one well-spread int64; tensors broadcast."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = key + state * _GOLDEN + _GOLDEN
        state = (state ^ _shift_right(state, 30)) * _FIRST
        state = (state ^ _shift_right(state, 27)) * _SECOND
        state = state ^ _shift_right(state, 31)
    return state


def uniform(*keys: Tensor | int) -> Tensor:
    """float32 in [0, 1), one draw for each element of the broadcast keys."""
    return _shift_right(mix(*keys), 40).to(torch.float32) * 2.0**-24
