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
    assert "turned away cid unknown: it runs FL-IoT before 1.2.0 (make deploy), or is not" in met["server"].out
    assert met["plain"].popen.returncode != 0 and "got parameters" not in met["plain"].out


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
    """A bare gRPC client that keeps all it is asked in `asked`, and answers with the fields `answer(kind, question)`.

    It ends when the server hangs up, or asks for training.
    """

    def __init__(self, port, answer):
        super().__init__(daemon=True)
        self.port, self.answer, self.asked = port, answer, []
        self.start()

    def run(self):
        from plumbing.common import frames

        import grpc

        answers = queue.Queue()
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel, contextlib.suppress(grpc.RpcError):
            stream = channel.stream_stream(frames.METHOD)(iter(answers.get, None), timeout=30)
            for frame in stream:
                question, _ = frames.decode(frame)
                kind = question["kind"]
                self.asked.append((kind, set(question) - {"kind", "arrays"}))
                if kind in ("fit", "ping"):
                    return
                fields, arrays = ({}, []) if kind == "goodbye" else self.answer(kind, question)
                answers.put(frames.encode(kind, fields, arrays))

    def all_asked(self):
        self.join(40)
        assert not self.is_alive()
        return self.asked


WHO = {"cid": 0, "dataset": "Tiny", "device_id": "0" * 32}


def proof(secret, question, nonce, about, channel=""):
    """A device's proof, written out: HMAC-SHA-256 over a list of texts in JSON."""
    texts = ["client", question["nonce"], nonce, channel, json.dumps(about, sort_keys=True)]
    return hmac.new(secret, json.dumps(texts).encode(), hashlib.sha256).hexdigest()


def hello(about, **fields):
    from plumbing import VERSION
    from plumbing.common.frames import FRAMES

    return {"version": VERSION, "frames": FRAMES, "nonce": "1" * 32, "about": about, **fields}, []


def ready(dataset_id):
    """What a right client says of its net and its shard."""
    from plumbing.common.compare import fingerprint, trial

    from nets import LeNet5

    about = {"channels": 3, "num_classes": 10, "dataset_id": dataset_id, "num_fit": 160, "num_eval": 40}
    return {"about": {**about, "fingerprint": fingerprint(LeNet5(3, 10))}}, [trial(LeNet5(3, 10)).tobytes()]


@pytest.fixture(scope="module")
def guarded(open_suite):
    """A server with a secret, strangers who try to get in, and the one client that may."""
    laptop, device, other = open_suite("guarded"), open_suite("device"), open_suite("other")
    device.port = other.port = laptop.port
    files = {}
    for name, content, mode in (
        ("right", "tell nobody, not even me\n", 0o600),
        ("wrong", "tell nobody, not even you", 0o600),
        ("open", "x" * 20, 0o644),
    ):
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

    nonces, dataset_id = [], json.loads((laptop.root / "datasets/Tiny/dataset.json").read_text())["id"]
    rude_name = {"cid": "\x1b[2J" + 900 * "!", "board": "\x1b[2J"}
    first = {}  # the question, and the proof, of the one that is overheard

    def of(about, said=WHO, secret=b"tell nobody, not even me"):
        def answer(kind, question):
            if kind == "task":
                return ready(dataset_id)
            nonces.append(question["nonce"])
            return hello(about, proof=first.setdefault("proof", proof(secret, question, "1" * 32, said)))

        return answer

    def fresh(*args):
        first.clear()
        return Stranger(laptop.port, of(*args)).all_asked()

    guarded["strangers"] = {
        "nothing": Stranger(laptop.port, lambda kind, question: hello({})).all_asked(),
        "rude": Stranger(laptop.port, lambda kind, question: hello(rude_name, proof="0" * 64)).all_asked(),
        "of another cid": fresh(WHO, {**WHO, "cid": 1}),
        "another secret": fresh(WHO, WHO, b"tell nobody, not even you"),
    }
    for process in (guarded["missing"], guarded["wrong"]):
        process.wait_for("its secret is not the server's" if process is guarded["wrong"] else "turned this client away")
    guarded["strangers let in"] = lines(server, "joined")
    guarded["right proof"] = fresh(WHO)
    server.wait_for("cid 0 left")
    guarded["strangers"]["replayed"] = Stranger(laptop.port, of(WHO)).all_asked()
    guarded["nonces"] = nonces
    guarded["client"] = device.client(0, "--dataset", "Tiny", "--secret_file", files["right"])
    guarded["exits"] = [server.wait(), guarded["client"].wait()]
    guarded["rows"] = pd.read_csv(laptop.ckps("Tiny") / "history.csv")
    return guarded


def test_client_that_knows_the_secret_trains(guarded):
    assert guarded["exits"] == [0, 0] and list(guarded["rows"]["clients"]) == [1]
    (line,) = lines(guarded["server"], "warning")  # 0.0.0.0, with a secret and without TLS
    assert "--certificates" in line


def test_proof_is_hmac_sha_256_over_both_nonces_and_all_that_a_device_says_of_itself(guarded):
    assert [kind for kind, _ in guarded["right proof"]] == ["hello", "task", "fit"]


def test_client_without_a_secret_is_turned_away(guarded):
    reason = "the server asks for a secret: start the client with --secret_file"
    assert one_line(guarded["missing"]) == f"client.py: the server turned this client away: {reason}"
    assert lines(guarded["server"], reason) and guarded["strangers let in"] == []


def test_client_with_another_secret_does_not_obey_the_server_and_says_so(guarded):
    """To it, the server is one that does not know the secret: anybody may send it away with any reason."""
    (said,) = lines(
        guarded["wrong"], "does not prove that it knows the secret (it says: its secret is not the server's"
    )
    assert said.endswith("trying again") and guarded["wrong"].popen.poll() is None
    assert lines(guarded["server"], "its secret is not the server's") and "connected" not in guarded["wrong"].out


@pytest.mark.parametrize("who", ["nothing", "rude", "of another cid", "another secret", "replayed"])
def test_stranger_gets_a_nonce_with_the_version_and_a_reason_and_nothing_else(guarded, who):
    asked = [("hello", {"version", "frames", "nonce"}), ("goodbye", {"why", "text"})]
    assert guarded["strangers"][who] == asked


def test_nonces_are_fresh(guarded):
    nonces = guarded["nonces"]
    assert len(set(nonces)) == len(nonces) >= 4 and all(len(nonce) >= 32 for nonce in nonces)


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
