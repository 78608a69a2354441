"""What users give as the server's address: taken apart, or refused at once."""

from libs import UserError
from plumbing.common.arguments import split_address

import pytest


@pytest.mark.parametrize(
    "given, port, host_and_port",
    [
        ("192.168.1.10", None, ("192.168.1.10", 8080)),
        ("192.168.1.10", 9000, ("192.168.1.10", 9000)),
        ("192.168.1.10:9000", None, ("192.168.1.10", 9000)),
        ("192.168.1.10:9000", 9000, ("192.168.1.10", 9000)),
        ("laptop.local:9000", None, ("laptop.local", 9000)),
        ("http://laptop", None, ("laptop", 8080)),
        ("https://laptop.local:8080/", None, ("laptop.local", 8080)),
        ("grpc://10.0.0.7", None, ("10.0.0.7", 8080)),
        (" laptop ", None, ("laptop", 8080)),
        ("my_laptop-2.fritz.box.", None, ("my_laptop-2.fritz.box.", 8080)),
        ("::1", None, ("::1", 8080)),
        ("[::1]", None, ("::1", 8080)),
        ("[::1]:9000", None, ("::1", 9000)),
        ("http://[2001:db8::7]:9000/", None, ("2001:db8::7", 9000)),
        ("fe80::1%eth0", None, ("fe80::1%eth0", 8080)),
        ("[fe80::1%wlan0]:9000", None, ("fe80::1%wlan0", 9000)),
    ],
)
def test_address_is_taken_apart(given, port, host_and_port):
    assert split_address(given, port) == host_and_port


@pytest.mark.parametrize(
    "given, port, reason",
    [
        ("", None, "neither a name nor an IP address"),
        ("192.168.1.300", None, "neither a name nor an IP address"),
        ("192.168.1", None, "neither a name nor an IP address"),
        ("192.168.1..10", None, "neither a name nor an IP address"),
        ("10.0.0.7%eth0", None, "neither a name nor an IP address"),
        ("pi@laptop", None, "neither a name nor an IP address"),
        ("my laptop", None, "neither a name nor an IP address"),
        ("laptop/fl", None, "neither a name nor an IP address"),
        ("[laptop]", None, "neither a name nor an IP address"),
        ("[::1", None, "neither a name nor an IP address"),
        ("[::1]9000", None, "neither a name nor an IP address"),
        ("laptop:8080:8080", None, "neither a name nor an IP address"),
        ("-laptop", None, "neither a name nor an IP address"),
        ("laptop:", None, "not a number from 1 to 65535"),
        ("laptop:http", None, "not a number from 1 to 65535"),
        ("laptop:0", None, "not a number from 1 to 65535"),
        ("laptop:65536", None, "not a number from 1 to 65535"),
        ("laptop:8080", 8081, "name two ports"),
        ("fe80::1", None, "needs the network card, as in fe80::1%eth0"),
    ],
)
def test_what_can_never_be_reached_is_refused_at_once(given, port, reason):
    with pytest.raises(UserError, match=reason):
        split_address(given, port)


def test_address_with_its_port_trains(tiny):
    server = tiny.server("--dataset", "Tiny", "--num_clients", 1, "--num_rounds", 1)
    address = ("--server_address", f"http://127.0.0.1:{tiny.port}")
    device = tiny.start("client.py", "--dataset", "Tiny", "--cid", 0, "--num_threads", 1, *address)
    assert (server.wait(), device.wait()) == (0, 0)


def test_refused_address_is_one_line(tiny):
    device = tiny.run("client.py", "--dataset", "Tiny", "--cid", 0, "--server_address", "pi@laptop")
    assert device.popen.returncode == 2 and device.out == ""
    assert device.err == "client.py: --server_address pi@laptop is neither a name nor an IP address\n"
