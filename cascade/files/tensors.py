"""Weights as safetensors, and no other format: written, read, checked, or streamed from disk layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.errors import CascadeError
from cascade.files.atomic import atomic_file
from cascade.files.text import open_regular


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors, atomically; floating ones as `dtype` if given."""
    plain = {
        name: tensor.detach()
        .to(device="cpu", dtype=dtype if tensor.is_floating_point() else None, copy=True)
        .contiguous()
        for name, tensor in tensors.items()
    }
    with atomic_file(path) as temporary:
        save_file(plain, temporary)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CascadeError when it is missing, truncated or of another format."""
    try:
        open_regular(path).close()  # of a pipe the library would wait for more
        return load_file(path)
    except FileNotFoundError:
        raise CascadeError(f"{path}: no such file") from None
    except (SafetensorError, OSError, RuntimeError) as error:  # torch's own, of a file that cannot be mapped
        raise CascadeError(f"{path}: damaged, or not safetensors ({error}); copy or download it again") from None


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], origin: str | Path) -> None:
    """Fill a module, casting to its number format. Raises CascadeError naming a missing, extra or misshapen weight."""
    own = module.state_dict()
    check_names(own, tensors, f"{origin}: ")
    module.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own}, assign=_on_meta(module))


def check_names(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Check that `tensors` have the names and shapes of a network's own weights.

    Raises CascadeError; its message begins with `origin` and names the first weight that differs.
    """
    problems = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    problems += [f"{name} is not in this network" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, this network has {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CascadeError(f"{origin}{min(problems)}{more}; the weights belong to other settings")


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


# --- streaming -------------------------------------------------------------------------------------------------------
# Weights that do not fit into memory: each layer's are read from disk when it runs, and dropped afterwards.


def stream(
    module: nn.Module,
    files: Sequence[Path],
    device: torch.device | str,
    aliases: Mapping[str, str] | None = None,
    whole: bool = True,
) -> None:
    """Make a module on the meta device read its weights from safetensors files layer by layer, onto `device`.

    It computes in its own number format. aliases: names in the module of weights stored under another name.
    whole: the files hold the module and nothing else. Raises CascadeError naming a weight that is missing, misshapen or
    unknown, or a damaged file.
    """
    from accelerate.hooks import attach_align_device_hook
    from accelerate.utils import OffloadedWeightsLoader

    stored = {name: (path, shape) for path in files for name, shape in stored_shapes(path).items()}
    index = {}
    for name, parameter in module.state_dict().items():
        source = (aliases or {}).get(name, name)
        if source not in stored:
            raise CascadeError(f"{files[0].parent}: {source} is missing; the weights belong to other settings")
        path, shape = stored[source]
        if shape != list(parameter.shape):
            raise CascadeError(
                f"{path}: {source} has shape {shape}, this network has {list(parameter.shape)}; the weights belong to"
                " other settings"
            )
        index[name] = {"safetensors_file": str(path), "weight_name": source}
    unknown = sorted(stored.keys() - {entry["weight_name"] for entry in index.values()})
    if whole and unknown:
        raise CascadeError(
            f"{stored[unknown[0]][0]}: {unknown[0]} is not in this network; the weights belong to other settings"
        )
    weights = OffloadedWeightsLoader(index=index)
    attach_align_device_hook(module, execution_device=torch.device(device), offload=True, weights_map=weights)


def is_streamed(module: nn.Module) -> bool:
    """Whether the module's weights stay on disk."""
    return bool(_hooks(module))


def move_streamed(
    module: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Make a streamed module compute on another device, or in another number format, from its next call on."""
    if device is not None:
        for hook in _hooks(module):
            hook.execution_device = torch.device(device)
    module.to(dtype=dtype)  # tensors without data; they only define the format in which a weight is read


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks, one per layer with weights; they load the weights."""
    return [part._hf_hook for part in module.modules() if hasattr(part, "_hf_hook")]


def stored_bytes(files: Sequence[Path], dtype: torch.dtype) -> int:
    """Bytes of all weights in safetensors files once they are loaded as `dtype`."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for path in files for shape in stored_shapes(path).values())


def stored_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes in a safetensors file by name, without reading its data. Raises CascadeError for a damaged file."""
    try:
        open_regular(path).close()  # of a pipe the library would wait for more
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CascadeError(f"{path}: damaged, or not safetensors ({error}); copy or download it again") from None
