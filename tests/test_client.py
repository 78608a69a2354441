"""What the client does on its own: hanging up, a server that ends the connection, a disk that is full."""

import subprocess
import sys
import time

from libs import UserError
from plumbing.device import connection, probe
from plumbing.device.connection import Connection, Session
from plumbing.device.task import Task

import pytest
import torch
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


@pytest.mark.parametrize("goodbye, end", [
    (("over", ""), None), (("stopped", "later"), "later"), (("?", "\n"), ""), (None, "lost the server at 127.0.0.1:1")
])  # fmt: skip
def test_what_a_server_says_at_the_end_is_what_the_client_does(trainer, goodbye, end):
    session = Session(trainer)
    session.end = goodbye
    assert Connection(trainer, "127.0.0.1", 1).judge_end(session, "lost the server at 127.0.0.1:1") == end


def test_server_that_ends_the_connection_in_good_order_is_looked_for_again(trainer, monkeypatch, capsys):
    monkeypatch.setattr(connection, "probe", lambda *args: None)
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: None)
    ends = iter(["lost the server", None])
    monkeypatch.setattr(Connection, "serve", lambda self: next(ends))
    assert connection.start_client(server_address="127.0.0.1:1", client=trainer, max_wait_time=60) == 0
    assert capsys.readouterr().out.splitlines() == ["lost the server; trying again", "training is over"]


def test_time_without_a_server_is_no_waiting(trainer, monkeypatch):
    trainer.answered = time.monotonic() - 40
    monkeypatch.setattr(trainer, "get_properties", lambda config: {})
    Session(trainer).on_task({"ticket": "t"}, ())
    assert trainer.measure_wait() == {} and trainer.waited == 0.0
    trainer.fit(trainer.get_parameters({}), {"round": 1})
    assert 0 <= trainer.measure_wait()["wait_seconds"] < 20


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
        probe.probe("192.168.1..10", 8080, None)
