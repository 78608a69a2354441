"""helpers.py: children of the tests heed signals, whatever pytest itself was started with."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_child_can_trap_a_signal(name):
    """As deploy/demo.sh does. What is ignored when bash starts, it cannot trap."""
    code = f"trap 'exit 7' {name}; kill -{name} $$; exit 0"
    assert subprocess.run(["bash", "-c", code], timeout=20).returncode == 7


def test_child_can_trap_a_signal_that_pytest_ignores():
    """As under cron, or as a background job of a script."""
    test = f"{__file__}::test_child_can_trap_a_signal"
    command = f"trap '' INT TERM; exec '{sys.executable}' -m pytest -q -p no:cacheprovider '{test}'"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
