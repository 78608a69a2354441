"""A shelf on one Wi-Fi, for the bench "wifi" of bench.py: network namespaces on a bridge, and one bucket each way."""

import os
import shutil
import subprocess

RATE = "20mbit"
BUCKET = ["tbf", "rate", RATE, "burst", "32kb", "latency", "300ms"]


def why_not():
    """Why there can be no such shelf here, or None."""
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"there is no {missing[0]} here"
    return None if os.geteuid() == 0 else "it needs root, for network namespaces"


def run(*command):
    subprocess.run(command, check=True, capture_output=True, timeout=20)


class Wifi:
    """The namespaces of a server and of `count` clients. A context manager: at its end they are gone."""

    address = "10.254.1.250"

    def __init__(self, count):
        self.air, self.server = f"fl-air-{os.getpid()}", f"fl-server-{os.getpid()}"
        self.clients = [f"fl-client-{os.getpid()}-{number}" for number in range(count)]

    def __enter__(self):
        try:
            run("ip", "netns", "add", self.air)
            run("ip", "-n", self.air, "link", "add", "bridge", "up", "type", "bridge")
            for number, name in enumerate([self.server, *self.clients]):
                run("ip", "netns", "add", name)
                pair = ["type", "veth", "peer", "name", "wlan", "netns", name]
                run("ip", "-n", self.air, "link", "add", f"air{number}", "master", "bridge", "up", *pair)
                address = self.address if number == 0 else f"10.254.1.{number}"
                run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "wlan")
                for device in ("lo", "wlan"):
                    run("ip", "-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in (self.air, self.server, *self.clients):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def limit(self):
        """Put a bucket on both ends of the server's link."""
        for name, device in ((self.server, "wlan"), (self.air, "air0")):
            run("tc", "-n", name, "qdisc", "add", "dev", device, "root", *BUCKET)

    def unlimit(self):
        for name, device in ((self.server, "wlan"), (self.air, "air0")):
            run("tc", "-n", name, "qdisc", "delete", "dev", device, "root")
