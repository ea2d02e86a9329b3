"""A target for each reader: valid files, how they are made wrong, and what reads them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers_model import make_tiny_cascade, tiny_stage_config
from helpers_training import micro_config, micro_settings
from PIL import Image

from cascade.settings import override, to_yaml
from fuzzing.mutations import TEXTS, VALUES, Mutation, header_of_tar, parquet, some_bytes, spoil, tree


@dataclass(frozen=True)
class Target:
    """What reads files that anybody may have changed.

    make: writes valid ones into a folder, once. spoil: makes one of them wrong. read: reads them all. cost: of so many
    cases one is tried, for a reader that is slow.
    """

    name: str
    make: Callable[[Path], object]
    spoil: Mutation
    read: Callable[[Path], object]
    cost: int = 1


def one_of(*names: str) -> Mutation:
    """Make one of some files wrong."""
    return lambda rng, folder: spoil(rng, folder / rng.choice(names))


# --- settings ----------------------------------------------------------------------------------------------


def _make_settings(folder: Path) -> None:
    settings = override(
        micro_settings(Path("runs/fuzz")), ["training.validation={sources: [{kind: scenes}], every: 5}"]
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))


def _read_settings(folder: Path) -> None:
    from cascade.storage.training import load_train_config
    from cascade.training.state import is_own_settings

    is_own_settings(folder / "run.yaml")
    load_train_config(folder / "run.yaml")


def _spoil_assignments(rng: Random, folder: Path) -> None:
    keys = (
        "training.steps",
        "data.sources.0.kind",
        "a.b",
        "",
        ".",
        "stage.model.channels.0",
        "x" * 300,
        "data.sources.9",
    )
    values = [json.dumps(value) for value in VALUES] + [text.decode(errors="replace")[:2000] for text in TEXTS]
    assignments = [f"{rng.choice(keys)}{rng.choice('===:')}{rng.choice(values)}" for _ in range(rng.randrange(1, 4))]
    (folder / "assignments.json").write_text(json.dumps(assignments))


def _read_assignments(folder: Path) -> None:
    from cascade.config.training import TrainConfig
    from cascade.settings import override, parse

    assignments = json.loads((folder / "assignments.json").read_text())
    parse(TrainConfig, override(micro_settings(folder), assignments), "run.yaml")


# --- models ------------------------------------------------------------------------------------------------


def _read_model(folder: Path) -> None:
    from cascade.batch.metadata import model_identity
    from cascade.storage.index import read_index
    from cascade.storage.stage import check_reading

    index = read_index(folder / "tiny")
    check_reading(index.reading, index.folders)
    model_identity(index)


def _read_stage(folder: Path) -> None:
    from cascade.storage.stage import load_stage

    load_stage(folder / "tiny" / "base")


def _read_encoder(folder: Path) -> None:
    from cascade.text.t5 import TextEncoder
    from cascade.text.t5_files import TokenCounter

    TokenCounter(folder / "tiny" / "text_encoder").count(["a fox"])
    TextEncoder.from_pretrained(folder / "tiny" / "text_encoder", max_length=8).encode(["a fox"])


def _make_model(folder: Path) -> None:
    make_tiny_cascade(folder / "tiny")


def _read_card(folder: Path) -> None:
    from cascade.server.models import examples_of, front_matter

    examples_of(front_matter(folder / "README.md"))


def _make_card(folder: Path) -> None:
    text = "---\nlicense: mit\nwidget:\n- text: a fox\n- text: a cat\nstyles: [noto]\n---\n# A model\n"
    (folder / "README.md").write_text(text)


def _spoil_card(rng: Random, folder: Path) -> None:
    path = folder / "README.md"
    if rng.random() < 0.5:
        head = json.dumps(tree(rng, {"license": "mit", "widget": [{"text": "a fox"}], "styles": ["noto"]})).encode()
        path.write_bytes(b"---\n" + (head if rng.random() < 0.8 else rng.choice(TEXTS)) + b"\n---\n# A model\n")
    else:
        spoil(rng, path)


# --- pictures ----------------------------------------------------------------------------------------------


def _entry() -> dict[str, Any]:
    recipe = {"prompt": "a fox", "negative_prompt": "", "seed": 3, "number": 0}
    sampling = tiny_stage_config("base", 8).sampling.model_dump(mode="json")
    settings = {
        "height": 8,
        "width": 8,
        "batch_size": 1,
        "device": "cpu",
        "dtype": "float32",
        "stages": {"base": sampling},
    }
    origin = {"num_images": 1, "index": 0, "model": "tiny", "license": "CC0-1.0", "cascade": "0.1.0"}
    return {"id": "000000", **recipe, "run_seed": 3, **origin, "settings": settings}


def _make_pictures(folder: Path) -> None:
    from cascade.batch.metadata import FORMATS, encode
    from cascade.pictures.format import RGB
    from cascade.pictures.images import from_pil

    for format, ending in FORMATS.items():
        red = from_pil(Image.new("RGB", (8, 8), "red"))
        (folder / f"a.{ending}").write_bytes(encode(red, RGB, _entry(), format)[0])
    frames = [Image.new("RGBA", (8, 8), (shade, 0, 0, shade)) for shade in (9, 99, 199)]
    for ending in ("gif", "tiff", "webp"):
        frames[0].save(folder / f"moving.{ending}", save_all=True, append_images=frames[1:], duration=40)


def _spoil_picture(rng: Random, folder: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    if rng.random() < 0.5:
        spoil(rng, rng.choice(sorted(folder.iterdir())))
        return
    said = {name: value for name, value in _entry().items() if name not in ("id", "run_seed")}
    said = tree(rng, said)
    chunks, exif = PngInfo(), Image.Exif()
    for name, value in said.items() if isinstance(said, dict) else [("prompt", str(said))]:
        text = value if isinstance(value, str) else json.dumps(value)
        keyword = name.replace("\0", "")[:70].encode("latin-1", "replace").decode("latin-1") or "x"
        chunks.add_itxt(keyword, text.encode(errors="replace").decode())
    Image.new("RGB", (8, 8)).save(folder / "a.png", pnginfo=chunks)
    exif[0x010E] = json.dumps(said)[:60_000]
    Image.new("RGB", (8, 8)).save(folder / "a.jpg", exif=exif.tobytes())


def _read_pictures(folder: Path) -> None:
    from cascade.batch.metadata import read_metadata
    from cascade.drawing.recipe import Recipe
    from cascade.pictures.frames import read_frames
    from cascade.pictures.reading import check_png, read_rgb

    def metadata(path: Path) -> None:
        Recipe.from_json(read_metadata(path)[0], str(path))

    for path in sorted(folder.iterdir()):
        if path.suffix in (".png", ".jpg", ".webp", ".gif", ".tiff"):
            for read in (
                metadata,
                read_frames,
                lambda path: read_rgb(path, str(path)),
                lambda path: check_png(path, "x"),
            ):
                told(read, path)


# --- output folders ----------------------------------------------------------------------------------------


def _make_output(folder: Path) -> None:
    from cascade.batch.output import Output

    out = folder / "out"
    with Output(out) as output:
        output.begin({"versions": "cascade", "model": "tiny", "seed": 3, "dtype": "float32"})
        lines = []
        for index in range(4):
            name = f"{index:06}-a-fox.png"
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (index, 0, 0)).save(content, "PNG")
            (out / name).write_bytes(content.getvalue())
            line = {**_entry(), "index": index, "id": f"{index}", "file": name}
            line |= {"sha256": hashlib.sha256(content.getvalue()).hexdigest(), "seconds": 0.1}
            lines.append(json.dumps(line))
        (out / "manifest.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (out / "gallery.json").write_text('{"stars": ["a"]}')


def _read_output(folder: Path) -> None:
    """A run that goes on, with its reports; then one that begins anew."""
    from cascade.batch.output import Output
    from cascade.batch.reports import write_grid, write_page, write_parquet

    def run(overwrite: bool) -> None:
        with Output(folder / "out", overwrite=overwrite) as output:
            output.begin({"versions": "cascade", "model": "tiny", "seed": 3, "dtype": "float32"})
            output.kept()
            output.write_with("index", ".html", lambda path: write_page(output.manifest.entries(), path, "fuzz"))
            output.write_with("manifest", ".parquet", lambda path: write_parquet(output.manifest.entries(), path))
            output.write_with("grid", ".png", lambda path: write_grid(output.manifest.entries(), output.read, path))
            output.complete()

    told(run, False)
    told(run, True)


def _read_gallery(folder: Path) -> None:
    from cascade.server.gallery import Gallery

    gallery = Gallery(folder / "out")
    try:
        for picture in gallery.page("", False, None, 10)["pictures"]:
            told(gallery.thumbnail, picture["id"])
            gallery.delete(picture["id"])
    finally:
        gallery.close()


# --- prompts -----------------------------------------------------------------------------------------------

_PROMPT = {
    "prompt": "a fox",
    "id": "a",
    "seed": 3,
    "num_images": 2,
    "steps": 2,
    "guidance": 2.0,
    "negative_prompt": "red",
}


def _make_prompts(folder: Path) -> None:
    lines = "".join(json.dumps({**_PROMPT, "id": f"{number}"}) + "\n" for number in range(3))
    (folder / "p.jsonl").write_text(lines)
    (folder / "p.txt").write_text("a fox\na cat\n")
    for ending, separator in ((".csv", ","), (".tsv", "\t")):
        row = separator.join(str(value) for value in _PROMPT.values())
        (folder / f"p{ending}").write_text(separator.join(_PROMPT) + f"\n{row}\n{row}\n")
    (folder / "q.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "captions").mkdir()
    for name in ("a.txt", "b.caption"):
        (folder / "captions" / name).write_text("a fox")
    parquet(Random(0), folder / "p.parquet", ("prompt",))


def _spoil_prompts(rng: Random, folder: Path) -> None:
    if rng.random() < 0.3:
        parquet(rng, folder / "p.parquet", tuple(_PROMPT))
    else:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".parquet"]
        spoil(rng, rng.choice(files))


def _read_prompts(folder: Path) -> None:
    from cascade.prompts.reading import read_prompts
    from cascade.prompts.sources import count_prompts

    for path in sorted(folder.iterdir()):
        told(lambda path: count_prompts(str(path)), path)
        told(lambda path: [str(record) for record in read_prompts(str(path), 3)], path)


# --- data --------------------------------------------------------------------------------------------------


def _records(records: Any) -> None:
    """Read everything, broken ones passed over, as training does."""
    from cascade.data.records import BadRecordError
    from cascade.data.transforms import decode

    for index in range(len(records)):
        with suppress(BadRecordError):
            decode(records[index])
    list(records.captions())


def _make_folder(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(data / f"{name}.png")
    (data / "a.txt").write_text("a fox\na red fox\n")
    rows = [{"file_name": "b.png", "text": "a cat"}, {"file_name": "c.png", "text": ["a dog", "a hound"]}]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "sub").mkdir()
    (data / "sub" / "metadata.csv").write_text("file_name,text\n../a.png,a fox\n")


def _records_of(folder: Path) -> Any:
    from cascade.config.data import FolderSource
    from cascade.data.folder import FolderRecords

    return FolderRecords(FolderSource(path=str(folder / "data"), caption_column="text"))


def _read_folder(folder: Path) -> None:
    _records(_records_of(folder))


def _make_tar(folder: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    for format, name in ((tarfile.USTAR_FORMAT, "a"), (tarfile.PAX_FORMAT, "b"), (tarfile.GNU_FORMAT, "c")):
        with tarfile.open(folder / f"{name}.tar", "w", format=format) as tar:
            for number in range(3):
                stem = f"{'long/' * 30 if format != tarfile.USTAR_FORMAT else ''}{number}"
                for ending, content in (("png", picture.getvalue()), ("json", b'{"text": "a fox"}')):
                    member = tarfile.TarInfo(f"{stem}.{ending}")
                    member.size = len(content)
                    if format == tarfile.PAX_FORMAT:
                        member.pax_headers = {"comment": "é"}
                    tar.addfile(member, io.BytesIO(content))


def _spoil_tar(rng: Random, folder: Path) -> None:
    path = folder / rng.choice(("a.tar", "b.tar", "c.tar"))
    if rng.random() < 0.3 and path.name == "b.tar":
        content = path.read_bytes()
        path.write_bytes(
            content.replace(b"comment=", rng.choice((b"size=-9\n", b"GNU.spar", b"size=9e9", b"\xff\xfe=xxxxx")))
        )
    else:
        (header_of_tar if rng.random() < 0.8 else spoil)(rng, path)


def _read_tars(folder: Path) -> None:
    from cascade.batch.stores import TarStore
    from cascade.data.tars import TarRecords

    def twice(path: Path) -> None:
        for _ in range(2):  # the second time by its index
            _records(TarRecords([str(path)], "json", "text"))

    for name in ("a.tar", "b.tar", "c.tar"):
        told(twice, folder / name)
        told(lambda path: TarStore(folder, folder / "spool", folder, 1).read(f"{path.name}/0.png"), folder / name)


def _make_indexed_tar(folder: Path) -> None:
    _make_tar(folder)
    _read_tars(folder)


def _spoil_index(rng: Random, folder: Path) -> None:
    path = folder / ".cascade-index" / "a.tar.json.safetensors"
    if rng.random() < 0.5:
        spoil(rng, path)
        return
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = rng.choice(sorted(set(tensors) - {"stamp"}))
    values = tensors[name].flatten().clone()
    if len(values) and rng.random() < 0.7:
        values[rng.randrange(len(values))] = rng.choice((-1, 0, 200, 2**62) if values.dtype == torch.int64 else (255,))
        tensors[name] = values.reshape(tensors[name].shape)
    else:
        tensors[name] = rng.choice((values[:1], values.float(), torch.zeros(()), values[:0]))
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def _make_table(folder: Path) -> None:
    parquet(Random(0), folder / "a.parquet", ("image", "caption"))


def _read_table(folder: Path) -> None:
    from cascade.config.data import ParquetSource
    from cascade.data.sources import open_records
    from cascade.files.containers import PICTURE, read_table, rows

    source = ParquetSource(
        kind="parquet", files=(str(folder / "a.parquet"),), image_column="image", caption_column="caption"
    )
    kinds = {"image": PICTURE, "caption": str}
    told(lambda path: list(rows(read_table(path, kinds), path, kinds)), folder / "a.parquet")
    told(lambda _: _records(open_records(source)), folder)


def _make_decoded(folder: Path) -> None:
    from cascade.data.decoded import Making, decoded

    _make_folder(folder)
    decoded(
        _records_of(folder),
        Making(folder / "kept", 8, "crop", 0, {"source": "a"}),
    )


def _spoil_decoded(rng: Random, folder: Path) -> None:
    path = rng.choice([path for path in sorted((folder / "kept").iterdir()) if not path.name.endswith(".lock")])
    (tree_or_spoil if path.suffix == ".json" else _spoil_records)(rng, path)


def tree_or_spoil(rng: Random, path: Path) -> None:
    """As `spoil`."""
    spoil(rng, path)


def _spoil_records(rng: Random, path: Path) -> None:
    if path.suffix != ".records" or rng.random() < 0.3:
        some_bytes(rng, path)
        return
    lines = path.read_text().splitlines()
    lines[rng.randrange(len(lines))] = json.dumps(tree(rng, ["a.png", ["a fox"], None]))
    path.write_text("".join(f"{line}\n" for line in lines))


def _read_decoded(folder: Path) -> None:
    from cascade.data.decoded import DecodedRecords, Making, decoded

    name = Making(folder / "kept", 8, "crop", 0, {"source": "a"}).name
    told(lambda kept: _records(DecodedRecords(kept, name)), folder / "kept")
    records = _records_of(folder)
    told(lambda kept: _records(decoded(records, Making(kept, 8, "crop", 0, {"source": "a"}))), folder / "kept")


# --- text and training -------------------------------------------------------------------------------------


def _make_cache(folder: Path) -> None:
    from cascade.text.cache import EmbeddingCache

    cache = EmbeddingCache(folder / "cache", "words", 4)
    cache.add(["a fox", "a cat"], [torch.ones(2, 4), torch.ones(3, 4)])
    cache.note_settings({"encoder": "bundled"})


def _read_cache(folder: Path) -> None:
    from cascade.text.cache import EmbeddingCache

    cache = EmbeddingCache.open(folder / "cache")
    told(lambda cache: cache.get(["a fox", "a cat"]), cache)
    told(lambda _: EmbeddingCache(folder / "cache", "words", 4).add(["a dog"], [torch.ones(2, 4)]), None)


def _network() -> Any:
    return torch.nn.Linear(3, 2)


def _config(folder: Path) -> Any:
    return micro_config(folder / "run")


def _make_run(folder: Path) -> None:
    from cascade.files.atomic import write_text
    from cascade.training.optim import optimizer_state
    from cascade.training.state import RunState, save_state

    network = _network()
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weights = {name: value.detach() for name, value in network.named_parameters()}
    for step in (1, 2):
        state = RunState(step, weights, weights, optimizer_state(optimizer, network), {"loss": (1.0, 1)})
        save_state(folder / "run", state, _config(folder), keep=2)
    write_text(folder / "run" / "config.yaml", to_yaml(_config(folder)))
    lines = [{"step": step, "loss": 0.5, "learning_rate": 0.1, "gradient_norm": None} for step in range(1, 9)]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _spoil_run(rng: Random, folder: Path) -> None:
    """A checkpoint with its sums made to fit, so that what they guard is read."""
    from cascade.files.tensors import load_tensors, save_tensors

    checkpoint = folder / "run" / "checkpoints" / "step-00000002"
    if rng.random() < 0.2:
        spoil(rng, rng.choice(sorted(checkpoint.iterdir())))
        return
    path = checkpoint / "optimizer.safetensors"
    if rng.random() < 0.3:
        tensors = load_tensors(path)
        name = rng.choice(sorted(tensors))
        value = tensors.pop(name)
        if rng.random() < 0.7:
            tensors[rng.choice((name, "weight", "::", f"{name}::x"))] = rng.choice(
                (value.flatten()[:0], torch.zeros(()), value.int())
            )
        save_tensors(path, tensors)
    meta = json.loads((checkpoint / "state.json").read_text())
    sums = meta.pop("sha256")
    meta = tree(rng, meta) if rng.random() < 0.7 else meta
    if isinstance(meta, dict):
        sums = {
            name: hashlib.sha256((checkpoint / f"{name}.safetensors").read_bytes()).hexdigest()
            for name in sums
            if name != "state"
        }
        sums["state"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        meta["sha256"] = sums
    (checkpoint / "state.json").write_text(json.dumps(meta))


def _read_run(folder: Path) -> None:
    from cascade.files.tensors import load_weights
    from cascade.training.log import Meter
    from cascade.training.optim import load_optimizer_state
    from cascade.training.state import load_newest

    state = load_newest(folder / "run", _config(folder))
    network = _network()
    load_weights(network, state.network, folder)
    optimizer = torch.optim.AdamW(network.parameters())
    load_optimizer_state(optimizer, network, state.optimizer)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    Meter(state.meter).means()


def _read_log(folder: Path) -> None:
    from cascade.training.log import RunLog
    from cascade.training.watch import Watch, panels, read_curves, thinned

    def curves(path: Path) -> None:
        found = read_curves(path)
        for name in panels([found]):
            thinned(found[name])

    told(curves, folder / "run" / "log.jsonl")
    log = RunLog(folder / "run" / "log.jsonl", 8)
    log.write(9, {"loss": 0.5})
    Watch().new_warnings(log.entries)


def told(read: Callable[[Any], object], what: Any) -> None:
    """Read one of several; an error that is told ends this one alone."""
    from cascade.errors import CascadeError

    try:
        read(what)
    except CascadeError:
        pass
    except OSError as error:
        if error.filename is None:
            raise


TARGETS: Iterable[Target] = (
    Target("settings", _make_settings, one_of("run.yaml"), _read_settings, cost=4),
    Target("assignments", _make_settings, _spoil_assignments, _read_assignments),
    Target(
        "model",
        _make_model,
        one_of("tiny/cascade.json", "tiny/base/stage.json", "tiny/sr16/stage.json"),
        _read_model,
        cost=4,
    ),
    Target("stage", _make_model, one_of("tiny/base/stage.json", "tiny/base/model.safetensors"), _read_stage, cost=10),
    Target(
        "encoder",
        _make_model,
        one_of(
            *(
                f"tiny/text_encoder/{name}"
                for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
            )
        ),
        _read_encoder,
        cost=10,
    ),
    Target("card", _make_card, _spoil_card, _read_card),
    Target("pictures", _make_pictures, _spoil_picture, _read_pictures, cost=4),
    Target(
        "output",
        _make_output,
        one_of("out/manifest.jsonl", "out/manifest.jsonl", "out/run.json", "out/.cascade/made", "out/000001-a-fox.png"),
        _read_output,
        cost=10,
    ),
    Target(
        "gallery",
        _make_output,
        one_of("out/manifest.jsonl", "out/gallery.json", "out/000001-a-fox.png"),
        _read_gallery,
        cost=10,
    ),
    Target("prompts", _make_prompts, _spoil_prompts, _read_prompts, cost=4),
    Target(
        "folder",
        _make_folder,
        one_of("data/metadata.jsonl", "data/sub/metadata.csv", "data/a.txt", "data/a.png"),
        _read_folder,
    ),
    Target("tar", _make_tar, _spoil_tar, _read_tars, cost=2),
    Target("tar-index", _make_indexed_tar, _spoil_index, _read_tars, cost=2),
    Target(
        "parquet",
        _make_table,
        lambda rng, folder: parquet(rng, folder / "a.parquet", ("image", "caption")),
        _read_table,
        cost=20,
    ),
    Target("decoded", _make_decoded, _spoil_decoded, _read_decoded, cost=4),
    Target(
        "text-cache", _make_cache, one_of("cache/index.json", "cache/shard-0-00000.safetensors"), _read_cache, cost=2
    ),
    Target("checkpoint", _make_run, _spoil_run, _read_run, cost=2),
    Target("log", _make_run, one_of("run/log.jsonl"), _read_log),
)
