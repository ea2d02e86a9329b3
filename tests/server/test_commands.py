"""`cascade studio` and `cascade serve` as processes: they start, contact no other host, and end without loss."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

# Any connection or look-up of a name beyond this machine ends the process with a status of its own.
WATCHED = """
import os, sys
def refuse(event, arguments):
    if event == "socket.connect" and not str(arguments[1][0]).startswith(("127.", "::1", "/")): os._exit(99)
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "127.0.0.1", "localhost", "::1"): os._exit(99)
sys.addaudithook(refuse)
from cascade.cli.program import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A command that is up, and a client of it; ended by SIGTERM if it still runs."""
    command = [sys.executable, "-c", WATCHED, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        match = re.search(r"http://\S+", line)
        assert match, line + (process.stderr.read() if process.stderr else "")
        with httpx.Client(base_url=match[0].partition("?")[0], timeout=60) as client:
            yield process, client
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_bundled_cascade_draws_from_the_page_without_other_hosts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running("studio", "--no-browser", "--port", "0", "--out", str(out)) as (process, client):
        assert "cascade studio" in client.get("/").text
        card = client.get("/api/model").json()
        assert "noto style" in card["styles"]
        assert any("red apple" in example for example in card["examples"])
        asked = {"prompt": "a red apple", "until": 64, "steps": 2}
        id = client.post("/api/jobs", json=asked).json()["id"]
        with client.stream("GET", "/api/events") as news:
            for line in news.iter_lines():
                if '"state": "done"' in line and id in line:
                    break
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    named = [path.name for path in out.rglob("*.png")]  # with the model's default style
    assert named == ["000000-a-red-apple-fluent-3d-style.png"]


@pytest.mark.slow
def test_the_api_alone_has_no_page_and_a_signal_loses_no_job(model: Path, tmp_path: Path) -> None:
    arguments = ("serve", "--port", "0", "--model", str(model), "--out", str(tmp_path), "--device", "cpu")
    with running(*arguments) as (process, client):
        assert client.get("/").status_code == 404
        client.get("/api/model")
        asked = {"prompt": "a fox", "num_images_per_prompt": 64, "steps": 20}
        assert client.post("/api/jobs", json=asked).status_code == 202
        process.terminate()
        assert process.wait(30) == 0
    (left,) = json.loads((tmp_path / ".cascade" / "queue.json").read_text())
    assert left["asked"]["prompt"] == "a fox"
    manifest = (tmp_path / "manifest-studio.jsonl").read_text().splitlines()
    drawn = {json.loads(line)["number"] for line in manifest}
    assert drawn | set(left["missing"]) == set(range(64))
    assert not drawn & set(left["missing"])


@pytest.mark.slow
def test_a_port_in_use_is_an_error_for_the_api_and_skipped_by_the_page(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        common = ("--port", str(port), "--model", str(model), "--out", str(tmp_path))
        command = [sys.executable, "-m", "cascade", "serve", *common]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert "name another --port" in refused.stderr
        with running("studio", "--no-browser", *common) as (_, client):
            assert client.base_url.port != port
            assert client.get("/health").status_code == 200


BLOCKED = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastapi", "starlette", "uvicorn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
sys.meta_path.insert(0, Missing())
from cascade.cli.program import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["studio", "serve"])
def test_a_missing_extra_is_one_line_with_the_way_out(command: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", BLOCKED, command, "--out", str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'cascade-diffusion[studio]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_importing_cascade_and_its_command_line_loads_nothing_of_the_extra() -> None:
    code = "import sys, cascade, cascade.cli.program; print(*{'fastapi', 'starlette', 'uvicorn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_the_container_of_the_documents_runs_a_command_that_there_is_and_no_open_door() -> None:
    """Docker itself is not asked: the command line is parsed, and without a key it is refused."""
    root = Path(__file__).parent.parent.parent / "docs" / "docker"
    lines = (root / "Dockerfile").read_text().splitlines()
    (command,) = [json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD [")]
    found = subprocess.run(
        [sys.executable, "-m", "cascade", *command],
        env={**os.environ, "CASCADE_API_KEY": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert "set CASCADE_API_KEY" in found.stderr
    services = yaml.safe_load((root / "compose.yaml").read_text())["services"]
    assert {name: service["profiles"] for name, service in services.items()} == {"cpu": ["cpu"], "gpu": ["gpu"]}
    for build in (service["build"] for service in services.values()):
        assert (root / build["context"] / build["dockerfile"]).is_file()
