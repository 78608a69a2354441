"""make test-deploy: make deploy to three booted Debian systems, and what may happen to a shelf.

The tests tell one story, in this order. The devices have no network but the shelf's: their packages come from a
wheelhouse.
"""

import contextlib
import csv
import re
import shlex
import shutil
import time

import pytest
from devices import ADDRESS, Shelf, in_lab
from helpers import ROOT, Process, Suite, commands_in, write_images
from roots import fetch, need, tell

NAMES = ["dev1", "dev2", "dev3"]
UNIT = "fl-iot-client"


class Laptop(Suite):
    """The suite on the laptop: make's verbs, and the server, on the shelf's network."""

    def __init__(self, root, shelf):
        super().__init__(root)
        self.shelf = shelf
        for name in ("Makefile", "requirements.txt"):
            shutil.copy2(ROOT / name, root)
        shutil.rmtree(root / "deploy")
        shutil.copytree(ROOT / "deploy", root / "deploy")
        (root / ".venv-deploy").symlink_to(ROOT / ".venv-deploy")
        hosts = [f"{device.name} ansible_host={device.address} cid={cid}" for cid, device in enumerate(shelf.devices)]
        lines = ["[pis]", *hosts, "[all:vars]", "ansible_user=pi", f"ansible_ssh_private_key_file={shelf.key}"]
        lines += [f"ansible_ssh_common_args=-o UserKnownHostsFile={shelf.folder}/known_hosts"]
        lines += [f"server_address={ADDRESS}", "dataset=Tiny", "client_flags=--num_threads 1", "secret_file=secret"]
        (root / "shelf.ini").write_text("\n".join(lines) + "\n")
        (root / "secret").write_text("open sesame, pretty please\n")
        (root / "secret").chmod(0o600)

    def make(self, verb, *variables, code=0, timeout=900):
        """The output of `make verb`; fails when it does not end with `code`."""
        started = time.monotonic()
        process = self.begin(verb, *variables)
        assert process.wait(timeout) == code, str(process)
        tell(f"make {' '.join([verb, *variables])}: {time.monotonic() - started:.0f} s")
        return process.out

    def begin(self, verb, *variables):
        command = in_lab("make", verb, "INVENTORY=shelf.ini", *variables)
        process = Process(command, self.root / f"process_{len(self.processes)}", self.env, self.root)
        self.processes.append(process)
        return process

    def serve(self, *args):
        flags = ["--server_address", ADDRESS, "--dataset", "Tiny", "--num_clients", 3, "--secret_file", "secret"]
        command = in_lab(ROOT / ".venv/bin/python", self.root / "server.py", *flags, *args)
        process = Process(command, self.root / f"process_{len(self.processes)}", self.env, self.root)
        self.processes.append(process)
        return process

    def rows(self):
        with contextlib.suppress(FileNotFoundError), open(self.ckps("Tiny") / "history.csv") as file:
            return list(csv.DictReader(file))
        return []

    def await_round(self, server, clients, after=0, timeout=150):
        """Wait for a round after round `after` with `clients` clients; returns its number."""
        until = time.monotonic() + timeout
        while True:
            for row in self.rows():
                if int(float(row["round"])) > after and int(float(row["clients"])) == clients:
                    return int(float(row["round"]))
            assert server.popen.poll() is None, str(server)
            assert time.monotonic() < until, f"no round of {clients} clients after round {after}: {server}"
            time.sleep(0.2)


def recap(out):
    """{device: number of changes} of those that did not fail, and which tasks changed anything."""
    counts = {name: int(count) for name, count in re.findall(r"^(dev\d): done, (\d+) changed$", out, re.MULTILINE)}
    return counts, set(re.findall(r"^dev\d: (\w+ [\w ]+)$", out, re.MULTILINE))


@pytest.fixture(scope="module")
def shelf():
    need(
        debootstrap="debootstrap", systemd_nspawn="systemd-container", ssh="openssh-client", ip="iproute2", make="make"
    )
    shelf = Shelf(3)
    yield shelf
    shelf.close()


@pytest.fixture(scope="module")
def laptop(shelf, tmp_path_factory):
    laptop = Laptop(tmp_path_factory.mktemp("laptop"), shelf)
    images = write_images(tmp_path_factory.mktemp("images") / "images.zip", 600, 100)
    laptop.partition("--dataset", "Tiny", "--source", images, "--num_clients", 3, "--bundles")
    yield laptop
    laptop.close()


@pytest.fixture(scope="module")
def wheelhouse():
    """The packages of a device with Python 3.11; torch is a CPU build where pip knows of one."""
    names = ["filelock", "flwr", "numpy", "torch", "tqdm"]
    options = ["-qq", "--python-version", "3.11", "--only-binary=:all:", "--constraint", ROOT / "constraints.txt"]
    download = [ROOT / ".venv/bin/python", "-m", "pip", "download", *options]
    return fetch("wheels/bookworm", lambda part: [*download, "--dest", part, *names])


@pytest.fixture(scope="module")
def dev1(shelf):
    return shelf.devices[0]


@pytest.fixture(scope="module")
def dev2(shelf):
    return shelf.devices[1]


@pytest.fixture(scope="module")
def dev3(shelf):
    return shelf.devices[2]


def main_pid(device):
    """Of the client, as soon as it runs: systemd takes 3 s to start one again that has ended."""
    until = time.monotonic() + 20
    while True:
        pid = int(device.ssh(f"systemctl show {UNIT} --property MainPID --value"))
        if pid:
            return pid
        assert time.monotonic() < until, device.ssh(f"systemctl status {UNIT}", check=False)
        time.sleep(0.2)


def test_devices_boot(shelf):
    started = time.monotonic()
    for device in shelf.devices:
        device.up()
    for device in shelf.devices:
        device.wait()
    tell(f"three devices are up ({time.monotonic() - started:.0f} s)")


def test_check_from_nothing_changes_nothing(laptop, shelf):
    counts, _ = recap(laptop.make("deploy", "ARGS=--check"))
    assert all(counts[name] > 0 for name in NAMES)
    assert shelf.devices[0].ssh("ls /opt; getent passwd fl-iot || true") == ""
    assert "dev2: not deployed" in laptop.make("status")


def test_power_cut_in_the_middle_of_the_install(laptop, dev3, wheelhouse):
    deploy = laptop.begin("deploy", f"WHEELHOUSE={wheelhouse}", "ARGS=--limit dev3")
    until = time.monotonic() + 300
    torch = "/opt/fl-iot/.venv/lib/python3.11/site-packages/torch/lib"
    while not dev3.ssh(f"ls {torch} 2>/dev/null | grep cpu", check=False):
        assert time.monotonic() < until and deploy.popen.poll() is None, str(deploy)
        time.sleep(0.1)
    dev3.cut()
    assert deploy.wait(120) != 0
    assert re.search(r"^dev3 FAILED: not reached: ", deploy.out, re.MULTILINE), str(deploy)
    dev3.up()
    dev3.wait()
    assert dev3.ssh("ls /opt/fl-iot/client.py && ls -a /opt/fl-iot") and not dev3.ssh(
        "ls /opt/fl-iot/.venv/device", False
    )
    tell("power was cut while pip unpacked torch on dev3")


def test_deploy_from_nothing(laptop, shelf, wheelhouse):
    counts, _ = recap(laptop.make("deploy", f"WHEELHOUSE={wheelhouse}"))
    assert counts.keys() == set(NAMES) and all(counts.values())
    for device in shelf.devices:
        state = device.ssh(
            f"systemctl is-active {UNIT}; systemctl is-enabled {UNIT}; stat -c '%a %U' /opt/fl-iot/secret"
        )
        assert state.split() == ["active", "enabled", "600", "fl-iot"]
        assert device.ssh("ps -o user= -C python").split() == ["fl-iot"]
        modes = device.ssh("sudo find /opt/fl-iot/datasets /opt/fl-iot/bundle.tar -printf '%m %u %g %y\\n' | sort -u")
        assert modes.splitlines() == ["600 root root f", "640 root fl-iot f", "750 root fl-iot d"]
        # What a GPU, sensors and Wi-Fi need is there, and not much else.
        inside = f"sudo nsenter --mount --target {main_pid(device)} ls /dev /sys/class /proc/cpuinfo"
        assert device.ssh(inside) == device.ssh("ls /dev /sys/class /proc/cpuinfo")
        assert device.ssh(f"systemctl show {UNIT} --property DevicePolicy --value").strip() == "auto"
        device.ssh(f"systemd-analyze security --threshold=30 {UNIT}")
        assert not device.ssh("ls -d /opt/fl-iot/wheels", check=False)
        site = "/opt/fl-iot/.venv/lib/python3.11/site-packages"
        assert not device.ssh(f"ls -d {site}/pandas {site}/wandb {site}/matplotlib {site}/cv2", check=False)
    tell(device.ssh("du -sm /opt/fl-iot/.venv | cut -f 1").strip() + " MB in .venv")


def test_three_rounds_with_all_three(laptop):
    server = laptop.serve("--num_rounds", 3)
    assert server.wait(180) == 0, str(server)
    assert [(row["clients"], row["failures"]) for row in laptop.rows()] == [("3", "0")] * 3
    assert "waiting for" not in server.out.split("round 1/3")[-1]
    logs = laptop.make("logs")
    for name in NAMES:
        assert re.search(rf"^{name}: .*round 3/3", logs, re.MULTILINE), logs


def test_second_deploy_changes_nothing(laptop, shelf):
    before = [main_pid(device) for device in shelf.devices]
    counts, _ = recap(laptop.make("deploy"))
    assert counts == dict.fromkeys(NAMES, 0)
    assert [main_pid(device) for device in shelf.devices] == before


def test_new_code_is_all_that_is_copied(laptop, shelf):
    with open(laptop.root / "client.py", "a") as file:
        file.write("# new\n")
    counts, tasks = recap(laptop.make("deploy", "ARGS=--check --limit dev1"))
    assert counts == {"dev1": 1} and tasks == {"copy the code"}
    before = [main_pid(device) for device in shelf.devices]
    counts, tasks = recap(laptop.make("deploy", "ARGS=--limit dev1 --tags code"))
    assert counts == {"dev1": 2} and tasks == {"copy the code", "restart the client because its files have changed"}
    counts, tasks = recap(laptop.make("deploy"))
    assert counts == {"dev1": 0, "dev2": 2, "dev3": 2}
    assert tasks == {"copy the code", "restart the client because its files have changed"}
    assert not set(before) & {main_pid(device) for device in shelf.devices}


def test_deploy_that_was_cut_off_before_the_restart_is_made_good(laptop, dev1):
    """The code is there, but its client still runs the old."""
    dev1.ssh("echo '# newer' | sudo tee -a /opt/fl-iot/client.py")
    shutil.copy(laptop.root / "client.py", laptop.root / "client.py.old")
    with open(laptop.root / "client.py", "a") as file:
        file.write("# newer\n")
    _, tasks = recap(laptop.make("deploy", "ARGS=--limit dev1"))
    assert tasks == {"restart the client because its files have changed"}
    shutil.move(laptop.root / "client.py.old", laptop.root / "client.py")
    laptop.make("deploy", "ARGS=--limit dev1")


def test_new_partition_is_all_that_is_copied(laptop, dev1, tmp_path):
    images = write_images(tmp_path / "images.zip", 540, 100)
    laptop.partition("--dataset", "Tiny", "--source", images, "--num_clients", 3, "--bundles", "--seed", 7)
    counts, tasks = recap(laptop.make("deploy", "ARGS=--tags data"))
    assert counts == dict.fromkeys(NAMES, 3)
    assert tasks == {"copy the bundle", "unpack the bundle", "restart the client because its files have changed"}
    assert dev1.ssh("sudo ls /opt/fl-iot/datasets/Tiny/train | wc -l").strip() == "180"
    assert recap(laptop.make("deploy"))[0] == dict.fromkeys(NAMES, 0)


def test_one_failure_does_not_stop_the_others(laptop, dev2):
    """And the end says which failed, and why."""
    with open(laptop.root / "client.py", "a") as file:
        file.write("# newest\n")
    dev2.ssh("cd /opt/fl-iot && sudo mv datasets away && sudo touch datasets")
    out = laptop.make("deploy", code=2)
    dev2.ssh("cd /opt/fl-iot && sudo mv away new && sudo rm datasets && sudo mv new datasets")
    assert recap(out)[0] == {"dev1": 2, "dev3": 2}
    failed = [line for line in out.splitlines() if " FAILED: " in line]
    assert len(failed) == 1 and failed[0] == out.splitlines()[-1], failed
    assert failed[0].startswith("dev2 FAILED: unpack the bundle: mkdir: cannot create directory"), failed
    counts, tasks = recap(laptop.make("deploy"))
    assert counts == {"dev1": 0, "dev2": 1, "dev3": 0}, "dev2's client still ran the old code"


@pytest.fixture(scope="module")
def server(laptop):
    """A long run, whose rounds take the devices some seconds; two clients are enough to go on."""
    shutil.rmtree(laptop.ckps("Tiny"))
    flags = ["--num_rounds", 1000, "--num_epochs", 100, "--min_clients", 2, "--round_timeout", 40]
    yield laptop.serve(*flags)


def test_killed_client_comes_back(laptop, server, dev1):
    seen = laptop.await_round(server, 3)
    pid = main_pid(dev1)
    dev1.ssh(f"sudo kill -9 {pid} && while [ -e /proc/{pid} ]; do sleep 0.1; done")
    started = time.monotonic()
    main_pid(dev1)
    assert dev1.ssh(f"systemctl show {UNIT} --property NRestarts --value").strip() == "1"
    last = int(float(laptop.rows()[-1]["round"]))
    laptop.await_round(server, 3, max(seen, last) + 1)
    tell(f"kill -9: in a round again after {time.monotonic() - started:.0f} s")


def test_power_cut_in_the_middle_of_a_fit(laptop, server, dev3):
    seen = laptop.await_round(server, 3)
    until = time.monotonic() + 60
    while int(float(laptop.rows()[-1]["round"])) == seen:  # a new round has just begun
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(1)
    dev3.cut()
    started = time.monotonic()
    last = int(float(laptop.rows()[-1]["round"]))
    seen = laptop.await_round(server, 2, last)
    tell(f"power cut: the round without dev3 ended after {time.monotonic() - started:.0f} s")
    status = laptop.make("status", code=2)
    assert re.search(r"^dev3 FAILED: not reached: ", status, re.MULTILINE)
    assert re.search(r"^dev1: active, 1 restarts", status, re.MULTILINE)
    dev3.up()
    started = time.monotonic()
    laptop.await_round(server, 3, seen)
    tell(f"power on: in a round again after {time.monotonic() - started:.0f} s")


def test_link_down_and_up(laptop, server, dev3):
    last = int(float(laptop.rows()[-1]["round"]))
    dev3.link("down")
    started = time.monotonic()
    seen = laptop.await_round(server, 2, last)
    tell(f"link down: the round without dev3 ended after {time.monotonic() - started:.0f} s")
    dev3.link("up")
    started = time.monotonic()
    laptop.await_round(server, 3, seen)
    tell(f"link up: in a round again after {time.monotonic() - started:.0f} s")


def test_status_shows_all_of_it(laptop, server):
    out = laptop.make("status")
    print(*(line for line in out.splitlines() if line.startswith("dev")), sep="\n")
    assert re.search(r"^dev1: active, 1 restarts, \S+ free: round \d+/1000 ", out, re.MULTILINE), out
    for name in ("dev2", "dev3"):
        assert re.search(rf"^{name}: active, 0 restarts, \S+ free: ", out, re.MULTILINE), out


def test_restart_and_stop(laptop, server, shelf):
    before = [main_pid(device) for device in shelf.devices]
    laptop.make("restart")
    assert not set(before) & {main_pid(device) for device in shelf.devices}
    laptop.make("stop")
    assert "dev1: inactive" in laptop.make("status")
    assert recap(laptop.make("deploy"))[0] == dict.fromkeys(NAMES, 1)  # it is started again
    last = int(float(laptop.rows()[-1]["round"]))
    laptop.await_round(server, 3, last)


def test_one_variable_makes_supernodes_of_them(laptop, server, shelf):
    """The steps of docs/engines.md on the laptop, for Flower's deployment engine, and the playbook on the devices."""
    server.kill()
    shutil.copy(ROOT / "pyproject.toml", laptop.root)
    inventory = (laptop.root / "shelf.ini").read_text()
    inventory = re.sub(r"^(dev\d .* cid=(\d))$", r"\1 supernode_key=device_\2", inventory, flags=re.MULTILINE)
    inventory = inventory.replace("client_flags=--num_threads 1", "supernode=true")
    inventory = inventory.replace("secret_file=secret", "root_certificate=certificates/ca.pem")
    (laptop.root / "shelf.ini").write_text(inventory)
    laptop.env.update(PATH=f"{ROOT}/.venv/bin:{laptop.env['PATH']}", FLWR_HOME=str(laptop.root / "flower"))
    laptop.env.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    (laptop.root / "flower").mkdir()
    link = f'[superlink.laptop]\naddress = "{ADDRESS}:8000"\nroot-certificates = "{laptop.root}/certificates/ca.pem"\n'
    (laptop.root / "flower" / "config.toml").write_text(link)

    def start(command, number=0):
        fits = {"LAPTOP_IP": ADDRESS, "device_3": f"device_{number}", "$PWD": str(laptop.root), "CIFAR10": "Tiny"}
        fits.update({"num_clients=10": "num_clients=3", "num_rounds=100": "num_rounds=2"})
        for text, fit in fits.items():
            command = command.replace(text, fit)
        log = laptop.root / f"process_{len(laptop.processes)}"
        laptop.processes.append(Process(in_lab(*shlex.split(command)), log, laptop.env, laptop.root))
        return laptop.processes[-1]

    section = "Devices on Flower's deployment engine"
    starts = ("deploy/", "flower-superlink", "ssh-keygen", "flwr supernode", "flwr run")
    certificates, superlink, keygen, register, run = commands_in("docs/engines.md", section, *starts)
    assert start(certificates).wait() == 0
    start(superlink).wait_for("Uvicorn running")
    for number in range(3):
        assert start(keygen, number).wait() == 0
        assert start(register, number).wait() == 0
    laptop.make("deploy")
    assert recap(laptop.make("deploy"))[0] == dict.fromkeys(NAMES, 0)
    training = start(run)
    training.wait_for("round 2/2  fit_loss", 400, poll=0.5)
    training.wait_for("model: ", 60)
    assert [int(row["clients"]) for row in laptop.rows()] == [3, 3]
