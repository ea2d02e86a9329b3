"""Many requests of mixed kinds, some of whose callers vanish: every answer is right, and nothing is left over."""

from __future__ import annotations

import base64
import gc
import hashlib
import io
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers_server import Live, live
from PIL import Image

from cascade import CascadePipeline

SEEDS = 4
CALLERS = 8


def source() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


class Callers:
    """Ask for what is known beforehand, and compare."""

    def __init__(self, server: Live, pipeline: CascadePipeline) -> None:
        self._server = server
        self._image = server.client.post("/api/uploads", files={"picture": ("x.png", source())}).json()["name"]
        picture = Image.open(io.BytesIO(source()))
        self._drawn = [_hash(pipeline("a fox", seed=seed, until=8).images[0]) for seed in range(SEEDS)]
        self._changed = [
            _hash(pipeline("a fox", seed=seed, until=8, image=picture, strength=0.5).images[0]) for seed in range(SEEDS)
        ]

    def call(self, number: int) -> str:
        """One request; what was wrong with it."""
        kind, seed = (
            random.Random(number).choice(("openai", "job", "change", "list", "wrong", "vanish")),
            number % SEEDS,
        )
        wrong = getattr(self, f"_{kind}")(seed)
        return f"{kind} {number}: {wrong}" if wrong else ""

    def _openai(self, seed: int) -> str:
        answer = self._server.client.post(
            "/v1/images/generations", json={"prompt": "a fox", "size": "8x8", "seed": seed}
        )
        content = base64.b64decode(answer.json()["data"][0]["b64_json"])
        return "" if _hash(Image.open(io.BytesIO(content))) == self._drawn[seed] else "another picture"

    def _job(self, seed: int, **change: Any) -> str:
        job = self._server.draw("a fox", seed=seed, until=8, **change)
        (picture,) = job["pictures"].values()
        content = self._server.client.get(f"/api/pictures/{picture['id']}/file").content
        expected = (self._changed if change else self._drawn)[seed]
        return "" if _hash(Image.open(io.BytesIO(content))) == expected else "another picture"

    def _change(self, seed: int) -> str:
        return self._job(seed, image=self._image, strength=0.5)

    def _list(self, _: int) -> str:
        return "" if self._server.client.get("/api/pictures?limit=5").status_code == 200 else "no list"

    def _wrong(self, seed: int) -> str:
        answers = [
            self._server.client.post("/api/jobs", json={"prompt": "a fox", "until": 7, "seed": seed}),
            self._server.client.post("/api/uploads", files={"picture": ("x", b"nothing")}),
        ]
        return "" if [answer.status_code for answer in answers] == [400, 400] else "not refused"

    def _vanish(self, seed: int) -> str:
        """Asks for several pictures, or follows the news, and hangs up."""
        with socket.create_connection(("127.0.0.1", int(self._server.address.rpartition(":")[2])), timeout=20) as own:
            if seed % 2:
                own.sendall(b"GET /api/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
                own.recv(100)
            else:
                body = json.dumps({"prompt": "a fox that nobody waits for", "n": 3, "size": "32x32"}).encode()
                head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
                own.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\n" + head + body)
        return ""


def _hash(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def settled(server: Live) -> None:
    """Wait until nothing is drawn, nobody watches and nothing waits."""
    for _ in range(600):
        jobs_over = all(job.over for job in server.queue.jobs())
        if jobs_over and not server.queue.hub.watched and not len(server.queue.line):
            return
        time.sleep(0.1)
    raise AssertionError([(job.state, job.asked.prompt) for job in server.queue.jobs() if not job.over])


def open_files() -> int:
    return psutil.Process().num_fds() if hasattr(os, "fork") else psutil.Process().num_handles()


def endure(server: Live, pipeline: CascadePipeline, requests: int) -> None:
    callers = Callers(server, pipeline)
    with ThreadPoolExecutor(CALLERS) as pool:
        warm = [*pool.map(callers.call, range(40))]
        settled(server)
        gc.collect()
        before = psutil.Process().memory_info().rss, open_files(), threading.active_count()
        wrong = [*warm, *pool.map(callers.call, range(40, requests))]
        settled(server)
        gc.collect()
        after = psutil.Process().memory_info().rss, open_files(), threading.active_count()
    assert [text for text in wrong if text] == []
    assert after[0] - before[0] < (32 << 20) + requests * 16_000  # a kept picture costs no memory, its table row little
    assert after[1] - before[1] <= 4
    assert after[2] - before[2] <= 2 * CALLERS  # the pool of threads grows to as many as ran at the same time
    assert len(server.queue.jobs()) <= 100 + CALLERS  # those over, and those that were under way
    assert all(job.plan.edit is None for job in server.queue.jobs())
    temporary = server.gallery.state / "temporary-studio"
    assert list(temporary.iterdir()) == []
    assert len(list((server.gallery.state / "sources").iterdir())) == 1
    drawn = server.client.get("/metrics").text
    assert "cascade_pictures_failed_total 0\n" in drawn
    assert "cascade_pictures_waiting 0\n" in drawn


def test_a_hundred_requests_leave_nothing_behind_and_every_answer_is_right(
    pipeline: CascadePipeline, tmp_path: Path
) -> None:
    with live(lambda: pipeline, tmp_path) as server:
        endure(server, pipeline, 100)


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind_and_every_answer_is_right(
    pipeline: CascadePipeline, tmp_path: Path
) -> None:
    with live(lambda: pipeline, tmp_path) as server:
        endure(server, pipeline, 1000)
