"""Colour profiles of ICC version 2, written from its specification: a matrix and gammas, or one gray curve."""

from __future__ import annotations

import struct

ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""Its primaries, adapted to D50, as Adobe's own profile has them."""
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
_D50 = (0.9642, 1.0, 0.8249)


def rgb_profile(primaries: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """A display's: three primaries in XYZ, one gamma."""
    tags = {f"{name}XYZ": _xyz(primary) for name, primary in zip("rgb", primaries, strict=True)}
    return _profile(b"RGB ", tags | {f"{name}TRC": _gamma(gamma) for name in "rgb"})


def gray_profile(gamma: float) -> bytes:
    """One curve."""
    return _profile(b"GRAY", {"kTRC": _gamma(gamma)})


def _profile(space: bytes, own: dict[str, bytes]) -> bytes:
    tags = {"desc": _described("a test"), "cprt": b"text\0\0\0\0none\0", "wtpt": _xyz(_D50), **own}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02100000, b"mntr", space, b"XYZ ", b"acsp")
    head += b"".join(map(_fixed, _D50)) + b"\0" * 48
    return head + struct.pack(">I", len(tags)) + table + body


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _described(text: str) -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text.encode() + b"\0" * 79
