"""Threads of torch sleep while they wait on a busy machine, and spin on a quiet one."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from cascade.system.process import wait_asleep_on_a_busy_machine

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without the settings, which is put back afterwards."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)


@pytest.mark.parametrize(("percent", "sleeps"), [(0.0, False), (3.0, False), (8.0, True), (100.0, True)])
def test_half_a_core_of_others_decides(monkeypatch: pytest.MonkeyPatch, percent: float, sleeps: bool) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda _interval: percent)
    assert wait_asleep_on_a_busy_machine() is sleeps
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if sleeps else None)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda _interval: 100.0)
    monkeypatch.setenv(name, "1")
    assert not wait_asleep_on_a_busy_machine()
    assert os.environ[name] == "1"
    assert name == "OMP_WAIT_POLICY" or "OMP_WAIT_POLICY" not in os.environ


def test_a_command_settles_it_before_torch_is_there() -> None:
    program = (
        "import sys, cascade.cli.program as program\n"
        "program.wait_asleep_on_a_busy_machine = lambda: sys.exit('torch' in sys.modules)\n"
        "program.main(['--version'])"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
