"""An emulated GPU: tensors on torch's `meta` device replace those on a GPU, and a mode refuses unsupported operations.

Arithmetic on `meta` computes shapes and number formats without values, so all code for a GPU runs, in milliseconds.
Operations that the GPU would refuse are refused, and those that would wait for it are recorded.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cascade

HERE = torch.device("meta")
"""The device that stands for the GPU."""

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)
_READING = (_aten.nonzero.default, _aten.masked_select.default, _aten.equal.default)
_OURS = str(Path(cascade.__file__).parent)  # the installed package, which may be another checkout than these tests


class Refused(RuntimeError):  # noqa: N818 - what a GPU says, not what we do wrong
    """An operation that a GPU of this kind does not support."""


class OnDevice(TorchDispatchMode):
    """Refuses two devices in one operation, like CUDA, and float64, like MPS; records waiting operations in `waits`.

    Waiting operations: values read back, copies to the GPU without `non_blocking`, and shapes that depend on values.
    Values read back are 1 or True. `operations` counts the operations that ran there. (`torch.tensor(numbers,
    device=...)` also waits, but is not detected.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # it hands over composed operations, such as `item`, whole
            with self:
                answer = func.decompose(*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in given if tensor.is_meta]
        self._check_devices(func, given, there)
        if func in _READING and there:
            self._wait(func)
        if func is _aten._local_scalar_dense.default and there:
            self._wait(func)
            return torch.ones((), dtype=there[0].dtype).item()
        answer = self._copied(func, args, kwargs) if func in _COPIES else func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor) and leaf.is_meta]
        self.operations += bool(made)
        if any(tensor.dtype == torch.float64 for tensor in there + made):
            raise Refused(f"{func}: float64 on a device that has none")
        return answer

    def _check_devices(self, func: Any, given: list[Tensor], there: list[Tensor]) -> None:
        if func in _COPIES or not there:
            return
        # A GPU takes a number that lies in a CPU tensor without dimensions, as a scalar of the operation.
        here = [tensor for tensor in given if not tensor.is_meta and tensor.ndim > 0]
        if here and func in _INDEXING:
            self._wait(func)  # the places are copied first
        elif here:
            raise Refused(f"{func}: tensors on two devices, {[tuple(tensor.shape) for tensor in given]}")

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A copy, also from the GPU, where `meta` has nothing to give."""
        if func is _aten.copy_.default:
            into, source = args[0], args[1]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if source.is_meta and not into.is_meta:
                self._wait(func)
                return into.fill_(1)
            if into.is_meta and not source.is_meta and blocking:
                self._wait(func)
            return func(*args, **kwargs)
        source, device = args[0], kwargs.get("device")
        away = source.is_meta and device is not None and torch.device(device).type != "meta"
        if away:
            self._wait(func)
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=device)
        answer = func(*args, **kwargs)
        if answer.is_meta and not source.is_meta and not kwargs.get("non_blocking", False):
            self._wait(func)
        return answer

    def _wait(self, func: Any) -> None:
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_OURS)]
        where = f"{Path(ours[-1].filename).relative_to(_OURS)}:{ours[-1].lineno} {ours[-1].line}" if ours else "a test"
        self.waits.append(f"{where} ({func})")
