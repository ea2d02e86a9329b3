"""`cascade studio` and `cascade serve`: a web page and an HTTP API for drawing."""

from __future__ import annotations

import os
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cascade.cli.terminal import path_option, say
from cascade.errors import CascadeError

if TYPE_CHECKING:
    from cascade.pipeline import CascadePipeline
    from cascade.server.guard import Rules

Command = TypeVar("Command", bound=Callable[..., Any])
PORT = 7860
_KEY = "CASCADE_API_KEY"
_OTHER_PORTS = 20  # that `studio` tries; a program expects the API at the port it was given

_OPTIONS = (
    path_option("--model", metavar="MODEL", help="A folder or hub id; default: the bundled cascade."),
    path_option("--out", default="out", show_default=True, metavar="FOLDER", help="Folder of the gallery."),
    path_option(
        "--lora", multiple=True, metavar="[STAGE=]FOLDER[:SCALE]", help="A low-rank adapter to add, such as mascot:0.8."
    ),
    path_option(
        "--loras", metavar="FOLDER", help="Low-rank adapters that a request may add, at its own scale: its subfolders."
    ),
    path_option("--models", metavar="FOLDER", help="Further models to choose from on the page: its subfolders."),
    path_option("--runs", default="runs", show_default=True, metavar="FOLDER", help="Training runs to follow."),
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others require a key."),
    click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free port."),
    click.option("--allowed-host", multiple=True, metavar="NAME", help="Another host name that requests may use."),
    click.option("--no-auth", is_flag=True, help="Accept requests without a key on any --host."),
    click.option(
        "--most-waiting", type=click.IntRange(min=1), default=500, show_default=True, help="Pictures in the queue."
    ),
    click.option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one."),
    click.option(
        "--dtype", help="float32, bfloat16, float16, or auto (fastest); default: bfloat16 if the GPU supports it."
    ),
    click.option("--low-memory", is_flag=True, help="Hold one stage in memory at a time."),
)


def _with_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_with_options
@click.option("--no-browser", is_flag=True, help="Only print the page's address.")
def studio(no_browser: bool, **values: Any) -> int:
    """Draw on a web page, served on this machine and opened in your browser.

    Pictures go to the folder --out, which `cascade generate` may use as well. No request leaves this machine.
    """
    return Request(**values, page=True, browser=not no_browser).run()


@click.command()
@_with_options
def serve(**values: Any) -> int:
    """Answer HTTP requests for pictures: cascade's own API, OpenAI's images API, and AUTOMATIC1111's txt2img.

    Listens on this machine alone; for others give --host, and a key in the environment variable CASCADE_API_KEY.
    """
    return Request(**values, page=False, browser=False).run()


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line's options, one field each."""

    model: str | None
    lora: tuple[str, ...]
    loras: str | None
    models: str | None
    out: str
    runs: str
    host: str
    port: int
    allowed_host: tuple[str, ...]
    no_auth: bool
    most_waiting: int
    device: str | None
    dtype: str | None
    low_memory: bool
    page: bool
    browser: bool

    def run(self) -> int:
        """Serve until stopped; returns the exit status."""
        rules = self._rules()
        from cascade.server.app import Server, listening, make_app
        from cascade.server.gallery import Gallery
        from cascade.server.models import Models
        from cascade.server.queue import Queue

        with listening(self.host, self.port, _OTHER_PORTS if self.page and self.port else 0) as own:
            gallery = Gallery(self.out)
            models = Models(
                self._load,
                self.model,
                None if self.models is None else Path(self.models),
                adapters=None if self.loras is None else Path(self.loras),
                fixed=self._fixed,
            )
            models.card()  # a model that is not there ends the command at once
            queue = Queue(
                models.choose(models.current), gallery, most_waiting=self.most_waiting, adapters=models.adapters_of
            )
            address = self._address(own.getsockname()[1], rules)
            app = make_app(queue, rules, models, page=self.page, runs=Path(self.runs))
            queue.start()
            try:
                Server(app, queue, lambda: self._say(address)).run([own])
            finally:
                queue.close()
                gallery.close()
        return 0

    def _rules(self) -> Rules:
        """Raises CascadeError when the extra is missing, and when other machines could draw without a key."""
        try:
            import fastapi  # noqa: F401
            import uvicorn  # noqa: F401 - reported before anything is loaded

            from cascade.server.guard import Rules, is_loopback
        except ImportError as error:
            raise CascadeError(f"{error.name} is not installed; pip install 'cascade-diffusion[studio]'") from None
        key = os.environ.get(_KEY) or None
        if not is_loopback(self.host) and key is None and not self.no_auth:
            raise CascadeError(
                f"--host {self.host}: other machines could draw here; set {_KEY} to a key for them, or give --no-auth"
            )
        return Rules(hosts=(*self.allowed_host, self.host), key=None if self.no_auth else key)

    def _fixed(self, model: str | None) -> dict[str, list[str]]:
        """The adapters of --lora, which belong to the model of --model; another one is loaded without."""
        from cascade.storage.index import read_index
        from cascade.storage.stage import adapters_for, read_config

        if model != self.model or not self.lora:
            return {}
        return adapters_for(self.lora, [read_config(folder).name for folder in read_index(model).stages])

    def _load(self, model: str | None) -> CascadePipeline:
        from cascade.pipeline import CascadePipeline

        return CascadePipeline.from_pretrained(
            model,
            device=self.device,
            dtype=self.dtype,
            low_memory=self.low_memory,
            adapters=self._fixed(model),
        )

    def _address(self, port: int, rules: Rules) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        key = f"?key={rules.key}" if rules.key and self.page else ""
        return f"http://{host}:{port}/{key}"

    def _say(self, address: str) -> None:
        say(f"{'studio' if self.page else 'serving'} at {address} - pictures in {self.out}; Ctrl-C ends it")
        if self.browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
