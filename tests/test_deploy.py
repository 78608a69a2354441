"""The playbook behind make deploy, as far as it goes without root: two folders of this machine are the devices, reached
through an sshd of the test's own. What systemd does with it on booted systems is in shelf/deploy.py.
"""

import ast
import getpass
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, commands_in, free_port

PLAYBOOK = ROOT / ".venv-deploy" / "bin" / "ansible-playbook"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


def ansible(*args, **kwargs):
    if not PLAYBOOK.exists():
        pytest.skip("Ansible is not here: make .venv-deploy/setup")
    env = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "deploy" / "ansible.cfg")}
    return subprocess.run([PLAYBOOK, *args], env=env, capture_output=True, text=True, timeout=300, **kwargs)


def changes(out):
    return {name: int(count) for name, count in re.findall(r"^(\w+): done, (\d+) changed$", out, re.MULTILINE)}


@pytest.mark.parametrize("name", ["deploy.yml", "manage.yml"])
def test_syntax(name):
    done = ansible("--syntax-check", "-i", ROOT / "deploy" / "inventory.example.ini", ROOT / "deploy" / name)
    assert done.returncode == 0 and not done.stderr, done


def test_what_is_copied_is_what_a_client_imports():
    """Every module of the suite that client.py imports, and theirs, goes to the devices; no other script does."""
    playbook = (ROOT / "deploy" / "deploy.yml").read_text()
    listed = re.search(r"scripts: (client\.py.*)", playbook)[1].split()
    folders = re.findall(r"(\S+)/\*\.py", re.search(r"plumbing: (plumbing.*)", playbook)[1])
    imported, left = set(), ["client.py"]
    while left:
        script = left.pop()
        imported.add(script)
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            modules = {f"{name.replace('.', '/')}.py" for name in names}
            left += {module for module in modules if (ROOT / module).exists()} - imported
    assert {name for name in listed if name.endswith(".py")} == {name for name in imported if "/" not in name}
    assert folders == ["plumbing", "plumbing/common", "plumbing/device"]
    assert {str(Path(name).parent) for name in imported if "/" in name} <= set(folders)
    assert all((ROOT / name).exists() for name in listed)


@pytest.mark.parametrize("verb", ["deploy", "status"])
@pytest.mark.parametrize(
    "inventory, words",
    [
        ([], "make {verb} needs INVENTORY=FILE"),
        (["INVENTORY=shelff.ini"], "there is no inventory shelff.ini"),
        (["INVENTORY=/dev/null"], "/dev/null: no device is named there, or it cannot be read"),
    ],
)
def test_make_asks_for_an_inventory_with_devices(verb, inventory, words):
    if not PLAYBOOK.exists():
        pytest.skip("Ansible is not here: make .venv-deploy/setup")
    command = ["make", "-o", ".venv-deploy/setup", verb, *inventory]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and words.format(verb=verb) in done.stderr.splitlines()[-2], done  # the last is make's


def test_make_knows_no_other_folder_than_its_own(tmp_path):
    done = subprocess.run(["make", "-f", ROOT / "Makefile"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "run make in the suite's folder" in done.stderr and not list(tmp_path.iterdir())


def test_the_service_starts_the_supernode_of_the_docs(suite, tmp_path):
    """One variable makes it a SuperNode, by the command that docs/engines.md has and make test-engines runs."""
    play = "- hosts: all\n  gather_facts: false\n  tasks:\n    - ansible.builtin.template:\n"
    play += f"        src: {ROOT}/deploy/fl-iot-client.service.j2\n        dest: '{tmp_path}/unit'\n"
    (tmp_path / "play.yml").write_text(play)
    facts = {"cid": 3, "folder": "/home/pi/FL IoT", "server_address": "LAPTOP_IP", "dataset_name": "CIFAR10"}
    facts.update(runs="", ansible_python_interpreter=sys.executable)
    started = []
    for as_supernode in (True, False):
        given = json.dumps({**facts, "as_supernode": as_supernode})
        done = ansible("-i", "localhost,", "-c", "local", "--extra-vars", given, tmp_path / "play.yml")
        assert done.returncode == 0, done
        (line,) = re.findall(r"^ExecStart=(.*)", (tmp_path / "unit").read_text(), re.MULTILINE)
        started.append(shlex.split(line))
    (command,) = commands_in("docs/engines.md", "Devices on Flower's deployment engine", "flower-supernode")
    command = shlex.split(command)
    names = {"certificates/ca.pem": "ca.pem", "device_3": "supernode_key"}  # as the playbook copies them
    assert started[0] == [
        "/home/pi/FL IoT/.venv/bin/flower-supernode",
        *(names.get(word, word).replace("FL-IoT", "FL IoT") for word in command[1:]),
    ]
    assert started[1][:2] == ["/home/pi/FL IoT/.venv/bin/python", "client.py"]
    if shutil.which("systemd-analyze"):  # how exposed the service is, from 0 to 10
        (tmp_path / "unit").rename(tmp_path / "unit.service")
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", tmp_path / "unit.service"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.fixture
def login(tmp_path):
    """Inventory variables by which Ansible logs into this machine; without an sshd here it goes without."""
    if SSHD is None:
        print("no sshd here: apt-get install openssh-server")
        yield "ansible_connection=local"
        return
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    port, log = free_port(), tmp_path / "sshd.log"
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    options = [f"HostKey={tmp_path}/host", f"AuthorizedKeysFile={tmp_path}/user.pub", "StrictModes=no", "UsePAM=no"]
    options += ["ListenAddress=127.0.0.1", "PidFile=none", "PermitRootLogin=yes", "Subsystem=sftp internal-sftp"]
    command = [SSHD, "-D", "-p", str(port), "-f", os.devnull, "-E", log]
    sshd = subprocess.Popen([*command, *(f"-o{option}" for option in options)])
    until = time.monotonic() + 20
    while not log.exists() or "listening" not in log.read_text():
        assert sshd.poll() is None and time.monotonic() < until, log.exists() and log.read_text()
        time.sleep(0.05)
    yield (
        f"ansible_host=127.0.0.1 ansible_port={port} ansible_user={getpass.getuser()} "
        f"ansible_ssh_private_key_file={tmp_path}/user "
        f"ansible_ssh_common_args='-o UserKnownHostsFile={tmp_path}/known_hosts -o ControlPersist=5s'"
    )
    sshd.kill()
    sshd.wait()


@pytest.fixture
def shelf(suite, shapes_zip, login):
    """A laptop with bundles and an inventory; shelf(args) plays deploy.yml there, for the parts that need no root."""
    suite.partition("--dataset", "Tiny", "--source", shapes_zip, "--num_clients", 2, "--bundles")
    shutil.copy(ROOT / "requirements.txt", suite.root)
    lines = ["[pis]"] + [f"pi{cid} cid={cid} home='{suite.root}/pi {cid}' {login}" for cid in (0, 1)]
    lines += ["[all:vars]", "ansible_become=false", f"ansible_python_interpreter={sys.executable}"]
    lines += ["dataset=Tiny", "server_address=127.0.0.1"]
    (suite.root / "shelf.ini").write_text("\n".join(lines) + "\n")

    def play(*args):
        parts = ["--tags", "code,data", "--skip-tags", "environment"]
        return ansible("-i", suite.root / "shelf.ini", *parts, *args, suite.root / "deploy" / "deploy.yml")

    yield play


def test_only_what_changed_is_copied(shelf, suite):
    done = shelf("--check", "--limit", "pi0")
    assert done.returncode == 0 and all(changes(done.stdout).values()), done
    assert not (suite.root / "pi 0").exists()

    done = shelf()
    assert done.returncode == 0 and changes(done.stdout) == {"pi0": 4, "pi1": 4}, done
    for cid in (0, 1):
        board = suite.root / f"pi {cid}"
        for name in ("client.py", "nets.py", "requirements.txt", "deploy/setup_device.sh"):
            assert (board / name).read_bytes() == (suite.root / name).read_bytes()
        tables = [path.name for path in board.glob("datasets/Tiny/clients/*")]
        assert tables == [f"client_{cid}.csv"]
        for image in board.glob("datasets/Tiny/train/*.npy"):
            assert image.read_bytes() == (suite.root / "datasets" / "Tiny" / "train" / image.name).read_bytes()
        assert len(list(board.glob("datasets/Tiny/train/*.npy"))) == 300
        modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in board.glob("datasets/**/*")}
        assert modes == {True: 0o750, False: 0o640} and (board / "bundle.tar").stat().st_mode & 0o777 == 0o600

    before = {path: path.lstat().st_mtime_ns for path in suite.root.glob("pi */**/*")}
    done = shelf()
    assert done.returncode == 0 and changes(done.stdout) == {"pi0": 0, "pi1": 0}, done
    assert {path: path.lstat().st_mtime_ns for path in suite.root.glob("pi */**/*")} == before

    with open(suite.root / "nets.py", "a") as file:
        file.write("# new\n")
    shutil.rmtree(suite.root / "pi 1" / "datasets" / "Tiny")  # as if its power had gone before it was renamed
    done = shelf()
    assert done.returncode == 0 and changes(done.stdout) == {"pi0": 1, "pi1": 2}, done
    assert (suite.root / "pi 1" / "datasets" / "Tiny" / "dataset.json").exists()


def test_the_end_says_which_failed_and_why(shelf, suite):
    (suite.root / "pi 1").mkdir()
    (suite.root / "pi 1" / "datasets").write_text("a file, where a folder is to be")
    with open(suite.root / "shelf.ini", "a") as file:
        file.write("[off]\npi2 cid=2 ansible_connection=ssh ansible_host=127.0.0.1 ansible_port=1\n")
    shutil.copy(suite.root / "datasets/Tiny/bundles/client_1.tar", suite.root / "datasets/Tiny/bundles/client_2.tar")
    facts = suite.root / "datasets" / "Tiny" / "dataset.json"
    facts.write_text(facts.read_text().replace('"num_clients": 2', '"num_clients": 3'))
    done = shelf()
    assert done.returncode != 0 and changes(done.stdout) == {"pi0": 4}, done
    last = done.stdout.strip().splitlines()[-2:]
    assert re.fullmatch(r"pi1 FAILED: unpack the bundle: mkdir: cannot create directory .datasets.: .*", last[0])
    # Ansible has either of the two words for it, as ssh gives up before or after it was written to.
    assert re.fullmatch(r"pi2 FAILED: not reached: .*(Connection refused|could not be sent).*", last[1])


def test_what_the_laptop_can_see_is_said_before_a_device_is_touched(shelf, suite):
    inventory = suite.root / "shelf.ini"
    good = inventory.read_text()
    inventory.write_text(good.replace(" cid=1", " cid=0").replace("dataset=", "secret_file=nowhere\ndataset="))
    done = shelf()
    assert done.returncode == 2 and done.stdout == "" and not list(suite.root.glob("pi *")), done
    assert done.stderr.splitlines() == [
        "pi0, pi1: cid 0 is given to pi0 and pi1",
        f"pi0, pi1: secret_file {suite.root}/nowhere cannot be read on this machine: No such file or directory",
    ]
    inventory.write_text(good)
    bundle = suite.root / "datasets" / "Tiny" / "bundles" / "client_1.tar"
    bundle.write_bytes(bundle.read_bytes()[:-10000])
    done = shelf("--limit", "pi1")
    assert done.returncode == 2 and done.stderr.startswith(f"pi1: {bundle} is damaged, or not a bundle of Tiny"), done


SUPERNODE = {"supernode": "yes", "root_certificate": "a", "supernode_key": "b", "client_flags": "--verbose"}
MISTAKES = [  # in what the inventory says of the device with cid 1, None for what it leaves out; what is said
    ({"cid": None}, "no cid: give each device one in the inventory"),
    ({"cid": 2}, "cid 2 is not in the split of Tiny, which has 2 shards, 0 to 1"),
    ({"cid": 1.5}, "cid 1.5 is not a whole number from 0 up"),
    ({"cid": True}, "cid True is not a whole number from 0 up"),
    ({"server_address": None}, "no server_address: write into the inventory how the devices reach the server"),
    ({"server_adress": "laptop"}, "server_adress is unknown: do you mean server_address?"),
    ({"server_address": "my laptop"}, "server_address my laptop is neither a name nor an IP address"),
    ({"server_port": 80800}, "server_port 80800 is not a number from 1 to 65535"),
    ({"dataset": 1.5}, "dataset is 1.5, not text: put it in quotes"),
    ({"dataset": ["Tiny"]}, 'dataset is ["Tiny"], not text: put it in quotes'),
    ({"dataset": "tiny"}, "no {root}/datasets/tiny/bundles/client_1.tar on this machine: run partition.py"),
    ({"home": "fl-iot"}, "home fl-iot is not a folder from / on"),
    ({"secret_file": "empty"}, "secret_file {root}/empty is empty"),
    ({"root_certificate": "shelf.ini"}, "root_certificate {root}/shelf.ini is not a certificate"),
    ({"supernode": "maybe"}, "supernode maybe is neither true nor false"),
    ({"supernode": True}, "a SuperNode needs root_certificate and supernode_key"),
    (SUPERNODE, "client_flags: of client.py alone, not of a SuperNode"),
    ({"supernode_key": "b"}, "supernode_key: of a SuperNode alone, with supernode=true"),
    ({"wheelhouse": "http://192.0.2.1/"}, "anyone on the network can change what http://192.0.2.1/ sends"),
    ({"wheelhouse": "nowhere"}, "wheelhouse nowhere is not a folder with wheels on this machine"),
    ({}, None),
]


def test_inventories_that_cannot_be_meant(suite, shapes_zip):
    """All of them by the same Python as Ansible's, in one process."""
    if not PLAYBOOK.exists():
        pytest.skip("Ansible is not here: make .venv-deploy/setup")
    suite.partition("--dataset", "Tiny", "--source", shapes_zip, "--num_clients", 2, "--bundles")
    for name, content in (("empty", ""), ("shelf.ini", "[pis]")):
        (suite.root / name).write_text(content)
    good = {"cid": 1, "server_address": "192.0.2.1", "dataset": "Tiny", "ansible_host": "192.0.2.2", "my_own": [1]}
    code = "import json, pathlib, sys; from shelf import check_shelf\nfor own in json.load(sys.stdin):\n"
    code += "    print(json.dumps(check_shelf({'pi1': own}, ['pi1'], pathlib.Path(sys.argv[1]), True)))"
    shelves = [{name: own for name, own in {**good, **change}.items() if own is not None} for change, _ in MISTAKES]
    done = subprocess.run(
        [PLAYBOOK.with_name("python"), "-c", code, suite.root],
        **{"input": json.dumps(shelves), "capture_output": True, "text": True, "timeout": 60},
        env={**os.environ, "PYTHONPATH": str(ROOT / "deploy" / "callback_plugins")},
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(MISTAKES), done
    for (change, words), problems in zip(MISTAKES, found, strict=True):
        said = [problem.replace(str(suite.root), "{root}").startswith(words or "nothing") for problem in problems]
        assert said == ([True] if words else []), (change, problems)
