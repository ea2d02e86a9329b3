"""The HTTP server: latency and throughput by number of callers, and processor time over the bare engine's.

    python scripts/bench_serve.py [--model MODEL] [--until 256] [--pictures 24] [--callers 1,8,64]

Every caller asks for one picture after the other over HTTP (OpenAI's API, the file in the answer) from a process of its
own. Before and after each number of callers the same pictures are drawn by the engine alone and thrown away. Latency
and pictures a second are wall time, which other programs change; the overhead compares processor time of this process
(drawing, encoding, writing, HTTP) with the engine's.
"""

from __future__ import annotations

import base64
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click
from measure import load_average

from cascade import CascadePipeline
from cascade.server.app import Server, listening, make_app
from cascade.server.gallery import Gallery
from cascade.server.guard import Rules
from cascade.server.models import Models
from cascade.server.queue import Queue

PROMPT = "a red fox, noto style"


@contextmanager
def serving(pipeline: CascadePipeline, folder: Path) -> Iterator[str]:
    """A server over a model that is loaded; its address."""
    gallery = Gallery(folder)
    queue = Queue(lambda: pipeline, gallery)
    started = threading.Event()
    with listening("127.0.0.1", 0) as own:
        app = make_app(queue, Rules(), Models(lambda _: pipeline), page=False)
        server = Server(app, queue, started.set)
        thread = threading.Thread(target=server.run, args=([own],))
        queue.start()
        thread.start()
        started.wait(30)
        try:
            yield f"http://127.0.0.1:{own.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            queue.close()
            gallery.close()


def ask(address: str, size: int, seed: int) -> float:
    """One picture over HTTP; seconds until it is there."""
    body = {"prompt": PROMPT, "size": f"{size}x{size}", "seed": seed, "response_format": "b64_json"}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/images/generations", json.dumps(body).encode(), headers)
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=3600) as answer:
        content = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    assert content.startswith(b"\x89PNG"), "the server answers with a picture"
    return time.perf_counter() - start


def call(address: str, size: int, pictures: int, callers: int) -> list[float]:
    """The latency of each picture."""
    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(lambda seed: ask(address, size, seed), range(pictures)))


def bare(pipeline: CascadePipeline, size: int, pictures: int) -> float:
    """Processor seconds of a picture that the engine draws, in full batches as the server's."""
    start = time.process_time()
    pipeline(PROMPT, seed=0, until=size, num_images_per_prompt=pictures, batch_size=pipeline.default_batch_size)
    return (time.process_time() - start) / pictures


@click.command()
@click.option("--model", help="A folder or hub id; default: the bundled cascade.")
@click.option("--until", default=256, show_default=True, help="Size of the pictures: that of a stage.")
@click.option("--pictures", default=24, show_default=True, help="For each number of callers.")
@click.option("--callers", default="1,8,64", show_default=True)
@click.option("--device", help="Default: the GPU if there is one.")
@click.option("--client", hidden=True, help="Address of the server: be the callers' process.")
def main(model: str | None, until: int, pictures: int, callers: str, device: str | None, client: str | None) -> None:
    """Print a table."""
    numbers = [int(number) for number in callers.split(",")]
    if client is not None:
        print(json.dumps(call(client, until, pictures, numbers[0])))
        return
    pipeline = CascadePipeline.from_pretrained(model, device=device)
    bare(pipeline, until, 1)
    print(f"load {load_average():.1f}; {pipeline.name} on {pipeline.device}, {until} px, {pictures} pictures each\n")
    print("| callers | latency, median | 95 % | pictures/s | processor s/picture | engine alone | overhead |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder, serving(pipeline, Path(folder)) as address:
        ask(address, until, 0)
        for number in numbers:
            before = bare(pipeline, until, pictures)
            start, own = time.perf_counter(), time.process_time()
            command = [sys.executable, __file__, "--client", address, "--until", str(until)]
            command += ["--pictures", str(pictures), "--callers", str(number)]
            latencies = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            wall, used = time.perf_counter() - start, (time.process_time() - own) / pictures
            alone = (before + bare(pipeline, until, pictures)) / 2
            late = statistics.quantiles(latencies, n=20)[-1] if len(latencies) > 1 else latencies[0]
            print(
                f"| {number} | {statistics.median(latencies):.2f} s | {late:.2f} s | {pictures / wall:.2f}"
                f" | {used:.3f} | {alone:.3f} | {used / alone - 1:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
