"""What the README says is so: its figures are the measured ones, its commands and flags exist."""

import re
import subprocess
import sys

import cv2
import numpy as np
import torch
from conftest import ROOT

from nets import LeNet5, save_checkpoint

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_are_those_that_were_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    assert report.render(README) == README


def test_flags_exist():
    for script in ("partition.py", "server.py", "client.py"):
        used = set(re.findall(r"--\w+", " ".join(re.findall(rf"python {script}([^\n#]*)", README))))
        help_text = subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        assert used and used <= set(re.findall(r"--\w+", help_text)), script


def test_files_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^ {4}|`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\(((?:benchmarks|docs)/[\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


def test_five_lines_use_a_trained_model(tiny):
    """The README's own lines, run as they stand beside a checkpoint and a picture."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 5
    torch.manual_seed(0)
    classes = [f"class {number}" for number in range(10)]
    tiny.ckps("CIFAR10").mkdir(parents=True)
    save_checkpoint(tiny.ckps("CIFAR10") / "best.ptl", LeNet5(3, 10), {"classes": classes})
    cv2.imwrite(str(tiny.root / "frog.jpg"), np.full((50, 40, 3), 99, np.uint8))
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() in classes, done.stderr
