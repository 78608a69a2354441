"""Who takes part on Flower's engines: laptop/nodes, with SuperNodes that answer as a test wants."""

import time
from types import SimpleNamespace

from plumbing.common.compare import fingerprint, trial
from plumbing.laptop import nodes as room

import pytest
from flwr.common import Code, GetPropertiesRes, Status
from flwr.server.client_proxy import ClientProxy
from helpers import wait_until

from nets import build_net

NET = ("LeNet5", 1, 2)
TASK = {"dataset": "Tiny", "dataset_id": "5" * 32, "net": NET[0], "channels": NET[1], "num_classes": NET[2]}
TASK.update(fingerprint=fingerprint(build_net(*NET)), trial=trial(build_net(*NET)))


class SuperNode(ClientProxy):
    """Flower's proxy of a SuperNode with cid 0, which has the cut of the data `dataset_id`."""

    def __init__(self, node_id, dataset_id=TASK["dataset_id"]):
        super().__init__(node_id)
        self.grid, self.asked = SimpleNamespace(), 0
        self.properties = {
            **{name: TASK[name] for name in ("dataset", "channels", "num_classes", "fingerprint")},
            **{"cid": 0, "device_id": "a", "num_fit": 4, "num_eval": 1, "dataset_id": dataset_id},
            "trial": TASK["trial"].tobytes(),
        }

    def get_properties(self, ins, timeout, group_id):
        self.asked += 1
        if isinstance(self.properties, Exception):
            raise self.properties
        return GetPropertiesRes(Status(Code.OK, ""), self.properties)

    fit = evaluate = get_parameters = reconnect = None


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.setattr(room, "ASK_AGAIN", 0.2)
    nodes = room.Nodes(1, TASK)
    yield nodes
    nodes.close({})


def test_a_supernode_that_is_late_takes_part_again_and_one_that_is_lost_does_not(nodes):
    proxy = SuperNode("7")
    nodes.register(proxy)
    wait_until("it has joined", lambda: set(nodes.clients) == {"0"}, 10)
    nodes.remove(nodes.clients["0"])  # as Server.ask does with one that has not answered in time
    assert set(nodes.clients) == {"0"} and nodes.clients["0"].is_alive()
    nodes.unregister(proxy)
    assert not nodes.clients


def test_a_supernode_that_is_started_again_is_the_one_that_is_asked(nodes, capsys):
    old, new = SuperNode("7", dataset_id="6" * 32), SuperNode("7")
    nodes.register(old)
    wait_until("it was turned away twice", lambda: old.asked == 2, 10)
    nodes.unregister(old)
    nodes.register(new)
    wait_until("it has joined", lambda: set(nodes.clients) == {"0"}, 10)
    old.properties = new.properties
    time.sleep(1)  # in which the old one would be asked again
    assert old.asked == 2 and nodes.clients["0"].proxy is new
    nodes.unregister(new)
    assert not nodes.clients
    out = capsys.readouterr().out
    assert out.count("turned away cid 0: its shard is not of the server's split of Tiny") == 1 and "is back" not in out


def test_a_supernode_that_cannot_answer_is_named_and_asked_again(nodes, capsys):
    proxy = SuperNode("7")
    answer, proxy.properties = proxy.properties, RuntimeError("no route")
    nodes.register(proxy)
    wait_until("it was asked twice", lambda: proxy.asked == 2, 10)
    proxy.properties = answer
    wait_until("it has joined", lambda: set(nodes.clients) == {"0"}, 10)
    assert capsys.readouterr().out.count("turned away cid unknown, of SuperNode 7: no route") == 1
