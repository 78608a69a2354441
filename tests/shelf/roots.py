"""Debian systems and wheels for the tests of the shelf: fetched once, kept in ~/.cache/fl-iot, and only read then."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fl-iot"
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
BINFMT = Path("/proc/sys/fs/binfmt_misc")


def tell(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def need(**packages):
    """Skip the test unless this is root on a machine with these commands: command=Debian's package of it."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes mounts, network namespaces and whole Debian systems")
    missing = sorted({package for command, package in packages.items() if not shutil.which(command.replace("_", "-"))})
    if missing:
        pytest.skip(f"needs: apt-get install --no-install-recommends {' '.join(missing)}")
    if subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs mount namespaces, which this machine does not allow")


def emulate_arm64():
    """Let this machine run ARM's programs, by qemu-user-static. What it registers stays registered."""
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], stderr=subprocess.DEVNULL)
    if not (BINFMT / "register").exists():
        pytest.skip("needs binfmt_misc, which this kernel does not have")
    if not (BINFMT / "qemu-aarch64").exists():
        line = Path("/usr/lib/binfmt.d/qemu-aarch64.conf").read_text().strip()
        (BINFMT / "register").write_text(line.rsplit(":", 2)[0] + ":/usr/bin/qemu-aarch64-static:OCF")


def fetch(name, command):
    """The folder CACHE/`name`, which command(folder) fills the first time; half of it is never taken for all of it."""
    folder = CACHE / name
    if not folder.exists():
        tell(f"making {folder}, once")
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command(part), check=True, stdout=subprocess.DEVNULL)
        part.rename(folder)
    return folder


def debian(suite, arch, *packages):
    """The folder of a Debian system with Python and these packages."""
    include = ",".join(["ca-certificates", "python3", "python3-venv", *packages])
    return fetch(
        f"roots/{'-'.join([suite, arch, *packages[:1]])}",
        lambda part: ["debootstrap", f"--arch={arch}", "--variant=minbase", f"--include={include}", suite, part],
    )


class Root:
    """A throwaway copy of a Debian system to run commands in, with this machine's network; `share` is its /mnt."""

    def __init__(self, base, folder, share):
        self.folder, self.root = folder, folder / "root"
        for name in ("root", "upper", "work"):
            (folder / name).mkdir(parents=True)
        mounts = f"""
            mount -t overlay overlay -o lowerdir={base},upperdir={folder}/upper,workdir={folder}/work {self.root}
            mount -t proc proc {self.root}/proc
            mount --rbind /sys {self.root}/sys
            mount --rbind /dev {self.root}/dev
            mount --bind {share} {self.root}/mnt
            cp /etc/resolv.conf /etc/hosts {self.root}/etc
            cp /{CERTIFICATES} {self.root}/{CERTIFICATES}
            echo ready; exec sleep infinity"""
        command = ["unshare", "--mount", "--propagation", "private", "bash", "-ec", mounts]
        self.holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # its mounts go when it goes
        assert self.holder.stdout.readline() == "ready\n"

    def command(self, *command, **env):
        """What to start for `command` to run inside, with the environment `env` and this machine's certificates."""
        certificates = {name: value for name, value in os.environ.items() if "CERT" in name or "CA_BUNDLE" in name}
        env = {"PATH": "/mnt/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", **certificates, **env}
        enter = ["nsenter", "--mount", "--target", str(self.holder.pid), "chroot", str(self.root), "env", "-i"]
        return [*enter, *(f"{name}={value}" for name, value in env.items()), *map(str, command)]

    def close(self):
        self.holder.kill()
        self.holder.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
