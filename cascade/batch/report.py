"""What is made of a manifest: manifest.parquet, and a page that shows pictures beside their prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

T = TypeVar("T")
_ROWS = 1000  # in memory at a time


def write_parquet(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """A manifest as a table; settings and stages as JSON, because their columns would differ from model to model."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        **dict.fromkeys(("index", "seed", "run_seed", "number", "num_images"), pa.int64()),
        **dict.fromkeys(("id", "prompt", "negative_prompt", "model", "license", "cascade"), pa.string()),
        **dict.fromkeys(("settings", "file", "stages", "sha256"), pa.string()),
        "seconds": pa.float64(),
    }
    schema = pa.schema(list(columns.items()))
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in _groups(entries, _ROWS):
            plain = [{name: _cell(row.get(name)) for name in columns} for row in rows]
            writer.write_table(pa.Table.from_pylist(plain, schema))


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def write_page(entries: Iterable[Mapping[str, Any]], path: Path, title: str) -> None:
    """One HTML file without anything from elsewhere: pictures beside prompts, searchable, loaded as they are seen."""
    head, tail = _PAGE.replace("TITLE", _escaped(title)).split("PICTURES")
    with path.open("w", encoding="utf-8") as file:
        file.write(head)
        for number, entry in enumerate(entries):
            size, seed = entry["settings"], str(entry["seed"])  # as text: JavaScript would round it
            picture = [quote(entry["file"]), entry["prompt"], entry["id"], seed, size["width"], size["height"]]
            # `</script>` in a prompt must not end the script.
            file.write((",\n" if number else "") + json.dumps(picture, ensure_ascii=False).replace("<", "\\u003c"))
        file.write(tail)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TITLE</title>
<style>
  body { font: 14px/1.4 system-ui, sans-serif; margin: 0; background: #fff; color: #222 }
  header { position: sticky; top: 0; z-index: 1; background: #fff; padding: 12px 16px; border-bottom: 1px solid #ddd;
           display: flex; gap: 16px; align-items: baseline }
  h1 { font-size: 16px; margin: 0 }
  input { flex: 1; max-width: 40em; font: inherit; padding: 6px 10px; border: 1px solid #999; border-radius: 6px }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 16px; padding: 16px }
  figure { margin: 0; content-visibility: auto; contain-intrinsic-size: auto 300px }
  figure[hidden] { display: none }
  img { width: 100%; height: auto; background: #eee; border-radius: 4px; display: block }
  figcaption { margin-top: 4px; overflow-wrap: anywhere; max-height: 8.4em; overflow-y: auto; unicode-bidi: plaintext }
  small { color: #777; display: block; unicode-bidi: isolate }
  @media (prefers-color-scheme: dark) {
    body, header { background: #181818; color: #ddd } header { border-color: #444 }
    input { background: #222; color: #ddd } img { background: #333 }
  }
</style>
<header><h1>TITLE</h1><input type="search" placeholder="Search prompts, ids, seeds" autofocus><span></span></header>
<main></main>
<script>
const pictures = [
PICTURES
];
const main = document.querySelector("main"), count = document.querySelector("span");
const figures = pictures.map(([file, prompt, id, seed, width, height]) => {
  const figure = document.createElement("figure"), link = document.createElement("a");
  const image = document.createElement("img"), caption = document.createElement("figcaption");
  const more = document.createElement("small");
  Object.assign(image, { loading: "lazy", decoding: "async", width, height, alt: prompt, src: file });
  link.href = file;
  link.append(image);
  caption.textContent = prompt;
  more.textContent = `${id} · seed ${seed}`;
  figure.append(link, caption, more);
  return figure;
});
main.append(...figures);
const texts = pictures.map(([, prompt, id, seed]) => `${prompt} ${id} ${seed}`.toLowerCase());
function search(words) {
  let shown = 0;
  texts.forEach((text, index) => {
    const found = words.every(word => text.includes(word));
    figures[index].hidden = !found;
    shown += found;
  });
  count.textContent = `${shown} of ${texts.length}`;
}
const input = document.querySelector("input");
input.addEventListener("input", () => {
  search(input.value.toLowerCase().split(/\\s+/).filter(Boolean));
  history.replaceState(null, "", input.value ? "#" + encodeURIComponent(input.value) : location.pathname);
});
input.value = decodeURIComponent(location.hash.slice(1));
search(input.value.toLowerCase().split(/\\s+/).filter(Boolean));
</script>
</html>
"""
