"""The interface of networks, tested for every network that a stage can have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cascade.config.stage import ModelConfig, StageConfig
from cascade.models.network import Network, NetworkConfig
from cascade.resources.memory import blank_call
from cascade.settings import parse
from cascade.stage import build_stage

IF = {"kind": "if_unet", "channels": [8, 16], "blocks": [1, 1], "attention": [False, True], "embedding_dim": 16}
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"channels": [8, 16], "blocks": [1, 1], "strides": [1, 2], "attention": [False, True], "groups": 4}
    | {"head_dim": 8, "embedding_dim": 16, "text_dim": 16},
    "if_unet": IF | {"text_dim": 16, "context_dim": 32, "head_dim": 8, "pooling_heads": 2, "groups": 4},
    "transformer": {"kind": "transformer", "width": 16, "depth": 2, "bottleneck": 8, "head_dim": 8}
    | {"embedding_dim": 16, "text_dim": 16},
}
KINDS = pytest.mark.parametrize("kind", NETWORKS)


def stage_config(kind: str, **changes: Any) -> StageConfig:
    schedule = "squared_cosine" if kind == "if_unet" else "cosine"
    plain = {"name": "s", "resolution": 8, "schedule": {"kind": schedule}, "model": NETWORKS[kind] | changes}
    return parse(StageConfig, plain, "here")


def network_of(kind: str, **changes: Any) -> Network:
    torch.manual_seed(0)
    return build_stage(stage_config(kind, **changes)).network


def call(network: Network, kind: str) -> Tensor:
    z, level, cond = blank_call(stage_config(kind), 2, 3)
    output: Tensor = network(z, level, cond)
    return output


def members(annotation: Any) -> list[type[NetworkConfig]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, NetworkConfig) else []
    return [member for part in get_args(annotation) for member in members(part)]


def test_these_are_all_networks_that_a_stage_can_have() -> None:
    assert {member.model_fields["kind"].default for member in members(ModelConfig)} == set(NETWORKS)


@KINDS
def test_the_output_has_the_pictures_channels_and_as_many_again_where_a_variance_is_predicted(kind: str) -> None:
    config = stage_config(kind)
    assert call(network_of(kind), kind).shape == (2, (2 if config.model.predicts_variance else 1) * 3, 8, 8)


@KINDS
def test_a_network_is_built_for_any_number_of_channels(kind: str) -> None:
    network = stage_config(kind).model.build(4, 5)
    _, level, cond = blank_call(stage_config(kind), 2, 3)
    cond = type(cond)(cond.text, cond.text_mask, torch.zeros(2, 5, 8, 8), level)
    assert network(torch.zeros(2, 4, 8, 8), level, cond).shape[1] in (4, 8)


@KINDS
def test_a_picture_is_drawn_at_each_multiple_of_the_divisor_and_at_no_other_size(kind: str) -> None:
    network, step = network_of(kind), stage_config(kind).geometry.divisor
    _, level, cond = blank_call(stage_config(kind), 1, 3)
    assert network(torch.zeros(1, 3, step, 3 * step), level, cond).shape[-2:] == (step, 3 * step)
    with pytest.raises(ValueError, match=f"must be multiples of {step}"):
        network(torch.zeros(1, 3, step, 3 * step + 1), level, cond)


@KINDS
def test_the_least_memory_is_a_lower_bound_of_what_a_call_makes(kind: str) -> None:
    from cascade.resources.memory import stage_memory

    config = stage_config(kind)
    assert config.geometry.least_activations * 4 * 8 * 8 < stage_memory(config).activations


REPEATED = re.compile(r"^(levels|middle|down_blocks|mid_block|up_blocks|blocks)\.")


@KINDS
def test_repeated_blocks_hold_all_weights_but_those_of_the_first_and_last_layers_and_of_the_conditions(
    kind: str,
) -> None:
    """Named independently, as checkpoints name them: Muon's choice must stay what it was for runs that resume."""
    network = network_of(kind)
    inside = {weight for block in network.repeated_blocks() for weight in block.parameters()}
    named = {weight for name, weight in network.named_parameters() if REPEATED.match(name)}
    assert inside == named
    assert inside


class _Outside(TorchFunctionMode):
    """Notes which of some weights an operation reads while none of their blocks runs."""

    def __init__(self, weights: dict[Tensor, nn.Module]) -> None:
        super().__init__()
        self.weights, self.running, self.seen = weights, set[nn.Module](), list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter)]
        if not getattr(func, "__name__", "").startswith("__"):  # such as the getter of `dtype`, which reads no number
            self.seen += [one for one in read if one in self.weights and self.weights[one] not in self.running]
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(network: Network) -> Iterator[_Outside]:
    blocks = list(network.sharded_blocks())
    outside = _Outside({weight: block for block in blocks for weight in block.parameters()})
    hooks = [block.register_forward_pre_hook(lambda block, _: outside.running.add(block)) for block in blocks]
    hooks += [block.register_forward_hook(lambda block, *_: outside.running.discard(block)) for block in blocks]
    with outside:
        yield outside
    for hook in hooks:
        hook.remove()


@KINDS
def test_the_weights_of_a_sharded_block_are_read_by_its_own_call_alone(kind: str) -> None:
    """Else FSDP would hand over a piece of them. Drawing calls `prepare` apart, training through `forward`."""
    network = network_of(kind)
    with watched(network) as outside:
        call(network, kind)
    assert outside.weights
    assert not outside.seen
    assert network._no_split_modules == sorted({type(block).__name__ for block in network.sharded_blocks()})


def test_the_watch_sees_weights_that_are_read_outside() -> None:
    network = network_of("unet")
    with watched(network) as outside:
        torch.nn.functional.silu(next(iter(network.sharded_blocks())).conv_in.weight)  # type: ignore[arg-type]
    assert len(outside.seen) == 1


@KINDS
def test_attention_layers_hold_every_linear_layer_whose_output_reaches_a_softmax_of_the_picture(kind: str) -> None:
    """By name, as adapters' folders name them."""
    network = network_of(kind)
    inside = {layer for part in network.attention_layers() for layer in part.modules() if isinstance(layer, nn.Linear)}
    names = {name for name, layer in network.named_modules() if layer in inside}
    expected = re.compile(r"attention|text_key_values")
    assert names == {
        name for name, part in network.named_modules() if isinstance(part, nn.Linear) and expected.search(name)
    }
    assert names


@KINDS
def test_activation_checkpointing_changes_no_gradient(kind: str) -> None:
    network = network_of(kind)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=rng)
    gradients = []
    for network.activation_checkpointing in (False, True):
        network.zero_grad()
        call(network, kind).square().sum().backward()
        gradients.append([weight.grad for weight in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))  # type: ignore[arg-type]
