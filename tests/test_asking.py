"""Who is let in, and what a stranger learns: cids, datasets, nets, the secret, TLS, and what listens."""

import contextlib
import hashlib
import hmac
import json
import queue
import re
import shutil
import signal
import socket
import subprocess
import threading

import pandas as pd
import psutil
import pytest
from helpers import lines, new_suite, start_patched

NO_SUCH_NET = "script.NETS.clear()"
OTHER_SHAPES = """
import torch
class LeNet5(script.NETS["LeNet5"]):
    def __init__(self, *args):
        super().__init__(*args)
        self.layer3[2] = torch.nn.Linear(120, 84, bias=False)
script.NETS["LeNet5"] = LeNet5
"""
OTHER_POOLING = """
import torch
class LeNet5(script.NETS["LeNet5"]):
    def __init__(self, *args):
        super().__init__(*args)
        self.layer2[3] = torch.nn.AvgPool2d(2)
script.NETS["LeNet5"] = LeNet5
"""
PLAIN_FLOWER = """
import sys; sys.path[0] = {root!r}
import libs, numpy
from flwr.client import NumPyClient, start_client
class Plain(NumPyClient):
    def get_parameters(self, config): return [numpy.zeros(3)]
    def fit(self, parameters, config): print("got parameters"); return parameters, 1, {{}}
    def evaluate(self, parameters, config): print("got parameters"); return 0.0, 1, {{}}
start_client(server_address="127.0.0.1:{port}", client=Plain().to_client(), insecure=True)
"""


@pytest.fixture(scope="module")
def open_suite(tmp_path_factory, three_shards):
    """A function that gives a device (or laptop) of its own, with Tiny and the same under the name Other in place."""
    datasets = tmp_path_factory.mktemp("datasets")
    for name in ("Tiny", "Other"):
        (datasets / name).symlink_to(three_shards / "Tiny")
    with contextlib.ExitStack() as stack:

        def open_one(name, port=None):
            suite = new_suite(tmp_path_factory.mktemp(name), datasets)
            suite.port = port or suite.port
            stack.callback(suite.close)
            return suite

        yield open_one


def make_certificates(suite, address):
    subprocess.run([suite.root / "deploy" / "make_certificates.sh", address], check=True, timeout=60)
    return suite.root / "certificates"


@pytest.fixture(scope="module")
def certificates(open_suite):
    """A folder of certificates for 127.0.0.1."""
    return make_certificates(open_suite("authority"), "127.0.0.1")


def one_line(process):
    """What a refused client says on stderr; fails unless it ended with exit code 2 and this one line."""
    assert process.wait(120) == 2, process
    (line,) = process.err.splitlines()
    assert line.startswith("client.py: ") and "UNAVAILABLE" not in line
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Under which cid, with what.


@pytest.fixture(scope="module")
def met(open_suite, certificates):
    """A server for two clients without a secret, which many that do not belong there want to join."""
    laptop = open_suite("laptop")
    port = laptop.port
    first, copy, no_net, other_shapes, other_pooling, rebooted = (
        open_suite(name, port) for name in ("first", "copy", "no_net", "other_shapes", "other_pooling", "rebooted")
    )
    laptop.server("--server_address", "0.0.0.0", "--dataset", "Tiny", "--num_clients", 2)
    (server,) = laptop.processes
    original = first.client(0, "--dataset", "Tiny")
    server.wait_for("cid 0 joined (1 of 2 clients)", timeout=120)
    refused = {
        "in use": copy.client(0, "--dataset", "Tiny"),
        "same process": first.client(0, "--dataset", "Tiny"),
        "dataset": copy.client(1, "--dataset", "Other"),
        "beyond": copy.client(2, "--dataset", "Tiny"),
        "net": start_patched(no_net, "client", NO_SUCH_NET, "--cid", 1),
        "fingerprint": start_patched(other_shapes, "client", OTHER_SHAPES, "--cid", 1),
        "pooling": start_patched(other_pooling, "client", OTHER_POOLING, "--cid", 1),
        "TLS": no_net.client(2, "--dataset", "Tiny", "--root_certificate", certificates / "ca.pem"),
    }
    plain = laptop.start("-c", PLAIN_FLOWER.format(root=str(laptop.root), port=port))
    for process in (plain, *refused.values()):
        process.wait(120)
    met = {"server": server, "refused": refused, "plain": plain, "original": original, "port": port}

    # The device loses its power and starts again, while its connection still seems to be there.
    original.send(signal.SIGSTOP)
    rebooted.ckps("Tiny").mkdir(parents=True)
    shutil.copy(first.ckps("Tiny") / "client_0.id", rebooted.ckps("Tiny"))
    back = rebooted.client(0, "--dataset", "Tiny")
    server.wait_for("cid 0 is back (1 of 2 clients)")
    original.kill()
    back.wait_for("connected to the server")
    # Its process is killed, and started again.
    back.kill()
    met["again"] = rebooted.client(0, "--dataset", "Tiny")
    met["again"].wait_for("connected to the server")
    server.wait_for("cid 0 joined", timeout=120, count=2)
    return met


@pytest.mark.parametrize(
    "who, reason",
    [
        ("in use", "cid 0 is in use by another device"),
        ("dataset", "its dataset is Other, the server's is Tiny"),
        ("beyond", "cid 2 is not in 0..1 (server's --num_clients 2)"),
        ("net", "its nets.py has no net LeNet5"),
        ("fingerprint", "its fingerprint is "),
        ("pooling", "its LeNet5 computes something else than the server's: nets.py differs"),
    ],
)
def test_client_that_does_not_fit_is_turned_away_with_its_reason(met, who, reason):
    line = one_line(met["refused"][who])
    assert line.startswith(f"client.py: the server turned this client away: {reason}")
    shown = line.split("away: ")[1]
    assert lines(met["server"], f": {shown}"), met["server"]
    assert "fit_loss" not in met["refused"][who].out


def test_second_process_for_a_cid_on_a_device_ends_at_its_start(met):
    line = one_line(met["refused"]["same process"])
    assert line == "client.py: a client with --cid 0 is already running on this device"
    assert "connected" not in met["refused"]["same process"].out


def test_tls_client_at_a_plain_server_is_told_so(met):
    assert one_line(met["refused"]["TLS"]).endswith("does not speak TLS: leave out --root_certificate")


def test_plain_flower_client_is_turned_away(met):
    assert "turned away cid unknown: it is not this suite's client.py" in met["server"].out
    assert met["plain"].popen.returncode == 0 and "got parameters" not in met["plain"].out


def test_device_replaces_its_own_dead_predecessor(met):
    assert len(lines(met["server"], "cid 0 is back")) == 1  # the frozen one
    assert met["again"].popen.poll() is None and "trying again" not in met["again"].out


def test_server_goes_on_after_all_that(met):
    assert met["server"].popen.poll() is None and met["server"].err == ""
    assert "round 1/" not in met["server"].out and "Traceback" not in met["server"].out


def test_open_server_without_secret_warns_in_one_line(met):
    (line,) = lines(met["server"], "warning")
    assert f"0.0.0.0:{met['port']}" in line and "--secret_file" in line


def sockets(process):
    """Of a process and its children: the addresses that listen, and those at the far end."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    found = [connection for member in tree for connection in member.net_connections()]
    listening = [connection.laddr for connection in found if connection.status == psutil.CONN_LISTEN]
    far = [connection.raddr for connection in found if connection.raddr]
    return {(ip.replace("::ffff:", ""), port) for ip, port in listening}, {ip.replace("::ffff:", "") for ip, _ in far}


def test_nothing_listens_but_what_was_asked_for(met):
    assert sockets(met["again"]) == (set(), {"127.0.0.1"})
    listening, far = sockets(met["server"])
    everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # gRPC takes IPv6 along where it is there
    assert listening == {(everywhere, met["port"])}
    assert far == {"127.0.0.1"}


@pytest.mark.parametrize("script", ["client", "server"])
def test_flower_sends_telemetry_only_where_the_user_wants_it(suite, script):
    code = f"import sys; sys.path[0] = {str(suite.root)!r}; import {script}\n"
    code += "from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    off = suite.start("-c", code, real=True)
    on = suite.start("-c", code, env={"FLWR_TELEMETRY_ENABLED": "1"})
    assert (off.wait(), on.wait()) == (0, 0)
    assert (off.out, on.out) == ("0\n", "1\n")


# ---------------------------------------------------------------------------------------------------------------------
# The secret.


class Stranger(threading.Thread):
    """A bare gRPC client that keeps all it is asked in `asked`, and answers properties with `answer(config)`.

    It ends when the server hangs up, or asks for training.
    """

    def __init__(self, port, answer):
        super().__init__(daemon=True)
        self.port, self.answer, self.asked = port, answer, []
        self.start()

    def run(self):
        import libs  # noqa: F401 (it silences gRPC before its import)

        import grpc
        from flwr.common.serde import scalar_to_proto
        from flwr.proto.transport_pb2 import ClientMessage
        from flwr.proto.transport_pb2_grpc import FlowerServiceStub

        answers = queue.Queue()
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel, contextlib.suppress(grpc.RpcError):
            for message in FlowerServiceStub(channel).Join(iter(answers.get, None), timeout=30):
                kind = message.WhichOneof("msg")
                config = {name: scalar.string for name, scalar in message.get_properties_ins.config.items()}
                self.asked.append((kind, config))
                if kind not in ("get_properties_ins", "reconnect_ins"):
                    return
                answer = ClientMessage()
                if kind == "get_properties_ins":
                    for name, value in self.answer(config).items():
                        answer.get_properties_res.properties[name].CopyFrom(scalar_to_proto(value))
                    answer.get_properties_res.status.code = 0
                answers.put(answer)

    def all_asked(self):
        self.join(40)
        assert not self.is_alive()
        return self.asked


def properties(dataset_id, **others):
    """All that a right client says of itself, at once."""
    from plumbing.common.compare import fingerprint, trial

    from nets import LeNet5

    who = {"cid": 0, "dataset": "Tiny", "device_id": "0" * 32, "process": "0" * 16}
    dataset = {"channels": 3, "num_classes": 10, "dataset_id": dataset_id, "num_fit": 160, "num_eval": 40}
    net = {"fingerprint": fingerprint(LeNet5(3, 10)), "trial": trial(LeNet5(3, 10)).tobytes()}
    return {**who, **dataset, **net, **others}


def proof(secret, nonce, cid):
    return hmac.new(secret, f"{nonce} {cid}".encode(), hashlib.sha256).hexdigest()


@pytest.fixture(scope="module")
def guarded(open_suite):
    """A server with a secret, strangers who try to get in, and the one client that may."""
    laptop, device, other = open_suite("guarded"), open_suite("device"), open_suite("other")
    device.port = other.port = laptop.port
    files = {}
    for name, content, mode in (("right", "tell nobody\n", 0o600), ("wrong", "no idea", 0o600), ("open", "x", 0o644)):
        files[name] = laptop.root / name
        files[name].write_text(content)
        files[name].chmod(mode)
    rounds = ("--dataset", "Tiny", "--num_clients", 1, "--num_rounds", 1)
    server = laptop.server(*rounds, "--server_address", "0.0.0.0", "--secret_file", files["right"])
    guarded = {"server": server, "files": files, "open": [other.server(*rounds, "--secret_file", files["open"])]}
    guarded["open"].append(other.client(2, "--dataset", "Tiny", "--secret_file", files["open"]))
    guarded["missing"] = device.client(0, "--dataset", "Tiny")
    guarded["wrong"] = other.client(0, "--dataset", "Tiny", "--secret_file", files["wrong"])
    server.wait_for("waiting for 1 of 1 clients", timeout=120)

    nothing = Stranger(laptop.port, lambda config: {})
    rude = Stranger(laptop.port, lambda config: {"cid": "\x1b[2J" + 1000 * "!", "proof": "\x1b[2J"})
    nonces, dataset_id = [], json.loads((laptop.root / "datasets/Tiny/dataset.json").read_text())["id"]

    def overheard(config):
        nonces.append(config.get("nonce"))
        return properties(dataset_id, proof=proof(b"tell nobody", nonces[0], 0))

    def of_another_cid(config):
        return properties(dataset_id, proof=proof(b"tell nobody", config.get("nonce"), 1))

    def right(config):
        return properties(dataset_id, proof=proof(b"tell nobody", config.get("nonce"), 0))

    guarded["strangers"] = {"nothing": nothing.all_asked(), "rude": rude.all_asked()}
    guarded["strangers"]["of another cid"] = Stranger(laptop.port, of_another_cid).all_asked()
    for process in (guarded["missing"], guarded["wrong"]):
        process.wait()
    guarded["strangers let in"] = lines(server, "joined")
    guarded["first use of a nonce"] = Stranger(laptop.port, overheard).all_asked()
    server.wait_for("cid 0 left")
    guarded["strangers"]["replayed"] = Stranger(laptop.port, overheard).all_asked()
    guarded["nonces"] = nonces
    guarded["right proof"] = Stranger(laptop.port, right).all_asked()
    guarded["client"] = device.client(0, "--dataset", "Tiny", "--secret_file", files["right"])
    guarded["exits"] = [server.wait(), guarded["client"].wait()]
    guarded["rows"] = pd.read_csv(laptop.ckps("Tiny") / "history.csv")
    return guarded


def test_client_that_knows_the_secret_trains(guarded):
    assert guarded["exits"] == [0, 0] and list(guarded["rows"]["clients"]) == [1]
    assert not lines(guarded["server"], "warning")  # 0.0.0.0, but with a secret


def test_proof_is_hmac_sha_256_over_nonce_and_cid(guarded):
    for asked in (guarded["first use of a nonce"], guarded["right proof"]):
        assert asked[0][0] == "get_properties_ins" and "fit_ins" in [kind for kind, _ in asked]


@pytest.mark.parametrize(
    "who, reason",
    [
        ("missing", "the server asks for a secret: start the client with --secret_file"),
        ("wrong", "its secret is not the server's"),
    ],
)
def test_client_without_the_secret_is_turned_away(guarded, who, reason):
    assert one_line(guarded[who]) == f"client.py: the server turned this client away: {reason}"
    assert lines(guarded["server"], reason)
    assert guarded["strangers let in"] == []


@pytest.mark.parametrize("who", ["nothing", "rude", "of another cid", "replayed"])
def test_stranger_gets_a_nonce_with_the_version_and_a_reason_and_nothing_else(guarded, who):
    (first, nonce), (second, reason), (third, _) = guarded["strangers"][who]
    assert [first, second, third] == ["get_properties_ins", "get_properties_ins", "reconnect_ins"]
    assert set(nonce) == {"nonce", "version"} and set(reason) == {"turned_away"}


def test_nonces_are_fresh(guarded):
    nonces = [asked[0][1]["nonce"] for asked in guarded["strangers"].values()]
    assert len(set(nonces)) == len(nonces) and all(len(nonce) >= 32 for nonce in nonces)


def test_what_a_stranger_calls_itself_cannot_play_with_the_terminal(guarded):
    assert "\x1b" not in guarded["server"].out
    assert all(len(line) < 200 for line in lines(guarded["server"], "turned away"))


def test_secret_that_others_can_read_is_refused(guarded):
    for process in guarded["open"]:
        assert process.wait() == 2, process
        assert process.err.endswith(f"can be read by others: chmod 600 {guarded['files']['open']}\n")
        assert len(process.err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# TLS.


@pytest.fixture(scope="module")
def encrypted(open_suite, certificates):
    """A server with TLS, and clients with the right and with the wrong idea of it."""
    laptop, device, other = open_suite("encrypted"), open_suite("tls_device"), open_suite("tls_other")
    device.port = other.port = laptop.port
    server = laptop.server(
        *("--dataset", "Tiny", "--num_clients", 1, "--num_rounds", 1, "--certificates", certificates)
    )
    wrong = make_certificates(other, "127.0.0.1") / "ca.pem"
    no_certificate = other.root / "notes.txt"
    no_certificate.write_text("not a certificate")
    server.wait_for("waiting for 1 of 1 clients", timeout=120)
    listening = sockets(server)[0]
    right = certificates / "ca.pem"
    refused = {
        "authority": other.client(0, "--dataset", "Tiny", "--root_certificate", wrong),
        "plain": other.client(1, "--dataset", "Tiny"),
        "address": device.client(1, "--dataset", "Tiny", "--root_certificate", right, "--server_address", "localhost"),
        "file": other.client(2, "--dataset", "Tiny", "--root_certificate", no_certificate),
    }
    for process in refused.values():
        process.wait()
    client = device.client(0, "--dataset", "Tiny", "--root_certificate", right)
    exits = [server.wait(), client.wait()]
    return {"server": server, "refused": refused, "exits": exits, "laptop": laptop, "listening": listening}


def test_training_works_over_tls(encrypted):
    assert encrypted["exits"] == [0, 0] and encrypted["server"].err == ""
    assert len(pd.read_csv(encrypted["laptop"].ckps("Tiny") / "history.csv")) == 1


@pytest.mark.parametrize(
    "what, reason",
    [
        ("authority", "does not fit .*ca.pem: "),
        ("plain", "speaks TLS: give its ca.pem as --root_certificate"),
        ("address", "does not fit .*'localhost'"),
        ("file", "no certificate can be read from .*notes.txt"),
    ],
)
def test_wrong_idea_of_tls_is_named(encrypted, what, reason):
    assert re.search(reason, one_line(encrypted["refused"][what])), encrypted["refused"][what]
    assert "joined" not in encrypted["server"].out.split("cid 0 joined")[0]


def test_server_listens_on_loopback_alone_unless_told_otherwise(encrypted):
    assert encrypted["listening"] == {("127.0.0.1", encrypted["laptop"].port)}


def test_key_of_the_authority_is_for_its_owner_alone(certificates):
    for name in ("ca.key", "server.key"):
        assert (certificates / name).stat().st_mode & 0o077 == 0
