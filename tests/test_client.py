"""What the client does on its own: hanging up, a server that ends the connection, a disk that is full."""

import os
import socket
import subprocess
import sys

from libs import VERSION, UserError
from plumbing.device import connection
from plumbing.device.task import Task

import pytest
import torch
from flwr.common import GetPropertiesIns, serde
from flwr.proto.transport_pb2 import ServerMessage
from helpers import ROOT

import client
import nets
from nets import LeNet5


@pytest.fixture
def trainer(tmp_path):
    """A client with four random images, which saves to a folder that can be taken away."""
    images, labels = torch.rand(4, 1, 32, 32), torch.tensor([0, 1, 0, 1])

    class Loader(list):
        dataset = labels

    loaders = {"fit": Loader([(images, labels)]), "eval": Loader([(images, labels)])}
    task = Task(LeNet5(1, 2), loaders, nets=nets.NETS, build_net=nets.build_net)
    return client.Client(task, save_ckp_path=tmp_path / "client_0.ptl")


def test_hanging_up_ends_the_connections_to_that_port_alone_and_leaks_nothing():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        near = socket.create_connection(server.getsockname())
        bystander = socket.create_connection(other.getsockname())
        far, _ = server.accept()
        far_bystander, _ = other.accept()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            connection.hang_up(server.getsockname()[1])
        assert len(os.listdir("/proc/self/fd")) == before
        far.settimeout(5)
        assert far.recv(1) == b""
        bystander.sendall(b"x")
        assert far_bystander.recv(1) == b"x"
        for sock in (near, bystander, far, far_bystander):
            sock.close()


class Server:
    """A server that sends the messages `questions`, and then ends the connection."""

    def __init__(self, channel, questions):
        self.questions = questions

    def Join(self, answers):
        yield from self.questions


def get_properties(config):
    return ServerMessage(get_properties_ins=serde.get_properties_ins_to_proto(GetPropertiesIns(config)))


@pytest.mark.parametrize("version, added", [
    ({}, f" (this client runs FL-IoT {VERSION}, the server before 1.1.0: update the older one)"),
    ({"version": "9.9"}, ""),  # such a server says it itself
])  # fmt: skip
def test_client_that_is_turned_away_names_the_version_of_a_server_that_does_not(trainer, monkeypatch, version, added):
    monkeypatch.setattr(connection, "FlowerServiceStub", lambda channel: Server(channel, questions))
    questions = [
        get_properties({"nonce": "a", **version}),
        get_properties({"turned_away": "its net is None, the server's is LeNet5"}),
    ]
    with pytest.raises(UserError) as ended:
        connection.Connection(trainer, "127.0.0.1", 1).serve()
    assert str(ended.value).endswith("its net is None, the server's is LeNet5" + added)
    assert VERSION in client.describe_client(0, "Tiny", "d")["net"]  # which the first servers show


def test_server_that_ends_the_connection_in_good_order_is_looked_for_again(trainer, monkeypatch, capsys):
    monkeypatch.setattr(connection, "probe", lambda *args: None)
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: None)
    ends = iter([[], [ServerMessage(reconnect_ins=ServerMessage.ReconnectIns())]])  # first without a goodbye
    monkeypatch.setattr(connection, "FlowerServiceStub", lambda channel: Server(channel, next(ends)))
    monkeypatch.setattr(connection.Connection, "watch_silence", lambda self: None)
    assert connection.stay_connected(connection.Connection(trainer, "127.0.0.1", 1), 60) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["lost the server at 127.0.0.1:1; trying again", "training is over"]


def test_a_net_that_cannot_be_run_here_is_told_to_the_server(trainer, monkeypatch):
    class Broken(LeNet5):
        def forward(self, images):
            return super().forward(images), images

    monkeypatch.setitem(nets.NETS, "Broken", Broken)

    class Shard(list):
        images = torch.rand(4, 1, 32, 32)

    for loader in trainer.task.loaders.values():
        loader.dataset = Shard(range(4))
    trainer.task.about.update(classes=["ant", "bee"], dataset_id=None)
    answer = trainer.get_properties({"net": "Broken"})
    assert answer["error"].startswith("net Broken cannot be used: it returns tuple") and "trial" not in answer


def test_round_does_not_depend_on_the_disk_of_the_device(trainer, capsys):
    trainer.save_ckp_path.parent.rmdir()
    parameters, num_examples, metrics = trainer.fit(trainer.get_parameters({}), {"round": 1})
    assert len(parameters) == 20 and num_examples == 4 and metrics["fit_loss"] > 0
    assert "cannot save" in capsys.readouterr().out


@pytest.mark.parametrize("before, after", [("gc.enable()", "True"), ("gc.disable()", "False")])
def test_garbage_is_collected_again_after_the_imports(before, after):
    code = f"import gc; {before}; from libs import torch; print(gc.isenabled(), gc.get_freeze_count() > 10**5)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [after, "True"], done.stderr


@pytest.mark.parametrize("script", ["partition.py", "sweep.py"])
def test_torch_is_there_for_whoever_asks_whatever_the_name_of_the_script(script):
    code = f"""import sys; sys.argv = [{script!r}]; import libs, partition; print("torch" in sys.modules)
from libs import nn, torch; print(nn is torch.nn is libs.nn, hasattr(libs, "pytorch"))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "True", "False"], done.stderr


def test_mistyped_address_is_said(trainer):
    with pytest.raises(UserError, match="192.168.1..10"):
        connection.probe("192.168.1..10", 8080, None)
