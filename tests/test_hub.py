"""Models on the hub: the real client with a server on this machine, and a cache in the client's layout."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_if import make_if
from helpers_model import make_tiny_cascade
from huggingface_hub import constants

from cascade import CascadePipeline
from cascade.errors import CascadeError
from cascade.storage.convert import convert
from cascade.storage.index import download
from cascade.storage.saving import Card
from cascade.storage.stage import load_stage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own

REPO = "DeepFloyd/IF-I-M-v1.0"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that a download needs."""

    folder: Path
    gated = False
    fetched: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        files = [str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        if self.path.startswith("/api/models/"):
            if "/tree/" in self.path:
                described: Any = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in files]
            else:
                described = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.send(json.dumps(described).encode(), True)
        if self.gated:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        name = self.path.partition(f"/resolve/{COMMIT}/")[2]
        if name not in files:
            return self.send_error(404)
        if body:
            self.fetched.append(name)
        return self.send((self.folder / name).read_bytes(), body)

    def do_POST(self) -> None:
        """A repository is made, and files are committed to it: lines of JSON, each file in base64."""
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            asked = [file["path"] for file in json.loads(sent)["files"]]
            answer: Any = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    path = self.folder / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            answer = {"commitOid": COMMIT, "commitUrl": f"{constants.ENDPOINT}/{REPO}/commit/{COMMIT}"}
        else:
            answer = {"url": f"{constants.ENDPOINT}/{REPO}", "errors": [], "warnings": []}
        return self.send(json.dumps(answer).encode(), True)

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class Own(Hub):
        folder = tmp_path / "repository"
        fetched: list[str] = []  # noqa: RUF012 - of this class alone

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Own
    server.shutdown()
    thread.join()
    server.server_close()


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)  # equal files would be fetched once


WEIGHTS = "unet/diffusion_pytorch_model"


def test_only_what_is_read_is_fetched_and_weights_once(hub: type[Hub]) -> None:
    wanted = [
        "README.md",
        "model_index.json",
        "text_encoder/model.safetensors",
        "tokenizer/spiece.model",
        f"{WEIGHTS}.safetensors",
    ]
    others = [
        f"{WEIGHTS}.bin",
        f"{WEIGHTS}.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "IF-I-M-v1.0.ckpt",
    ]
    fill(hub.folder, wanted + others)
    folder = download(REPO)
    assert sorted(hub.fetched) == wanted
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == wanted


def test_a_second_stage_comes_without_its_text_encoder(hub: type[Hub]) -> None:
    fill(hub.folder, ["model_index.json", "text_encoder/model.safetensors", f"{WEIGHTS}.safetensors"])
    download(REPO, text=False)
    assert sorted(hub.fetched) == ["model_index.json", f"{WEIGHTS}.safetensors"]


def test_half_precision_is_fetched_where_there_is_nothing_else(hub: type[Hub]) -> None:
    fill(hub.folder, ["model_index.json", f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.fp16.bin"])
    download(REPO)
    assert sorted(hub.fetched) == ["model_index.json", f"{WEIGHTS}.fp16.safetensors"]


def test_a_gated_repository_is_named_with_the_page_of_its_licence(hub: type[Hub]) -> None:
    fill(hub.folder, ["model_index.json"])
    hub.gated = True
    with pytest.raises(CascadeError, match=f"accept a licence first; do so at {constants.ENDPOINT}/{REPO}, then log"):
        CascadePipeline.from_pretrained(REPO)


def in_cache(folder: Path, cache: Path, repo: str) -> None:
    """Lay a folder into the client's cache as if it had been downloaded."""
    cached = cache / f"models--{repo.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, cached / "snapshots" / COMMIT)


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "100KB"}, {"variant": "fp16"}], ids=["", "sharded", "fp16"])
def test_hub_ids_in_the_cache_draw_what_their_folders_draw_without_a_network(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ids = {False: REPO, True: "DeepFloyd/IF-II-M-v1.0"}
    folders = {}
    for enlarges, repo in ids.items():
        folders[enlarges] = tmp_path / f"if-{enlarges}"
        make_if(folders[enlarges], enlarges, **how)
        in_cache(folders[enlarges], own_cache, repo)
    pipelines = (
        CascadePipeline.from_pretrained(ids[False], super_resolution=[ids[True]]),
        CascadePipeline.from_pretrained(folders[False], super_resolution=[folders[True]]),
    )
    pictures = [pipeline("a red apple", seed=1, steps=1, output_type="pt").images for pipeline in pipelines]
    assert torch.equal(*pictures)


def test_a_second_stage_of_the_hub_converts_to_a_stage_folder(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    make_if(tmp_path / "if", True)
    in_cache(tmp_path / "if", own_cache, "DeepFloyd/IF-II-M-v1.0")
    assert convert("DeepFloyd/IF-II-M-v1.0", tmp_path / "sr") == ["sr32"]
    assert load_stage(tmp_path / "sr").config.low_resolution == 8


def test_a_model_pushed_to_the_hub_comes_back_with_its_card_and_draws_the_same_picture(
    tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    pipeline = CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path / "model"))
    pipeline.push_to_hub(REPO, card=Card([("Data", "none")]))
    card = (hub.folder / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    assert "## Data" in card
    again = CascadePipeline.from_pretrained(REPO)
    assert "README.md" in hub.fetched
    drawn = [one("a red apple", seed=1, output_type="pt").images for one in (pipeline, again)]
    assert torch.equal(*drawn)
