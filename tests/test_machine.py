"""Which GPU is ours; the memory that is left: of the machine, or of the part of it that a container or a batch system
gives us."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cascade.system.device import control_group_free_bytes, free_bytes, own_gpu


def control_groups(root: Path, mine: str, files: dict[str, str]) -> Path:
    """A machine's /proc and /sys/fs/cgroup below `root`."""
    for name, text in {
        "proc/self/cgroup": mine,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_limits_of_all_control_groups_around_us_leave_what_is_free(tmp_path: Path) -> None:
    """A Slurm job: its own group has no limit, that of the job has. Read files in its use give way."""
    files = {
        "job/step/memory.max": "max\n",
        "job/step/memory.current": "50\n",
        "job/step/memory.stat": "anon 50\n",
        "job/memory.max": "1000\n",
        "job/memory.current": "700\n",
        "job/memory.stat": "anon 300\ninactive_file 300\nactive_file 100\n",
        "memory.stat": "inactive_file 5\n",
    }
    root = control_groups(tmp_path, "0::/job/step\n", files)
    assert control_group_free_bytes(root) == [700]


def test_control_groups_of_version_1_are_read_where_the_container_sees_them(tmp_path: Path) -> None:
    """The path is the machine's, which is not there inside the container."""
    files = {
        "memory/memory.limit_in_bytes": "1000\n",
        "memory/memory.usage_in_bytes": "700\n",
        "memory/memory.stat": "inactive_file 9\ntotal_inactive_file 50\ntotal_active_file 10\n",
    }
    root = control_groups(tmp_path, "5:cpu:/docker/a\n4:memory:/docker/a\n0::/\n", files)
    assert control_group_free_bytes(root) == [360]


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert control_group_free_bytes(tmp_path) == []
    monkeypatch.setattr("cascade.system.device.control_group_free_bytes", lambda: [])
    assert free_bytes() > 1000
    monkeypatch.setattr("cascade.system.device.control_group_free_bytes", lambda: [1000, 2000])
    assert free_bytes() == 1000


@pytest.mark.parametrize(
    ("local_rank", "shown", "own"), [(None, 8, 0), ("3", 8, 3), ("3", 1, 0)], ids=["alone", "launched", "shown one"]
)
def test_each_process_of_a_launch_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, shown: int, own: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: shown)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert own_gpu() == torch.device("cuda", own)
    asked: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: asked.append(device) or (1000, 2000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _device: 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _device: 0)
    assert free_bytes() == 1000
    assert asked == [own_gpu()]
