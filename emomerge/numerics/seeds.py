"""Seeds that are functions of names and numbers alone: the same on every machine and for every hash seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def key_of(*parts: object) -> bytes:
    """Eight bytes that depend on the parts alone (BLAKE2b of their texts, joined by slashes)."""
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()


def seed_of(*parts: object) -> int:
    """A 63-bit seed made of names and numbers."""
    return int.from_bytes(key_of(*parts), "little") >> 1


def generator_of(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on the device, seeded by `seed_of(*parts)`."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


def seed_default_generators(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for one device; on the CPU it skips all others, which would cost a third of a millisecond."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Within the block the CPU's default generator starts from `seed`; afterwards its state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
