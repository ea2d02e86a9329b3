"""Ray Serve: replicas of the HTTP server behind one address; Ray starts more of them when requests queue up.

    serve run cascade.integrations.ray_serve:app model=my-cascade gpus=1 max_replicas=8

Needs the extra `cascade-diffusion[ray,serve]`. Each replica loads the model and writes its own gallery, so requests
that need earlier ones' state are not served: only OpenAI's images API, with the pictures in the response, and /health.
Set CASCADE_API_KEY if other users can reach the address.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from cascade.pipeline import CascadePipeline
from cascade.server.app import make_stateless_app
from cascade.server.gallery import Gallery
from cascade.server.guard import App, Rules
from cascade.server.queue import Queue

if TYPE_CHECKING:
    from ray.serve import Application

KEY = "CASCADE_API_KEY"
_ONGOING = 64  # requests in a replica's queue; Ray keeps the others


class Arguments(BaseModel):
    """Arguments of the application: of `serve run`, and `args` in Ray's configuration files."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    """A folder or hub id; None: the bundled cascade."""
    out: str = "out"
    """Folder of the galleries, one subfolder per replica."""
    hosts: str = ""
    """Host names of the address, separated by commas; those of loopback are always allowed."""
    min_replicas: int = 1
    """Replicas without load."""
    max_replicas: int = 1
    """Replicas under load."""
    cpus: float = 1
    """Processors per replica."""
    gpus: float = 0
    """GPUs per replica."""
    most_waiting: int = 500
    """Pictures that may wait in a replica; further requests get status 429."""


def app(arguments: Arguments | Mapping[str, Any]) -> Application:
    """The application, for `serve run` and `ray.serve.run`. Raises pydantic's ValidationError."""
    from ray import serve

    own, key = Arguments.model_validate(arguments), os.environ.get(KEY)

    def replica() -> App:  # Ray calls a function without parameters in each replica
        return _replica(own, key)

    scaling: dict[str, Any] = {"min_replicas": own.min_replicas, "max_replicas": own.max_replicas}
    deployment = serve.deployment(
        serve.ingress(replica)(),
        name="cascade",
        autoscaling_config={**scaling, "target_ongoing_requests": 2},
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": own.cpus, "num_gpus": own.gpus},
    )
    return deployment.bind()


def _replica(arguments: Arguments, key: str | None) -> App:
    """The ASGI application of a replica; its thread draws until the process ends."""
    queue = Queue(
        lambda: CascadePipeline.from_pretrained(arguments.model),
        Gallery(Path(arguments.out) / uuid.uuid4().hex[:12]),
        most_waiting=arguments.most_waiting,
    )
    queue.start()
    return make_stateless_app(queue, Rules(hosts=tuple(filter(None, arguments.hosts.split(","))), key=key))
