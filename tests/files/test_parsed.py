"""JSON in cascade's own files is read as untrusted input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from cascade.conditions.settings import VectorCondition
from cascade.conditions.values import checked
from cascade.errors import CascadeError
from cascade.files.atomic import read_json
from cascade.files.text import content_of, parse_json
from cascade.settings import override, parse_yaml, read_yaml
from cascade.training.log import RunLog

SPOILT = {
    "NaN": "NaN is not a JSON number",
    "[-Infinity]": "-Infinity is not a JSON number",
    '{"a": 1e999}': "'1e999' is larger than the largest number",
    '{"a": 1, "b": 2, "a": 3}': "'a' occurs twice; keep one",
    "[" * 100_000: "brackets are nested too deep",
    "[" * 101 + "]" * 101: "brackets are nested too deep",
    "9" * 5000: "digits",
    '{"a": 1': "delimiter",
    "": "Expecting value",
}


@pytest.mark.parametrize(("text", "reason"), SPOILT.items(), ids=lambda text: text[:12])
def test_whatever_is_wrong_is_one_kind_of_error_with_the_reason(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CascadeError, match=reason) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: not readable as JSON")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "ключ 🦊"]}, [], 1, [[[{}]]], 1e300, 10**300])
def test_everything_else_is_read_as_it_was_written(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert parse_json(text) == value


def test_bytes_that_are_not_utf_8_are_an_error_too() -> None:
    for content in (b'"caf\xe9"', '{"a": 1}'.encode("utf-16")):
        with pytest.raises(ValueError, match="utf-8"):
            parse_json(content)


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(CascadeError, match=f"{name}: not readable as JSON"):
            read_json(tmp_path / name)


def test_a_spoilt_line_of_a_log_costs_that_line(tmp_path: Path) -> None:
    kept = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 0.25}']
    spoilt = [*SPOILT, "{}", "[]", '{"step": "1"}', '{"step": null}', "null", '{"step": 2, "lo']
    lines = [kept[0], *(text for text in spoilt if text), kept[1]]
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b'\n\xff\xfe"step"}\n')
    assert RunLog(tmp_path / "log.jsonl", 2).entries == [json.loads(line) for line in kept]
    assert (tmp_path / "log.jsonl").read_text().splitlines() == kept


def test_settings_too_deep_to_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: " + "[" * 10_000)
    with pytest.raises(CascadeError, match=r"a\.yaml: not valid YAML: brackets are nested too deep"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(CascadeError, match="is not a YAML value"):
        override({}, ["a=" + "[" * 10_000])


def test_brackets_without_end_are_not_read_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each further token would cost as much as the brackets are deep."""
    read = 0
    fetch = yaml.SafeLoader.fetch_more_tokens

    def counted(loader: yaml.SafeLoader) -> None:
        nonlocal read
        read += 1
        fetch(loader)

    monkeypatch.setattr(yaml.SafeLoader, "fetch_more_tokens", counted)
    with pytest.raises(ValueError, match="brackets are nested too deep"):
        parse_yaml("[" * 100_000)
    assert 100 < read < 1200  # it looks 1,024 letters ahead, where a bracket may open a key


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of POSIX")
def test_no_reader_of_a_whole_file_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"content")
    assert content_of(tmp_path / "file") == b"content"
    with pytest.raises(OSError, match="a pipe or a device") as caught:
        content_of(tmp_path / "pipe")
    assert caught.value.filename == str(tmp_path / "pipe")
    with pytest.raises(CascadeError, match="a pipe or a device"):
        checked("style", VectorCondition(dim=2), str(tmp_path / "pipe"))
