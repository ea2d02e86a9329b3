"""Refused requests: other sites, other names, too large, too slow, without a key; and no input is reflected."""

from __future__ import annotations

import io
import socket
import struct
import time
import zlib
from pathlib import Path

import pytest
from helpers_server import Live, live
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cascade import CascadePipeline
from cascade.cli.program import main
from cascade.server import app as server_run
from cascade.server.guard import HEADERS, Rules


def connected(server: Live) -> socket.socket:
    """A connection without a client in between."""
    return socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=20)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_name_that_is_not_ours_is_refused_as_dns_rebinding_would_use_it(server: Live, host: str) -> None:
    assert server.client.get("/api/pictures", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:80"])
def test_all_names_of_loopback_are_ours(server: Live, host: str) -> None:
    assert server.client.get("/api/pictures", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_posts_of_other_sites_draw_nothing(server: Live, headers: dict[str, str]) -> None:
    answer = server.client.post("/api/jobs", json={"prompt": "a fox"}, headers=headers)
    assert answer.status_code == 403
    assert server.queue.jobs() == []


def test_a_form_of_another_site_draws_nothing_even_without_an_origin(server: Live) -> None:
    answer = server.client.post("/api/jobs", data={"prompt": "a fox"})
    assert answer.status_code == 422
    text = server.client.post("/api/jobs", content='{"prompt": "a fox"}', headers={"content-type": "text/plain"})
    assert text.status_code == 422
    assert server.queue.jobs() == []


def test_a_link_to_the_page_works_and_its_own_requests_do(server: Live) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert server.client.get("/", headers=link).status_code == 200
    own = {"origin": server.address, "sec-fetch-site": "same-origin"}
    assert server.client.post("/api/jobs", json={"prompt": "a fox"}, headers=own).status_code == 202


def test_every_answer_carries_a_strict_policy(server: Live) -> None:
    for path in ("/", "/api/pictures", "/nothing", "/page/style.css"):
        headers = server.client.get(path).headers
        assert {name: headers.get(name) for name in HEADERS} == HEADERS
    assert "unsafe" not in HEADERS["content-security-policy"]
    assert "access-control-allow-origin" not in server.client.get("/api/pictures").headers


def test_with_a_key_only_who_has_it_is_let_in(pipeline: CascadePipeline, tmp_path: Path) -> None:
    with live(lambda: pipeline, tmp_path, rules=Rules(key="a secret")) as server:
        assert server.client.get("/api/pictures").status_code == 401
        assert server.client.get("/").status_code == 401
        assert server.client.get("/?key=wrong").status_code == 401
        assert server.client.get("/health").status_code == 200
        bearer = {"authorization": "Bearer a secret"}
        assert server.client.get("/api/pictures", headers=bearer).status_code == 200
        login = server.client.get("/?key=a%20secret")
        assert (login.status_code, login.headers["location"]) == (303, "/")
        assert "HttpOnly" in login.headers["set-cookie"]
        assert "SameSite=Strict" in login.headers["set-cookie"]
        cookies = {"cookie": login.headers["set-cookie"].partition(";")[0]}
        assert server.client.get("/api/pictures", headers=cookies).status_code == 200


def test_an_address_for_others_needs_a_key_or_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CASCADE_API_KEY", raising=False)
    assert main(["serve", "--host", "0.0.0.0", "--out", str(tmp_path)]) == 2
    assert "CASCADE_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path",
    [
        "/page/../api.py",
        "/page/%2e%2e/api.py",
        "/page/..%2fapi.py",
        "//etc/passwd",
        "/api/pictures/..%2f..%2fmanifest-studio.jsonl/file",
        "/api/pictures/%2e%2e/file",
        "/page/style.css%00",
    ],
)
def test_no_path_of_a_request_reaches_the_disk(server: Live, path: str) -> None:
    server.draw("a fox", until=8)
    with connected(server) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = raw.makefile("rb").read()
    assert answer.split(b" ", 2)[1] in (b"404", b"422")


def test_a_request_that_is_too_long_is_refused_whether_it_says_so_or_not(
    pipeline: CascadePipeline, tmp_path: Path
) -> None:
    with live(lambda: pipeline, tmp_path, rules=Rules(body=1000)) as server:
        assert server.client.post("/api/jobs", content=b"x" * 1001).status_code == 413
        chunks = (b"x" * 600 for _ in range(4))  # no content-length
        answer = server.client.post("/api/jobs", content=chunks, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert server.client.post("/api/jobs", json={"prompt": "a fox"}).status_code == 202


def test_a_body_that_does_not_come_is_not_waited_for(pipeline: CascadePipeline, tmp_path: Path) -> None:
    with live(lambda: pipeline, tmp_path, rules=Rules(seconds=0.3)) as server, connected(server) as raw:
        head = b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(head + b"Content-Length: 50\r\n\r\n{")
        assert raw.recv(100).split(b" ", 2)[1] == b"408"


def test_a_head_that_comes_drop_by_drop_is_hung_up_on(
    pipeline: CascadePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_run, "HEAD_SECONDS", 0.5)
    with live(lambda: pipeline, tmp_path) as server:
        with connected(server) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
            start = time.monotonic()
            try:
                while raw.recv(100):
                    pass
            except ConnectionError:
                pass
            assert time.monotonic() - start < 15
        assert server.client.get("/health").status_code == 200


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8000, 8000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_would_fill_the_memory_is_refused_by_its_head(server: Live, size: tuple[int, int]) -> None:
    answer = server.client.post("/api/read", files={"picture": ("x.png", bomb(*size))})
    assert (answer.status_code, answer.json()["error"]) == (400, "the picture has more than 33,554,432 pixels")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GIF89a",
        b"<svg/>",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0" * 13),
        b"\xff\xd8\xff",
    ],
)
def test_a_file_that_is_no_picture_is_refused_and_not_reflected(server: Live, content: bytes) -> None:
    name = "<script>alert(1)</script>.png"
    answer = server.client.post("/api/read", files={"picture": (name, content)})
    assert answer.status_code == 400
    assert "script" not in answer.text


def test_metadata_that_is_a_trap_is_refused(server: Live) -> None:
    for text in ("[" * 100_000, "9" * 5000, '{"stages": 3}'):
        info = PngInfo()
        for name in ("prompt", "settings", "seed", "number", "num_images", "index", "negative_prompt"):
            info.add_itxt(name, text, zip=True)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
        answer = server.client.post("/api/read", files={"picture": ("x.png", buffer.getvalue())})
        assert answer.status_code == 400, text[:10]


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"prompt": "a"', b"\xff\xfe", b'{"prompt": "a", "steps": 1e999}'])
def test_a_malformed_body_is_the_callers_mistake(server: Live, body: bytes) -> None:
    answer = server.client.post("/api/jobs", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500


@pytest.mark.parametrize(
    "body", [b"", b"--x", b'--x\r\nContent-Disposition: form-data; name="picture"\r\n\r\n', b"--x\r\n" * 5000]
)
def test_a_malformed_form_is_the_callers_mistake(server: Live, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = server.client.post("/api/read", content=body, headers=headers)
    assert 400 <= answer.status_code < 500


def test_no_page_of_documentation_loads_anything_from_elsewhere(server: Live) -> None:
    assert server.client.get("/docs").status_code == 404
    assert server.client.get("/redoc").status_code == 404
    assert server.client.get("/openapi.json").json()["info"]["title"] == "cascade"


def test_a_second_host_in_a_request_is_refused(server: Live) -> None:
    with connected(server) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert raw.makefile("rb").read().split(b" ", 2)[1] == b"400"
