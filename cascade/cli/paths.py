"""Options and arguments that are paths."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from cascade.errors import CascadeError
from cascade.files.paths import expanded


class PathText(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 alone
    """A path, or the name of a model: not empty; a leading `~` is the home folder, as in a shell."""

    name = "path"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        if value == "":
            self.fail("is empty; name a file or folder.", parameter, context)
        try:
            return expanded(str(value))
        except CascadeError as error:
            self.fail(f"{error}.", parameter, context)


path_option = partial(click.option, type=PathText())
"""`click.option` for a path."""
path_argument = partial(click.argument, type=PathText())
"""`click.argument` for a path."""
