"""The gallery is a batch folder, into which the command line and the page draw at the same time."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from helpers_server import Live, live
from PIL import Image

from cascade import CascadePipeline
from cascade.batch.metadata import read_metadata
from cascade.cli.program import main
from cascade.errors import CascadeError
from cascade.server.gallery import Gallery
from cascade.text.language import Styles


def generate(model: Path, out: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(model), "--out", str(out), "--device", "cpu", "--quiet", *arguments])


def prompts(server: Live, **query: str | int) -> list[str]:
    return [picture["prompt"] for picture in server.client.get("/api/pictures", params=query).json()["pictures"]]


def test_gallery_and_command_line_see_each_others_pictures(server: Live, model: Path) -> None:
    out = server.gallery.folder
    server.draw("a fox of the page", seed=1)
    assert generate(model, out, "an owl", "a box", "--seed", "2") == 0
    server.draw("a second fox", seed=1)
    assert sorted(prompts(server)) == ["a box", "a fox of the page", "a second fox", "an owl"]
    assert generate(model, out, "an owl", "a box", "a new one", "--seed", "2") == 0  # continues
    assert prompts(server)[0] == "a new one"
    server.draw("a third fox", seed=1)
    assert len(prompts(server)) == 6


def test_pictures_in_tars_are_shown_and_not_deleted(server: Live, model: Path) -> None:
    assert generate(model, server.gallery.folder, "an owl", "--format", "webdataset") == 0
    (picture,) = server.client.get("/api/pictures").json()["pictures"]
    assert Image.open(io.BytesIO(server.client.get(f"/api/pictures/{picture['id']}/file").content)).size == (32, 32)
    assert not picture["deletable"]
    refused = server.client.delete(f"/api/pictures/{picture['id']}")
    assert (refused.status_code, "tar" in refused.json()["error"]) == (400, True)


def test_a_picture_of_the_page_is_drawn_again_to_the_same_bytes_by_the_command_line(
    server: Live, model: Path, tmp_path: Path
) -> None:
    id = server.draw("a fox", seed=9, guidance=3.0)["pictures"]["0"]["id"]
    name, content = server.gallery.read(id)
    (tmp_path / name).write_bytes(content)
    again = tmp_path / "again"
    assert main(["generate", "--from-image", str(tmp_path / name), "--model", str(model), "--out", str(again)]) == 0
    assert (again / name).read_bytes() == content


def test_a_picture_that_was_damaged_is_named(server: Live) -> None:
    picture = server.draw("a fox", seed=1)["pictures"]["0"]
    (path,) = server.gallery.folder.rglob(picture["name"])
    path.write_bytes(path.read_bytes()[:60])
    answer = server.client.get(f"/api/pictures/{picture['id']}/thumbnail")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{picture['name']}: not a readable picture")


def test_a_new_server_finds_pictures_and_stars_and_goes_on_numbering(pipeline: CascadePipeline, tmp_path: Path) -> None:
    with live(lambda: pipeline, tmp_path) as server:
        first = server.draw("a fox", seed=1)["pictures"]["0"]
        assert server.client.put(f"/api/pictures/{first['id']}/star", json={"starred": True}).json()["starred"]
    with live(lambda: pipeline, tmp_path) as server:
        second = server.draw("a fox", seed=1)["pictures"]["0"]
        assert first["name"] != second["name"]
        (starred,) = server.client.get("/api/pictures", params={"starred": True}).json()["pictures"]
        assert starred["id"] == first["id"]
        server.client.put(f"/api/pictures/{first['id']}/star", json={"starred": False})
        assert server.client.get("/api/pictures", params={"starred": True}).json()["total"] == 0


def test_search_finds_all_words_in_any_order_and_seeds(server: Live) -> None:
    for prompt, seed in (("a red fox", 11), ("a blue fox", 12), ("100 % _red_ box", 13)):
        server.draw(prompt, seed=seed, until=8)
    assert prompts(server, search="FOX red") == ["a red fox"]
    assert prompts(server, search="fox") == ["a blue fox", "a red fox"]
    assert prompts(server, search="12") == ["a blue fox"]
    assert prompts(server, search="%") == ["100 % _red_ box"]
    assert prompts(server, search="green") == []


def test_pages_follow_each_other_without_a_gap_also_when_pictures_are_added(server: Live) -> None:
    for seed in range(5):
        server.draw(f"fox {seed}", seed=seed, until=8)
    first = server.client.get("/api/pictures", params={"limit": 2}).json()
    server.draw("a newer one", seed=9, until=8)
    assert [picture["prompt"] for picture in first["pictures"]] == ["fox 4", "fox 3"]
    last = first["pictures"][-1]["id"]
    assert prompts(server, before=last, limit=10) == ["fox 2", "fox 1", "fox 0"]


def test_a_deleted_picture_comes_back_until_the_server_ends_and_is_gone_for_good_after_it(
    pipeline: CascadePipeline, tmp_path: Path
) -> None:
    with live(lambda: pipeline, tmp_path) as server:
        id = server.draw("a fox", seed=1)["pictures"]["0"]["id"]
        kept = server.draw("an owl", seed=1)["pictures"]["0"]["id"]
        content = server.gallery.read(id)[1]
        assert server.client.delete(f"/api/pictures/{id}").status_code == 204
        assert prompts(server) == ["an owl"]
        assert server.client.get(f"/api/pictures/{id}/file").status_code == 404
        assert server.client.post(f"/api/pictures/{id}/restore").status_code == 200
        assert server.gallery.read(id)[1] == content
        server.client.delete(f"/api/pictures/{id}")
    with live(lambda: pipeline, tmp_path) as server:
        (left,) = server.client.get("/api/pictures").json()["pictures"]
        assert left["id"] == kept
    assert len((tmp_path / "manifest-studio.jsonl").read_text().splitlines()) == 1
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_the_job_of_a_picture_draws_it_again(server: Live) -> None:
    asked = {"prompt": "a fox", "seed": 2**63 - 1, "negative_prompt": "red", "steps": {"base": 3}, "until": 16}
    first = server.draw(**asked, threshold={"sr16": "clip"}, width=32, height=16)["pictures"]["0"]
    said = server.client.get(f"/api/pictures/{first['id']}/asked").json()
    assert said["seed"] == str(2**63 - 1)
    assert said["steps"] == {"base": 3}
    again = server.client.post("/api/jobs", json=said).json()
    second = server.over(again["id"])["pictures"]["0"]
    one, other = (server.gallery.read(picture["id"])[1] for picture in (first, second))
    assert Image.open(io.BytesIO(one)).tobytes() == Image.open(io.BytesIO(other)).tobytes()


def test_the_job_of_a_picture_without_the_default_style_leaves_it_out_again(model: Path, tmp_path: Path) -> None:
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    pipeline.styles = Styles(("fox style",), "fox style")
    with live(lambda: pipeline, tmp_path) as server:
        for style, prompt in ((None, "a box, fox style"), ("none", "a box"), ("owl style", "a box, owl style")):
            own = {} if style is None else {"default_style": style}
            first = server.draw("a box", seed=1, until=8, **own)["pictures"]["0"]
            assert server.client.get(f"/api/pictures/{first['id']}").json()["prompt"] == prompt
            said = server.client.get(f"/api/pictures/{first['id']}/asked").json()
            again = server.over(server.client.post("/api/jobs", json=said).json()["id"])["pictures"]["0"]
            assert server.client.get(f"/api/pictures/{again['id']}").json()["prompt"] == prompt


def test_a_dropped_picture_gives_its_settings_and_a_foreign_one_a_reason(server: Live) -> None:
    id = server.draw("a fox", seed=7, guidance={"base": 5.0})["pictures"]["0"]["id"]
    name, content = server.gallery.read(id)
    said = server.client.post("/api/read", files={"picture": (name, content)}).json()
    assert (said["prompt"], said["seed"], said["guidance"]) == ("a fox", "7", {"base": 5.0})
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    foreign = server.client.post("/api/read", files={"picture": ("x.png", buffer.getvalue())})
    assert (foreign.status_code, "does not record how it was drawn" in foreign.json()["error"]) == (400, True)
    assert foreign.json()["code"] == "no_recipe"  # the page starts from such a picture


def test_a_download_says_in_itself_how_it_was_drawn(server: Live, tmp_path: Path) -> None:
    id = server.draw("ein Fuchs, grün", seed=7)["pictures"]["0"]["id"]
    answer = server.client.get(f"/api/pictures/{id}/file", params={"download": True})
    assert answer.headers["content-disposition"] == 'attachment; filename="000000-ein-fuchs-grun.png"'
    (tmp_path / "x.png").write_bytes(answer.content)
    assert read_metadata(tmp_path / "x.png")[0]["prompt"] == "ein Fuchs, grün"
    thumbnail = Image.open(io.BytesIO(server.client.get(f"/api/pictures/{id}/thumbnail").content))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (32, 32))


def test_a_manifest_cannot_name_files_outside_of_its_folder(server: Live, tmp_path: Path) -> None:
    server.draw("a fox", seed=1)
    (tmp_path / "secret.png").write_bytes(b"secret")
    out = server.gallery.folder
    line = json.loads((out / "manifest-studio.jsonl").read_text())
    for number, file in enumerate(("../secret.png", str(tmp_path / "secret.png"), "x.tar/../../secret.png")):
        with (out / "manifest-00001-of-00002.jsonl").open("a") as manifest:
            manifest.write(json.dumps({**line, "file": file, "index": number}) + "\n")
    assert len(prompts(server)) == 1


def test_a_damaged_or_half_written_line_hides_no_other(server: Live) -> None:
    server.draw("a fox", seed=1)
    out = server.gallery.folder
    line = (out / "manifest-studio.jsonl").read_text()
    (out / "manifest-00001-of-00002.jsonl").write_text('not json\n{"file": 3}\n[]\n' + line[:-20])
    assert prompts(server) == ["a fox"]


def test_two_galleries_do_not_share_a_folder(server: Live) -> None:
    with pytest.raises(CascadeError, match="another run writes into this folder"):
        Gallery(server.gallery.folder)


def test_a_sampler_with_settings_of_its_own_comes_back_whole(server: Live) -> None:
    section = {"kind": "ddim", "eta": 0.5}
    first = server.draw("a fox", seed=1, until=8, sampler={"base": section})["pictures"]["0"]
    said = server.client.get(f"/api/pictures/{first['id']}/asked").json()
    assert said["sampler"] == {"base": section}
    second = server.over(server.client.post("/api/jobs", json=said).json()["id"])["pictures"]["0"]
    one, other = (server.gallery.read(picture["id"])[1] for picture in (first, second))
    assert Image.open(io.BytesIO(one)).tobytes() == Image.open(io.BytesIO(other)).tobytes()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of POSIX")
def test_a_pipe_in_the_place_of_a_manifest_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.jsonl")
    gallery = Gallery(tmp_path)
    try:
        assert gallery.page("", False, None, 10)["pictures"] == []
    finally:
        gallery.close()
