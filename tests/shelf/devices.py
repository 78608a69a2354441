"""A shelf for rehearsals: booted Debian systems with systemd and sshd, on a network that leads nowhere else.

Each has a card, a cgroup, a network namespace and an address of its own. In a power cut no packet leaves any more, no
process runs on, and what was not synced is lost.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

from roots import CACHE, debian

LAB, NET = f"fl-iot-{os.getpid()}", "10.77.7"  # what a killed run has left is in nobody's way
ADDRESS = f"{NET}.1"  # the laptop's
CGROUPS = Path("/sys/fs/cgroup")
if (CGROUPS / "unified").is_dir():  # a host with both versions
    CGROUPS /= "unified"
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, b"\2\0\0\0"


def run(*command, **kwargs):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, **kwargs)


def in_lab(*command):
    """What to start for `command` to run on the laptop's side of the shelf's network."""
    return ["ip", "netns", "exec", LAB, *map(str, command)]


class Shelf:
    """`count` devices, named dev1, dev2, …, over one Debian system; an ssh key to all of them."""

    def __init__(self, count):
        self.base = debian("bookworm", "amd64", "systemd", "systemd-sysv", "dbus", "openssh-server", "sudo", "iproute2")
        self.folder = CACHE / f"shelf-{os.getpid()}"
        self.folder.mkdir()
        self.key = self.folder / "key"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
        run("ip", "netns", "add", LAB)
        run("ip", "-n", LAB, "link", "set", "lo", "up")
        run("ip", "-n", LAB, "link", "add", "bridge", "address", "02:00:00:00:00:01", "type", "bridge")
        run("ip", "-n", LAB, "address", "add", f"{ADDRESS}/24", "dev", "bridge")
        run("ip", "-n", LAB, "link", "set", "bridge", "up")
        self.devices = [Device(self, number) for number in range(1, count + 1)]

    def close(self):
        for device in self.devices:
            device.cut()
        run("ip", "netns", "del", LAB)
        shutil.rmtree(self.folder)


class Device:
    def __init__(self, shelf, number):
        self.shelf, self.name, self.address = shelf, f"dev{number}", f"{NET}.{100 + number}"
        self.namespace, self.mac = f"{LAB}-{self.name}", f"b8:27:eb:00:00:{number:02x}"
        self.folder = shelf.folder / self.name
        self.cgroup = CGROUPS / self.namespace
        self.boot = None
        for name in ("card", "root"):
            (self.folder / name).mkdir(parents=True)
        run("truncate", "-s", "8G", self.folder / "card.img")
        run("mkfs.ext4", "-q", self.folder / "card.img")
        run("mount", "-o", "loop", self.folder / "card.img", self.folder / "card")
        upper = self.folder / "card" / "upper"
        try:  # the user that Raspberry Pi's imager makes
            (self.folder / "card" / "work").mkdir()
            (upper / "etc" / "sudoers.d").mkdir(parents=True)
            (upper / "etc" / "sudoers.d" / "010_pi-nopasswd").write_text("pi ALL=(ALL) NOPASSWD: ALL\n")
            overlay = f"lowerdir={shelf.base},upperdir={upper},workdir={self.folder}/card/work"
            run("mount", "-t", "overlay", "overlay", "-o", overlay, self.folder / "root")
            run("chroot", self.folder / "root", "useradd", "--create-home", "--shell", "/bin/bash", "pi")
            ssh = self.folder / "root" / "home" / "pi" / ".ssh"
            ssh.mkdir(mode=0o700)
            shutil.copy(f"{shelf.key}.pub", ssh / "authorized_keys")
            run("chroot", self.folder / "root", "chown", "-R", "pi:", "/home/pi/.ssh")
        finally:
            subprocess.run(["umount", self.folder / "root"], stderr=subprocess.DEVNULL)
            run("umount", self.folder / "card")

    def up(self):
        """Power on."""
        self.cgroup.mkdir()
        run("ip", "netns", "add", self.namespace)
        veth = ["type", "veth", "peer", "name", "eth0", "address", self.mac, "netns", self.namespace]
        run("ip", "-n", LAB, "link", "add", self.name, *veth)
        run("ip", "-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            run("ip", "-n", self.namespace, "link", "set", link, "up")
        run("ip", "-n", LAB, "link", "set", self.name, "master", "bridge", "up")
        unshare = ["unshare", "--mount", "--propagation", "private", "bash", Path(__file__).with_name("boot.sh")]
        with open(self.folder / "console.log", "a") as log:
            self.boot = subprocess.Popen(
                [*unshare, self.folder, self.namespace, self.shelf.base],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ssh(self, command, check=True, timeout=60):
        """What `command` prints on the device."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=2"]
        done = subprocess.run(
            [
                *in_lab("ssh", "-i", self.shelf.key),
                *(f"-o{option}" for option in options),
                f"pi@{self.address}",
                command,
            ],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{self.name}: {command}: {done.stderr or done.stdout}"
        return done.stdout if done.returncode == 0 else None

    def wait(self, timeout=60):
        """Wait until it can be logged into."""
        until = time.monotonic() + timeout
        while self.ssh("true", check=False) is None:
            console = (self.folder / "console.log").read_text()[-2000:]
            assert time.monotonic() < until and self.boot.poll() is None, f"{self.name}: no ssh: {console}"
            time.sleep(0.2)

    def link(self, state):
        """Pull the network's plug ("down") or put it in ("up")."""
        run("ip", "-n", LAB, "link", "set", self.name, state)

    def cut(self):
        """Power off, at once."""
        if self.boot is None:
            return
        subprocess.run(["ip", "-n", LAB, "link", "del", self.name], stderr=subprocess.DEVNULL)
        (self.cgroup / "cgroup.freeze").write_text("1")
        with contextlib.suppress(FileNotFoundError):
            card = os.open(f"/proc/{self.boot.pid}/root{self.folder}/card", os.O_RDONLY)
            try:
                fcntl.ioctl(card, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH)
            finally:
                os.close(card)
        self.boot.kill()
        (self.cgroup / "cgroup.kill").write_text("1")
        self.boot.wait()
        until = time.monotonic() + 30
        while (
            "populated 0" not in (self.cgroup / "cgroup.events").read_text()
            or run("losetup", "--associated", self.folder / "card.img").stdout
        ):
            assert time.monotonic() < until, f"{self.name} does not end"
            time.sleep(0.05)
        for folder, _, _ in os.walk(self.cgroup, topdown=False):
            os.rmdir(folder)
        run("ip", "netns", "del", self.namespace)
        self.boot = None
