"""deploy/setup_device.sh and the markers of requirements.txt: what boards get, and what they are told.

The packages here are stubs in a wheelhouse, but bash, venv and pip are the real ones; real packages on real systems are
in shelf/.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
from helpers import ROOT, tree
from packaging.requirements import Requirement

LINES = (ROOT / "requirements.txt").read_text().splitlines()
REQUIREMENTS = [Requirement(line) for line in LINES if line and not line.startswith("#")]
LAPTOP = {"matplotlib", "opencv-python-headless", "pandas", "pillow", "wandb"}
DEVICE = {"filelock", "flwr", "numpy", "torch", "tqdm"}


def platform(system, machine, release, python):
    names = {"Linux": ("linux", "posix"), "Darwin": ("darwin", "posix"), "Windows": ("win32", "nt")}[system]
    return {
        "platform_system": system,
        "platform_machine": machine,
        "platform_release": release,
        "python_version": python,
        "python_full_version": f"{python}.2",
        "sys_platform": names[0],
        "os_name": names[1],
    }


CPU, ANY = "<2.10,>=1.12", ">=1.12"
PLATFORMS = {
    "Pi OS Trixie": (platform("Linux", "aarch64", "6.12.47+rpt-rpi-v8", "3.13"), CPU, ">=1.21", False),
    "Pi OS Bookworm": (platform("Linux", "aarch64", "6.6.51+rpt-rpi-v8", "3.11"), CPU, ">=1.21", False),
    "Pi OS Bookworm, Pi 5": (platform("Linux", "aarch64", "6.6.51+rpt-rpi-2712", "3.11"), CPU, ">=1.21", False),
    "Pi OS Bullseye": (platform("Linux", "aarch64", "6.1.21-v8+", "3.9"), CPU, ">=1.21", False),
    "Ubuntu on a Pi": (platform("Linux", "aarch64", "6.8.0-1013-raspi", "3.12"), CPU, ">=1.21", False),
    "JetPack 5": (platform("Linux", "aarch64", "5.10.120-tegra", "3.8"), ANY, "<2,>=1.21", False),
    "JetPack 6": (platform("Linux", "aarch64", "5.15.148-tegra", "3.10"), ANY, "<2,>=1.21", False),
    "JetPack 7": (platform("Linux", "aarch64", "6.8.12-tegra", "3.12"), ANY, ">=1.21", False),
    "x86 Linux": (platform("Linux", "x86_64", "6.1.0-18-amd64", "3.11"), ANY, ">=1.21", True),
    "macOS": (platform("Darwin", "arm64", "24.1.0", "3.12"), ANY, ">=1.21", True),
    "Windows": (platform("Windows", "AMD64", "11", "3.13"), ANY, ">=1.21", True),
}


@pytest.mark.parametrize("name", PLATFORMS)
def test_markers_pick_one_torch_and_one_numpy_for_each_platform(name):
    environment, torch, numpy, laptop = PLATFORMS[name]
    taken = [line for line in REQUIREMENTS if line.marker is None or line.marker.evaluate(environment)]
    specifiers = {line.name: ",".join(sorted(str(line.specifier).split(","))) for line in taken}
    assert len(specifiers) == len(taken), "a package stands twice"
    assert specifiers["torch"] == torch and specifiers["numpy"] == numpy
    assert specifiers.keys() == DEVICE | (LAPTOP if laptop else set())


def test_markers_keep_an_arm_laptop_installable():
    """make setup installs with constraints.txt: what it pins for this platform has to lie within the ranges."""
    environment = PLATFORMS["Pi OS Bookworm"][0]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pins = {pin.name: pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)}
    for line in REQUIREMENTS:
        if line.name in pins and (line.marker is None or line.marker.evaluate(environment)):
            assert line.specifier.contains(str(pins[line.name].specifier).lstrip("=")), line


# ---------------------------------------------------------------------------------------------------------------------

TORCH = """
__version__ = {version!r}
class nn:
    class Conv2d:
        def __init__(self, *args): pass
        def __call__(self, images): return self
        def sum(self): return self
        def backward(self): pass
def from_numpy(array): return array
"""
STUBS = {
    "flwr": [("1.11.1", "")],
    "numpy": [("2.2.6", "__version__ = '2.2.6'\ndef ones(*args): pass")],
    "torch": [(version, TORCH.format(version=version)) for version in ("2.9.1", "2.15.0")],
    "tqdm": [("4.67.1", "")],
    "filelock": [("3.16.1", "")],
}


def write_wheel(folder, name, version, code):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


class Board:
    """A folder with the suite as a device has it, its wheelhouse, and commands that pretend to be another machine's."""

    def __init__(self, folder):
        self.root, self.wheels, self.bin = folder / "FL-IoT", folder / "wheels", folder / "bin"
        for path in (self.root / "deploy", self.wheels, self.bin):
            path.mkdir(parents=True)
        shutil.copy(ROOT / "requirements.txt", self.root)
        for name in ("setup_device.sh", "torch_index.sh"):
            shutil.copy(ROOT / "deploy" / name, self.root / "deploy")
        for name, versions in STUBS.items():
            for version, code in versions:
                write_wheel(self.wheels, name, version, code)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        self.env.update(PATH=f"{self.bin}:{os.environ['PATH']}", WHEELHOUSE=str(self.wheels), PYTHON=sys.executable)
        self.env.update(PIP_CONFIG_FILE=os.devnull)

    @property
    def venv(self):
        return self.root / ".venv"

    def pretend(self, command, answer):
        """Let `command` print `answer`, whatever it is asked."""
        path = self.bin / command
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
        path.chmod(0o755)

    def setup(self, *args, **env):
        return subprocess.run(
            ["bash", self.root / "deploy" / "setup_device.sh", *args],
            env={**self.env, **env},
            capture_output=True,
            text=True,
            cwd="/",
            timeout=120,
        )

    def installed(self):
        """{package: version} of what the environment itself holds."""
        names = [path.name for path in self.venv.glob("lib/python3*/site-packages/*.dist-info")]
        return dict(name[: -len(".dist-info")].split("-") for name in names)


@pytest.fixture
def board(tmp_path):
    return Board(tmp_path)


def fails(done, words):
    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("setup_device.sh: "), done
    assert re.search(words, done.stderr), done


def df(megabytes):
    return f"Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/root 9999999 1 {megabytes * 1024} 1% /"


@pytest.mark.parametrize("machine", ["armv7l", "armv6l", "i686"])
def test_32_bit_machine_is_turned_away(board, machine):
    board.pretend("uname", machine)
    fails(board.setup(), f"32-bit system \\({machine}\\).* 64-bit")
    assert not board.venv.exists()


def test_32_bit_system_on_a_64_bit_kernel_is_turned_away(board):
    """What a 32-bit Pi OS is on a Pi 4: uname says aarch64."""
    board.pretend("uname", "aarch64")
    board.pretend("python3", "32 True 3.11.2\n/usr/bin/python3")
    fails(board.setup(PYTHON="python3"), "32-bit system .* 64-bit")


def test_old_python_is_turned_away(board):
    board.pretend("python3", "64 False 3.6.9\n/usr/bin/python3")
    fails(board.setup(PYTHON="python3"), "Python 3.8 .* this is 3.6.9.*PYTHON=python3.8")


def test_missing_python_is_said(board):
    fails(board.setup(PYTHON="python3.99"), "no python3.99: sudo apt-get install python3")


def test_python_that_does_not_run_is_said(board):
    board.pretend("python3", "")
    fails(board.setup(PYTHON="python3"), "python3 does not run")


def test_full_card_is_said(board):
    board.pretend("df", df(300))
    fails(board.setup(), "300 MB are free in .*FL-IoT, 1500 MB are needed")


def test_missing_wheelhouse_is_said(board):
    fails(board.setup(WHEELHOUSE="/nowhere"), "WHEELHOUSE=/nowhere is not a folder")


def test_wheelhouse_that_anyone_on_the_way_can_change_is_said_aloud(board):
    fails(board.setup(WHEELHOUSE="http://127.0.0.1:1/"), "change what http://127.0.0.1:1/ sends: .* --insecure")
    done = board.setup("--insecure", WHEELHOUSE="http://127.0.0.1:1/", PIP_RETRIES="0")
    assert "setup_device.sh: warning: anyone on the way to http://127.0.0.1:1/" in done.stdout, done
    assert done.returncode == 2 and "pip" in done.stderr


def test_scripts_do_not_depend_on_the_shell_of_their_caller(board, tmp_path):
    """CDPATH, aliases and functions, and the folder: relative paths are the caller's, the rest is the suite's."""
    for folder in ("deploy", ".venv", "certificates"):
        (tmp_path / "other" / folder).mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "make_certificates.sh", board.root / "deploy")
    (tmp_path / "bashrc").write_text(
        "shopt -s expand_aliases\nalias mkdir='echo mkdir' rm=false\ncd() { builtin cd \"$@\" && pwd; }\n"
        f"export CDPATH={tmp_path}/other\n"
    )
    before = tree(tmp_path / "other")
    env = {
        **board.env,
        "CDPATH": str(tmp_path / "other"),
        "BASH_ENV": str(tmp_path / "bashrc"),
        "WHEELHOUSE": "../wheels",
    }
    for script, *args in (["setup_device.sh"], ["make_certificates.sh", "127.0.0.1"]):
        command = ["bash", f"deploy/{script}", *args]
        done = subprocess.run(command, cwd=board.root, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done
    assert (board.venv / "device").exists() and (board.root / "certificates" / "server.pem").exists()
    assert tree(tmp_path / "other") == before


def test_a_torch_without_cuda_is_looked_for_where_there_is_no_gpu(board):
    def index(reached, gpu=False, machine="Linux x86_64"):
        board.pretend("uname", machine)
        runs = f"case $2 in nvidia-smi) exit {int(not gpu)};; *) exit {int(not reached)};; esac"
        (board.bin / "timeout").write_text(f"#!/bin/sh\n{runs}\n")
        (board.bin / "timeout").chmod(0o755)
        (board.bin / "uname").write_text(f"#!/bin/sh\nset -- $1 {machine}\n[ $1 = -s ] && echo $2 || echo $3\n")
        command = ["bash", ROOT / "deploy" / "torch_index.sh", sys.executable]
        done = subprocess.run(command, env=board.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and len(done.stderr.splitlines()) <= 1
        return done.stdout.strip(), done.stderr

    option, said = index(reached=True)
    assert option == "--extra-index-url https://download.pytorch.org/whl/cpu" and "to download" in said
    option, said = index(reached=False)
    assert option == "" and "cannot be reached" in said and "3 GB to download" in said
    option, said = index(reached=True, gpu=True)
    assert option == "" and "3 GB to download" in said
    assert index(reached=True, machine="Linux aarch64") == index(reached=True, machine="Darwin x86_64") == ("", "")


@pytest.mark.parametrize(
    "code, words",
    [
        ("sys.version_info = (3, 10, 12)", "laptop needs Python 3.11 or newer, and .* is 3.10: .* SETUP_PYTHON="),
        ("sys.modules['ensurepip'] = None", r"cannot make environments: sudo apt-get install python3\.\d+-venv"),
        (None, "there is no python3.99: sudo apt-get install"),
    ],
)
def test_make_setup_says_in_one_line_what_the_laptop_lacks(tmp_path, code, words):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{code}")
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "SETUP_PYTHON": sys.executable if code else "python3.99"}
    done = subprocess.run(["make", "setup", "-s"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / ".venv").exists(), done
    (line, _) = done.stderr.splitlines()  # the last is make's own
    assert line.startswith("make_venv.sh: ") and re.search(words, line), line


def test_unknown_argument_is_said(board):
    fails(board.setup("--chekc"), "unknown argument --chekc")


def test_packages_that_a_wheelhouse_lacks_are_said(board):
    next(board.wheels.glob("flwr-*")).unlink()
    fails(board.setup(), "No matching distribution found for flwr")
    assert board.setup("--check").returncode == 1


def test_setup_then_nothing_then_what_changed(board):
    """One board's life: from nothing, a second run, a new requirement, a torn environment, another Python's remains."""
    assert board.setup("--check").returncode == 1 and not board.venv.exists()
    done = board.setup()
    assert done.returncode == 0 and "ready: torch 2.15.0, flwr 1.11.1, numpy 2.2.6" in done.stdout, done
    assert DEVICE <= board.installed().keys() and not LAPTOP & board.installed().keys()

    before = {path: path.lstat().st_mtime_ns for path in board.root.rglob("*")}
    started = time.monotonic()
    done = board.setup(WHEELHOUSE="")
    assert done.returncode == 0 and "nothing to do" in done.stdout and time.monotonic() - started < 5
    assert board.setup("--check").returncode == 0
    assert {path: path.lstat().st_mtime_ns for path in board.root.rglob("*")} == before

    requirements = board.root / "requirements.txt"
    requirements.write_text(requirements.read_text().replace("tqdm>=4.60", "tqdm>=4.68"))
    write_wheel(board.wheels, "tqdm", "4.70.0", "")
    torch = next(board.venv.glob("lib/python3*/site-packages/torch/__init__.py"))
    kept = torch.stat().st_ino
    assert board.setup("--check").returncode == 1
    done = board.setup()
    assert done.returncode == 0 and board.installed()["tqdm"] == "4.70.0" and torch.stat().st_ino == kept, done

    torch.write_bytes(b"")  # what a power cut leaves behind, and pip takes for installed
    (board.venv / "device").unlink()
    done = board.setup()
    assert done.returncode == 0 and torch.stat().st_size > 0, done


def test_killed_setup_is_made_good_by_the_next(board):
    write_wheel(board.wheels, "flwr", "1.12.0", "import time\nprint('trying', flush=True)\ntime.sleep(60)")
    first = subprocess.Popen(
        ["bash", board.root / "deploy" / "setup_device.sh"],
        env=board.env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert any(line == "trying\n" for line in first.stdout)
    second = subprocess.Popen(
        ["bash", board.root / "deploy" / "setup_device.sh"], env=board.env, stdout=subprocess.PIPE, text=True
    )
    assert "another setup is running" in second.stdout.readline()  # it touches nothing before the first has ended
    next(board.wheels.glob("flwr-1.12.0*")).unlink()
    os.killpg(first.pid, signal.SIGKILL)
    assert second.wait(60) == 0 and "ready: " in second.stdout.read()
    assert board.installed()["flwr"] == "1.11.1"
    first.wait()


@pytest.mark.parametrize(
    "code, words",
    [
        ("import os; os.kill(os.getpid(), 4)", r"torch 2.16.0 uses instructions that this processor lacks \(SIGILL\)"),
        ("import os; os.kill(os.getpid(), 7)", r"truncated \(SIGBUS\)"),
        ("import os; os.kill(os.getpid(), 9)", "add swap"),
        ("raise ImportError('libcudnn.so.8: cannot open shared object file')", "libcudnn.so.8: cannot open"),
    ],
)
def test_torch_that_does_not_work_is_not_trusted(board, code, words):
    write_wheel(board.wheels, "torch", "2.16.0", code)
    fails(board.setup(), words)
    assert board.setup("--check").returncode == 1


def test_arm_gets_a_torch_that_every_core_runs(board):
    board.pretend("uname", "aarch64")
    board.pretend("df", df(5000))
    assert board.setup().returncode == 0
    assert board.installed()["torch"] == "2.9.1"


def test_torch_of_the_system_is_kept_with_its_numpy(board, tmp_path):
    """What a Jetson has: NVIDIA's torch and a numpy 1 in the system's own Python."""
    system = tmp_path / "system"
    for name, version, code in (("torch", "2.4.0a0", TORCH.format(version="2.4.0a0")), ("numpy", "1.26.1", "")):
        write_wheel(tmp_path, name, version, code + "\n__version__ = '1.26.1'\ndef ones(*args): pass")
        zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl").extractall(system)
    board.pretend("uname", "aarch64")
    done = board.setup(PYTHONPATH=str(system))
    assert done.returncode == 0 and "the system's torch 2.4.0a0" in done.stdout, done
    assert "ready: torch 2.4.0a0, flwr 1.11.1, numpy 1.26.1" in done.stdout
    assert not {"torch", "numpy"} & board.installed().keys()
    assert "include-system-site-packages = true" in (board.venv / "pyvenv.cfg").read_text()
    assert board.setup("--check", PYTHONPATH=str(system)).returncode == 0
    assert board.setup("--check").returncode == 1  # NVIDIA's torch is gone: the environment is of no use


def test_small_tmp_is_gone_round_or_said(board):
    free = 'case $2 in . | */FL-IoT) echo "/ 9 9 9999999";; *) echo "/ 9 9 204800";; esac'
    (board.bin / "df").write_text(f"#!/bin/sh\necho Filesystem\n{free}\n")
    (board.bin / "df").chmod(0o755)
    fails(board.setup(TMPDIR="/tmp"), "200 MB are free in TMPDIR=/tmp, 600 MB are needed")
    done = board.setup(TMPDIR="")
    assert done.returncode == 0 and f"TMPDIR={board.venv}/tmp" in done.stdout, done
    assert not (board.venv / "tmp").exists()


def test_environment_of_make_setup_is_left_alone(board):
    (board.venv / "bin").mkdir(parents=True)
    (board.venv / "setup").touch()
    done = board.setup()
    assert done.returncode == 0 and "nothing to do: make setup" in done.stdout
    assert sorted(path.name for path in board.venv.iterdir()) == ["bin", "setup"]


def test_scripts_are_bash():
    for script in [*(ROOT / "deploy").glob("*.sh"), *(ROOT / "tests").rglob("*.sh")]:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("module, package", [("tqdm", "tqdm"), ("cv2", "opencv-python-headless")])
def test_missing_package_is_one_line_when_it_is_needed(suite, module, package):
    """tqdm: what a client started with another Python than .venv's first lacks; cv2: what no device has or needs."""
    (suite.root / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}', name='{module}')")
    resize = "import numpy; from plumbing.common import images, process; process.run_script("
    resize += "lambda: images.prepare_image(numpy.zeros((9, 9), 'uint8'), (32, 32)))"
    command = [suite.root / "client.py", "--cid", "0"] if module == "tqdm" else ["-c", resize]
    done = subprocess.run([sys.executable, *command], cwd=suite.root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert f"{module} is not installed: start this script with .venv/bin/python, or run " in done.stderr
    assert done.stderr.endswith(f"{sys.executable} -m pip install {package}\n")
