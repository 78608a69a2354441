"""What the README and docs/ say is so: their figures are the measured ones; commands, flags, files and links exist."""

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

PAGES = {  # name: text
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        *ROOT.glob("*.md"),
        *sorted(ROOT.glob("docs/*.md")),
        ROOT / "benchmarks/README.md",
        ROOT / "deploy/README.md",
    )
}
README = PAGES["README.md"]
SCRIPTS = ("partition.py", "server.py", "client.py")
OTHERS_FLAGS = {"--enable-supernode-auth"}  # of Flower's commands, which make test-engines runs


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if "<!-- end " in text])
def test_figures_are_those_that_were_measured(monkeypatch, name):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    assert report.render(PAGES[name], ROOT / name) == PAGES[name]


@pytest.fixture(scope="module")
def flags():
    """The flags of each script, as its --help has them."""
    found = {}
    for script in SCRIPTS:
        command = [sys.executable, ROOT / script, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        found[script] = set(re.findall(r"--[\w-]+", done.stdout))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_flags_exist(flags, name):
    for script in SCRIPTS:
        commands = re.findall(rf"python {script}([^\n#`]*)", PAGES[name].replace("\\\n", ""))
        used = set(re.findall(r"--[\w-]+", " ".join(commands)))
        assert (used or name != "README.md") and used <= flags[script], script
    known = set().union(*flags.values(), OTHERS_FLAGS)
    for path in (ROOT / "Makefile", *ROOT.glob("deploy/*.*")):  # and what those take, or name of Ansible's
        known |= set(re.findall(r"--[\w-]+", path.read_text(encoding="utf-8")) if path.suffix != ".md" else ())
    prose = re.sub(r"```.*?```|(?m:^) {4}[^\n]*", "", PAGES[name], flags=re.DOTALL)
    assert {flag for code in re.findall(r"`([^`\n]+)`", prose) for flag in re.findall(r"--[a-z][\w-]*", code)} <= known


def test_clients_wait_for_the_server_as_long_as_it_says(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["client.py", "--cid", "0"])
    assert f"(`--max_wait_time {client.parse_args().max_wait_time}`; 0 is for ever)" in README
    unit = (ROOT / "deploy" / "fl-iot-client.service.j2").read_text()
    assert re.search(r"^ExecStart=.* client\.py .* --max_wait_time 0\b", unit, re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_targets_and_files_exist(name):
    makefile, folder = (ROOT / "Makefile").read_text(), (ROOT / name).parent
    for target in re.findall(r"(?:^ {4}|`)make ([\w-]+)", PAGES[name], re.MULTILINE):
        assert re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", makefile, re.MULTILINE), target
    written = re.findall(r"[\w<>.-]+\.\w+", PAGES["docs/files.md"].split("\n## ")[0])  # test_screen holds these
    written += re.findall(r"[\w.-]+\.\w+", (ROOT / ".gitignore").read_text())  # by people
    written += [path.name for where in ("plumbing/*", "deploy") for path in ROOT.glob(f"{where}/*")]  # named alone
    for path in re.findall(r"`([\w./<>-]+\.(?:py|sh|yml|ini|toml|txt|md|csv|json|png|ptl|tar))`", PAGES[name]):
        there = (
            (ROOT / path).exists()
            or (folder / path).exists()
            or re.sub(r"_\d+\.", "_<cid>.", path.rpartition("/")[2]) in written
        )
        assert there, path


def test_names_in_the_table_of_the_code_are_there():
    rows = re.findall(
        r"^\| [^|]+ \| (`.*) \|$", PAGES["CONTRIBUTING.md"].split("## Where things are\n")[1], re.MULTILINE
    )
    assert len(rows) > 10
    for row in rows:
        text = None
        for code in re.findall(r"`([\w./-]+)`", row):
            if code.endswith((".py", ".toml", "/")):
                paths = [*(ROOT / code).glob("*.py")] if code.endswith("/") else [ROOT / code]
                text = "".join(path.read_text(encoding="utf-8") for path in paths)
            else:
                assert all(re.search(rf"\b{part}\b", text) for part in code.split(".")), code


def anchors(text):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", PAGES[name]):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def test_readme_leads_to_all_pages():
    assert {name for name in PAGES if f"({name})" not in README} == {"README.md", "deploy/README.md"}
    assert "(../deploy/README.md)" in PAGES["docs/boards.md"]


def test_readme_shows_the_two_commands_that_do_everything():
    assert {"make demo", "make test"} <= {line.strip() for line in README.splitlines() if line.startswith("    ")}


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
