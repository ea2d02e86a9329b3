"""Valid files made wrong, with their structure in mind: one value of a JSON tree, one field of a tar header."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    2**64,
    10**30,
    -(10**12),
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    "a",
    "0",
    "1e999",
    "NaN",
    "a\0b",
    "\x1b[2J\x1b]0;owned\x07",
    "\ud800",
    "../../outside/canary",
    "/etc/passwd",
    "x" * 300,
    "x" * 10_000,
    "\u202e\u2028",
    [],
    {},
    [[]],
    [None, 1, "a"],
    {"a": {"b": None}},
    {"": 0},
)
"""What stands in a value's place: other types, ends of ranges, text that steers terminals or leads elsewhere."""
TEXTS: tuple[bytes, ...] = (
    b"",
    b"\0" * 64,
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 10_000,
    b'{"a": 1e999}',
    b'{"a": NaN}',
    b'{"a": 1, "a": 2}',
    b'"\\ud800"',
    b"\xef\xbb\xbf{}",
    b"- " * 20_000,
    b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c, *%c, *%c]\n" % (n, n, *[n - 1] * 4) for n in range(98, 123)),
    b"a: &a {k: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b, *c]}\n",
    b"output: !!timestamp never\n",
    b"output: !!bool maybe\n",
    b"output: !!python/object/apply:os.system [echo]\n",
    b"output: &a [*a]\n",
    b"? [a]\n: 1\n",
    b"a: 0x" + b"f" * 5000,
    b"a: " + b"1" * 200_000 + b"x",
)
"""Whole contents that broke a reader once, or are known to break others."""
Mutation = Callable[[Random, Path], None]


def spoil(rng: Random, path: Path) -> None:
    """Make a file wrong by its kind, its bytes, or what stands in its place."""
    kinds = {".json": tree_of_json, ".jsonl": line_of_json, ".yaml": tree_of_yaml, ".tar": header_of_tar}
    own = kinds.get(path.suffix) or (header_of_safetensors if path.suffix == ".safetensors" else None)
    if own is not None and rng.random() < 0.7:
        own(rng, path)
    elif rng.random() < 0.8:
        some_bytes(rng, path)
    else:
        other_kind(rng, path)


def tree(rng: Random, value: Any) -> Any:
    """A JSON value with one to three of its parts changed, removed, added or renamed."""
    holder = {"": json.loads(json.dumps(value))}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(holder))
        inside, key = rng.choice(places)
        what = rng.randrange(6)
        if what == 0 and inside is not holder:
            del inside[key]
        elif what == 1 and isinstance(inside, dict) and inside is not holder:
            inside[rng.choice(("", "a\0", "format", "kind", "x" * 300, "\x1b[2J"))] = inside.pop(key)
        elif what == 2 and isinstance(inside[key], dict):
            inside[key]["another"] = _value(rng)
        elif what == 3 and isinstance(inside[key], list):
            inside[key].extend([_value(rng)] * rng.choice((1, 2, 1000)))
        else:
            inside[key] = _value(rng)
    return holder[""]


def _value(rng: Random) -> Any:
    """One of `VALUES`, a copy, for what is put into a tree may be changed there."""
    return copy.deepcopy(rng.choice(VALUES))


def _places(value: Any) -> Any:
    """(container, key) of each part of a tree."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def tree_of_json(rng: Random, path: Path) -> None:
    """One value of a JSON file."""
    if rng.random() < 0.1:
        path.write_bytes(rng.choice(TEXTS))
        return
    text = json.dumps(tree(rng, json.loads(path.read_bytes())))
    if rng.random() < 0.1:
        text = text.replace("1", rng.choice(("1e999", "NaN", "-Infinity", "1" * 5000)), 1)
    path.write_text(text)


def line_of_json(rng: Random, path: Path) -> None:
    """One line of a file of JSON lines."""
    lines = path.read_bytes().splitlines()
    place = rng.randrange(len(lines))
    if rng.random() < 0.2:
        lines[place] = rng.choice(TEXTS).replace(b"\n", b" ")
    else:
        lines[place] = json.dumps(tree(rng, json.loads(lines[place]))).encode()
    path.write_bytes(b"\n".join([*lines, rng.choice((b"", b"{", lines[0]))]))


def tree_of_yaml(rng: Random, path: Path) -> None:
    """One value of a YAML file."""
    if rng.random() < 0.1:
        path.write_bytes(rng.choice(TEXTS))
        return
    data = tree(rng, yaml.safe_load(path.read_bytes()))
    path.write_bytes(yaml.safe_dump(data, allow_unicode=True).encode(errors="surrogatepass"))


def header_of_safetensors(rng: Random, path: Path) -> None:
    """One value of the JSON that begins a safetensors file, its length made to fit or not."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(tree(rng, json.loads(content[8 : 8 + length]))).encode()
    told = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, len(header) + 1))
    path.write_bytes(struct.pack("<Q", told) + header + content[8 + length :])


_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
}
_FIELDS |= {"magic": (257, 8), "prefix": (345, 155), "sparse": (386, 96), "real size": (483, 12)}
_CONTENTS = (
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"77777777777\0",
    b"-0000000001\0",
    b"\0" * 12,
    b"00000000001\0",
    b"\xff\xfe\x1b[2J",
)


def header_of_tar(rng: Random, path: Path) -> None:
    """A field of a tar's header, its checksum made to fit."""
    content = bytearray(path.read_bytes())
    heads = [place for place in range(0, len(content), 512) if content[place + 257 : place + 262] == b"ustar"]
    for _ in range(rng.choice((1, 2, 4))):
        head = rng.choice(heads)
        start, length = _FIELDS[rng.choice(sorted(_FIELDS))]
        value = bytes([rng.choice(b"012345678xgSLKDV")]) if length == 1 else rng.choice(_CONTENTS)
        content[head + start : head + start + length] = value[:length].ljust(length, b"\0")
        content[head + 148 : head + 156] = b" " * 8
        content[head + 148 : head + 156] = b"%06o\0 " % sum(content[head : head + 512])
    path.write_bytes(content)


def some_bytes(rng: Random, path: Path) -> None:
    """Bytes changed, cut off, put in, or twice."""
    content = bytearray(path.read_bytes() if path.is_file() else b"")
    place = rng.randrange(len(content) + 1)
    match rng.randrange(6):
        case 0:
            for _ in range(rng.choice((1, 4, 32))):
                if content:
                    content[rng.randrange(len(content))] = rng.randrange(256)
        case 1:
            del content[place:]
        case 2:
            content[place:place] = rng.choice((*TEXTS[:3], b"\xff" * 8, b"\n", b"\r", b'"', b"\x1b]0;\x07"))
        case 3:
            content[place : place + 64] = bytes(64)
        case 4:
            content += content[place:]
        case 5:
            content = bytearray(rng.choice(TEXTS))
    path.write_bytes(content)


def other_kind(rng: Random, path: Path) -> None:
    """A folder, pipe, link or nothing in the file's place."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match rng.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("nowhere")
        case 4:
            path.symlink_to(path.parent)
        case 5:
            pass


def parquet(rng: Random, path: Path, columns: tuple[str, ...]) -> None:
    """A table whose columns have types that nobody expects there, dates beyond Python's among them."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    large = 2**62
    arrays = (
        pa.array([large], pa.timestamp("us")),
        pa.array([-(2**40)], pa.timestamp("s", tz="UTC")),
        pa.array([2**31 - 1], pa.date32()),
        pa.array([large], pa.duration("s")),
        pa.array([b"\xff\xfe"], pa.binary()),
        pa.array([None], pa.string()),
        pa.array([None], pa.null()),
        pa.array([float("nan")], pa.float64()),
        pa.array([2**64 - 1], pa.uint64()),
        pa.array([[["a"]]], pa.list_(pa.list_(pa.string()))),
        pa.array([{"bytes": None, "path": "../x"}]),
        pa.array([{"bytes": b"no picture", "path": None}]),
        pa.array(["a fox"]),
        pa.array([3]),
    )
    names = rng.sample(columns, rng.randrange(1, len(columns) + 1))
    if rng.random() < 0.2:
        names += rng.choice((["\0"], [""], ["another"], ["\x1b[2J"]))
    table = pa.table([rng.choice(arrays) for _ in names], names=names)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    path.write_bytes(buffer.getvalue())
    if rng.random() < 0.3:
        some_bytes(rng, path)
