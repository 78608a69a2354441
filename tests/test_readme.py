"""What the README says is so: its figures are the measured ones, its commands and flags exist."""

import re
import subprocess
import sys

from plumbing.common.state import save_checkpoint
from plumbing.sources.shapes import SHAPES, draw_shapes

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT

import client
from nets import LeNet5

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md", "docs/scale.md"])
def test_figures_are_those_that_were_measured(monkeypatch, name):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    text = (ROOT / name).read_text(encoding="utf-8")
    assert report.render(text, ROOT / name) == text


def test_flags_exist():
    for script in ("partition.py", "server.py", "client.py"):
        used = set(re.findall(r"--\w+", " ".join(re.findall(rf"python {script}([^\n#]*)", README))))
        help_text = subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        assert used and used <= set(re.findall(r"--\w+", help_text)), script


def test_clients_wait_for_the_server_as_long_as_it_says(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["client.py", "--cid", "0"])
    assert f"(`--max_wait_time {client.parse_args().max_wait_time}`; 0 is for ever)" in README
    unit = (ROOT / "deploy" / "fl-iot-client.service.j2").read_text()
    assert re.search(r"^ExecStart=.* client\.py .* --max_wait_time 0\b", unit, re.MULTILINE)


def test_files_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^ {4}|`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path, anchor in re.findall(r"\(((?:benchmarks|docs)/[\w./-]+)(?:#([\w-]+))?\)", README):
        assert (ROOT / path).exists(), path
        headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor


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


def write_photos(folder, kind):
    """Shapes of three classes, enlarged and with grain: as PNGs in colour, in grey, or of 12 bits and not square."""
    rng = np.random.RandomState(0)
    for split, _, drawn in draw_shapes(2000, 200).splits:
        for index, (image, label) in enumerate(drawn):
            if label < 3:
                image = cv2.resize(image, (144, 160), interpolation=cv2.INTER_CUBIC)
                image = image[:, :, ::-1].astype(float) if kind == "colour" else image.mean(2)
                image = np.clip(image + rng.normal(0, 150, image.shape), 0, 255)
                image = image.astype(np.uint8) if kind != "12 bits" else (800 + image * 4).astype(np.uint16)
                path = folder / split / SHAPES[label] / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image)


@pytest.mark.parametrize("kind", ["colour", "grey", "12 bits"])
def test_lines_for_a_trained_model_are_as_right_as_its_test_says(suite, kind):
    write_photos(suite.root / "photos", kind)
    how = ("--image_size", "40x36", "--fit", "crop") if kind == "12 bits" else ()
    suite.partition("--dataset", "Photos", "--source", suite.root / "photos", "--num_clients", 1, *how)
    server = suite.server("--dataset", "Photos", "--num_clients", 1, "--num_rounds", 4, "--num_epochs", 3)
    suite.client(0, "--dataset", "Photos")
    assert server.wait(240) == 0, server
    checkpoint = torch.load(suite.ckps("Photos") / "best.ptl", weights_only=True)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].replace("ckps/CIFAR10", "ckps/Photos")
    driver = f"""import pathlib, sys; sys.path.insert(0, ".")
for path in sorted(pathlib.Path("photos/test").glob("*/*")):
    print(path.parent.name, end=" ")
    exec({code!r}.replace("frog.jpg", str(path)))"""
    done = subprocess.run([sys.executable, "-c", driver], cwd=suite.root, capture_output=True, text=True, timeout=120)
    pairs = [line.split() for line in done.stdout.splitlines()]
    assert len(pairs) == 60, done.stderr
    accuracy = np.mean([truth == said for truth, said in pairs])
    assert accuracy == pytest.approx(checkpoint["metrics"]["test_accuracy"], abs=1e-6)
    assert accuracy > 0.4  # not at chance, where all ways to shrink are alike
