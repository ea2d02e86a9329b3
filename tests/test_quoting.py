"""Untrusted text is printed without terminal control codes, and shortened."""

from __future__ import annotations

import io
import json
import logging
import warnings
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade
from PIL import Image

from cascade.batch.reports import JsonLog, Progress
from cascade.cli.program import main
from cascade.cli.terminal import PlainFormatter
from cascade.errors import LONGEST, LONGEST_LINE, message, named, quoted, shown, shown_json, shown_lines
from cascade.prompts.records import Failure
from cascade.settings import override

CLEAR = "\x1b[2J"
"""Clears a terminal."""
STEERING = (CLEAR, "\x9b2J", "\r", "\b", "\x07", "\u202e", "\u2028", "\x7f")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


def steers(text: str) -> bool:
    return any(letter in text for sequence in STEERING for letter in sequence if not letter.isprintable())


# --- the functions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a{CLEAR}b", r"a\x1b[2Jb"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x9b\u202e\u2028\x7f", r"\x9b\u202e\u2028\x7f"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_control_characters_are_shown_as_python_escapes(text: str, expected: str) -> None:
    assert shown(text) == expected


@pytest.mark.parametrize(
    "text", ["a fox", "ключ 🦊", "狐　の絵", "👩\u200d💻", "نمی\u200cخواهم", "e\u0301", "a\u00a0b", "\\x1b"]
)
def test_letters_of_every_script_stay(text: str) -> None:
    assert shown(text) == shown_lines(text) == message(text) == shown_json(text) == text


@pytest.mark.parametrize("steering", STEERING)
def test_no_format_lets_control_characters_through(steering: str) -> None:
    text = f"a{steering}b"
    assert not any(map(steers, (shown(text), shown_lines(text), message(text), quoted(text), named([text]))))
    assert not steers(shown_json(json.dumps([text], ensure_ascii=False)))


def test_escaped_json_says_the_same() -> None:
    data = {"id": "".join(STEERING) + "🦊\U000e0041"}
    text = shown_json(json.dumps(data, ensure_ascii=False))
    assert "🦊" in text
    assert json.loads(text) == data


def test_our_own_ends_of_lines_stay() -> None:
    assert shown_lines(f"a\n{CLEAR}") == message(f"a\n{CLEAR}") == "a\n\\x1b[2J"


def test_values_are_cut_at_200_letters_and_what_was_cut_is_counted() -> None:
    assert quoted("a" * LONGEST) == repr("a" * LONGEST)
    assert quoted("a" * 1_000_000) == f"'{'a' * LONGEST}'... (1,000,000 letters)"
    assert quoted([1, 2]) == "[1, 2]"
    assert quoted([0] * 1000) == f"{str([0] * 1000)[:LONGEST]}... (3,000 letters)"
    assert named(["data", "k" * 1000]).endswith("... (1,005 letters)")
    assert message("a" * 3000) == "a" * LONGEST_LINE + "... (3,000 letters)"


def test_values_that_python_cannot_write_are_named_by_their_type() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert quoted(10**5000) == "a value (int)"
    assert quoted(nested) == "a value (list)"


# --- where it is printed -----------------------------------------------------------------------------------


def test_results_of_a_command_show_the_names_of_folders(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    options = ["--model", str(model), "--device", "cpu", "--out", str(tmp_path / f"o{CLEAR}t"), "--to", "16"]
    assert main(["upscale", str(picture), *options]) == 0
    assert r"o\x1b[2Jt/a.png: 16x16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", f"no{CLEAR}model"],
        ["upscale", f"no{CLEAR}picture", "--device", "cpu"],
        ["generate", "--prompts", f"no{CLEAR}file"],
        ["generate", "a fox", f"--{CLEAR}"],
        ["generate", "a fox", "--steps", f"base={CLEAR}"],
        ["train", f"no{CLEAR}settings"],
        ["train", "preset:tiny/base", f"stage.{CLEAR}=1"],
        ["plot", f"no{CLEAR}log"],
        ["check-data", f"no{CLEAR}settings"],
        [CLEAR],
    ],
    ids=lambda words: words[0] + str(len(words)),
)
def test_errors_of_every_command_show_what_was_written(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert r"\x1b[2J" in err
    assert not steers(err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "preset:tiny/base", "x" * 100_000],
        ["train", "preset:tiny/base", f"stage.{'x' * 100_000}=1"],
        ["train", "preset:tiny/base", f"stage.name.{'x' * 100_000}=1"],
        ["generate", "a fox", "--steps", "x" * 100_000],
        ["generate", "a fox", "--preset", "x" * 100_000],
    ],
    ids=lambda words: words[-1][:12],
)
def test_a_value_of_any_length_is_reported_in_a_short_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < LONGEST_LINE + 100


def test_failures_of_a_run_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    failure = Failure(f"prompts{CLEAR}.txt:1", f"id: {CLEAR}\nforged: all is well")
    Progress().failed(failure)
    (line,) = capsys.readouterr().err.splitlines()
    assert not steers(line)
    file = io.StringIO()
    JsonLog(file).failed(failure)
    assert not steers(file.getvalue()[:-1])
    assert json.loads(file.getvalue())["origin"] == failure.origin


def test_warnings_and_log_messages_show_it_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talking(*_arguments: object, **_options: object) -> int:
        warnings.simplefilter("always")
        warnings.warn(f"a{CLEAR}", stacklevel=1)
        logging.getLogger("cascade").info("b%s", CLEAR)
        return 0

    monkeypatch.setattr("cascade.cli.program.program.main", talking)
    assert main([]) == 0
    assert capsys.readouterr().err == "cascade: warning: a\\x1b[2J\nb\\x1b[2J\n"
    record = logging.LogRecord("cascade", logging.INFO, "", 1, "x" * 10_000, (), None)
    assert len(PlainFormatter().format(record)) < LONGEST_LINE + 100


def test_settings_quote_what_they_refuse() -> None:
    with pytest.raises(ValueError, match=r"^'x{200}'\.\.\. \(100,000 letters\): expected key=value"):
        override({}, ["x" * 100_000])
