"""The source of all randomness: named generators, so that nothing depends on order, batch or device."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**63 - 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key` alone, such as (seed, picture, stage, purpose).

    SHA-256 of the key's text, so that neighbouring keys give unrelated numbers, the same on every machine; Python's
    own `hash` changes from run to run.
    """
    import torch  # late: the command line uses seeds before it needs torch

    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def derive_seed(*key: int | str) -> int:
    """A seed in [0, 2**63) for `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") & MAX_SEED


def fresh_seed() -> int:
    """A new seed from the operating system, small enough to type again: [0, 2**32)."""
    return secrets.randbelow(2**32)
