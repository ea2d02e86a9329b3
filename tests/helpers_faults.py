"""Commands whose n-th call about a file fails: a server preloads faults.c, and forks for each of them.

Imports are paid once, and a command sees the error where a dying or full disk would give it: in the C library, below
Python, safetensors and SQLite.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

COMPILER = shutil.which("cc") if sys.platform == "linux" else None
"""None: there is none, and what needs it is left out."""
ERRORS = (errno.EIO, errno.ENOSPC)


@dataclass(frozen=True)
class Fault:
    """Calls `first` to `last` (counted from 1) that concern files below `folder` fail with `error`; 0: none does."""

    folder: str
    first: int = 0
    last: int = 0
    error: int = errno.EIO


@dataclass(frozen=True)
class Ended:
    """How a command ended. status: -N for signal N. calls: that concerned the folder. failed: the last that did."""

    status: int
    stdout: str
    stderr: str
    calls: int
    failed: str

    def __str__(self) -> str:
        return f"{self.failed}: status {self.status}\n{self.stdout}{self.stderr}"


class Server:
    """Runs command lines of `cascade`, one after another."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def warm(self, arguments: Sequence[object]) -> None:
        """Run a command in the server itself, which from then on has in memory what such a command loads."""
        assert self._asked({"arguments": [str(argument) for argument in arguments]}).status == 0

    def run(self, arguments: Sequence[object], fault: Fault) -> Ended:
        """Run a command to its end."""
        return self._asked({"arguments": [str(argument) for argument in arguments], "fault": asdict(fault)})

    def _asked(self, request: dict[str, Any]) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of faults died"
        return Ended(**json.loads(answer))


@contextmanager
def fault_server(folder: Path) -> Iterator[Server]:
    """A server, whose own files are in `folder`."""
    assert COMPILER is not None
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-w", "-o", library, source, "-ldl"], check=True)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(library), str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    try:
        yield Server(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


# --- in the server -----------------------------------------------------------------------------------------


def _serve(library: ctypes.CDLL, folder: Path) -> None:
    _import_all()
    for line in sys.stdin:
        request = json.loads(line)
        if "fault" not in request:
            status = _warm(request["arguments"])
            print(json.dumps(asdict(Ended(status, "", "", 0, ""))), flush=True)
            continue
        for name in ("stdout", "stderr", "told"):
            (folder / name).write_text("")
        child = os.fork()
        if child == 0:
            _run(library, folder, request["arguments"], request["fault"])
        _, status = os.waitpid(child, 0)
        told = (folder / "told").read_text()
        calls, failed = json.loads(told) if told else (0, "")
        read = {name: (folder / name).read_text() for name in ("stdout", "stderr")}
        answer = Ended(os.waitstatus_to_exitcode(status), **read, calls=calls, failed=failed)
        print(json.dumps(asdict(answer)), flush=True)


def _warm(arguments: list[str]) -> int:
    from cascade.cli.program import main

    with redirect_stdout(io.StringIO()):
        return main(arguments)


def _import_all() -> None:
    """What commands import when they run, and a text encoder without T5 for training."""
    import torch
    import transformers.models.t5  # noqa: F401
    from helpers_training import WordEncoder, fill

    import cascade.batch.request
    import cascade.cli.program
    import cascade.text.t5
    import cascade.training.trainer  # noqa: F401
    from cascade.storage import training as loading

    torch.set_num_threads(1)
    build = loading.build_stage

    def filled(*arguments: Any, **more: Any) -> Any:
        stage = build(*arguments, **more)
        fill(stage.network)
        return stage

    loading.load_text_encoder = lambda _settings: WordEncoder()  # type: ignore[assignment,return-value]
    loading.build_stage = filled


def _run(library: ctypes.CDLL, folder: Path, arguments: list[str], fault: dict[str, Any]) -> None:
    """The command, in the forked process, which it ends."""
    status = 70
    try:
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            status = _status(library, arguments, fault)
            told = json.dumps([library.faults_seen(), library.faults_failed().decode()])
            library.faults_arm(b"", 0, 0, 0)
            (folder / "told").write_text(told)
    finally:
        _flush(sys.stdout)
        _flush(sys.stderr)
        os._exit(status)


def _status(library: ctypes.CDLL, arguments: list[str], fault: dict[str, Any]) -> int:
    from cascade.cli.program import main

    library.faults_arm(os.fsencode(fault["folder"]), fault["first"], fault["last"], fault["error"])
    try:
        return main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70
    finally:
        _flush(sys.stdout)
        _flush(sys.stderr)


def _flush(stream: TextIO) -> None:
    with suppress(OSError):
        stream.flush()


if __name__ == "__main__":
    preloaded = ctypes.CDLL(sys.argv[1])
    preloaded.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_int]
    preloaded.faults_failed.restype = ctypes.c_char_p
    preloaded.faults_seen.restype = ctypes.c_long
    _serve(preloaded, Path(sys.argv[2]))
