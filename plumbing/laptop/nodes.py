"""Flower's engines, the simulation and the deployment: who takes part, and all that differs from the scripts.

start         server.run_app and client.client_fn stand for the two main(); the loop of the rounds is the same, run by
              Flower's start_grid, and ended by its SystemExit instead of a signal
flags         come from the run's config (laptop/flags: app_settings); there are none for the connection, which is
              Flower's: no secret, no certificates, no --compress
handshake     one message that tells all (Nodes); the reasons to turn a client away are those of the scripts
messages      each names the net and the split of the data, and makes a new Client: it may meet a new process
deployment    a SuperNode's --node-config has its cid and the suite's folder; the device leaves the same files
simulation    a SuperNode's number is its cid, and the folder is the server's; its board is "simulated", and it leaves
              no file but the batch norm of --fedbn; there is no --round_timeout. deploy/simulate.py first splits the
              data, then starts Flower and Ray, with a client on each core at a time; it ends them at Ctrl-C
figures       there are no bytes_down, bytes_up and wait_seconds; sensors are those of the machine it runs on
"""

import contextlib
import threading
import time

from plumbing.common.process import printable
from plumbing.laptop.handshake import TurnedAway, check_client, name_task
from plumbing.laptop.registry import Clients
from plumbing.laptop.remote import ClientFailure
from plumbing.laptop.stream import LOST

from flwr.common import GetPropertiesIns
from flwr.server.compat.app import start_grid as start_grid  # not public: only this module knows where it is

ASK_AGAIN = 30  # seconds until a SuperNode that was turned away is asked again
TURNS = 64  # SuperNodes of a simulation that are asked at a time: more than there are cores, which do the work
NODE_TIMEOUT = 600  # seconds for a SuperNode to answer: a new process on a busy board, and what waits before it


class Node:
    """A SuperNode of Flower's engines under its own cid, like a remote.RemoteClient.

    proxy: Flower's.
    turn: a lock that it shares with others, held while it is asked.
    """

    def __init__(self, proxy, properties, turn):
        self.cid, self.proxy, self.properties = str(properties["cid"]), proxy, properties
        self.turn, self.gone = turn, threading.Event()

    def ask(self, method, ins, timeout):
        started = time.monotonic()
        try:
            with self.turn:
                return getattr(self.proxy, method)(ins, timeout, None)
        except ValueError as error:  # Flower's for all that went wrong on the way or in the app's process
            if timeout is not None and time.monotonic() - started >= timeout:
                raise ClientFailure(self.cid, f"no answer within {timeout:g} s") from None
            raise ClientFailure(self.cid, LOST if "navailable" in str(error) else printable(error)) from None

    def is_alive(self):
        return not self.gone.is_set()

    def close(self):
        self.gone.set()


class Nodes(Clients):
    """The SuperNodes that take part, by cid. Flower registers each; the handshake decides on it.

    One that is turned away is asked again later: the fault on its device may be mended.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.turns = threading.Semaphore(TURNS)
        self.connections = {}  # Flower's proxies by their ids, admitted or not

    def register(self, proxy):
        self.connections[proxy.cid] = proxy
        threading.Thread(target=self._look_after, args=(proxy,), name=f"client {proxy.cid[:8]}", daemon=True).start()
        return True

    def unregister(self, proxy):
        if self.connections.get(proxy.cid) is proxy:
            del self.connections[proxy.cid]
        super().unregister(proxy)

    def _look_after(self, proxy):
        # A simulation polls ten times a second for each answer; a thousand such threads would leave no core to train.
        turn = self.turns if hasattr(proxy.grid, "pull_interval") else contextlib.nullcontext()
        said = None
        while self.connections.get(proxy.cid) is proxy and not self.closed:  # after a restart it is another one
            try:
                with turn:
                    properties = self._ask(proxy)
                if self._admit(Node(proxy, properties, turn)):
                    return
            except TurnedAway as reason:
                if reason.cid == "unknown":
                    reason.cid = f"unknown, of SuperNode {proxy.cid}"
                if str(reason) != said and self._say_reason(reason):
                    said = str(reason)
            time.sleep(ASK_AGAIN)

    def _ask(self, proxy):
        """Have the handshake with a SuperNode in one message, which tells all: the next may meet a new process."""
        question = GetPropertiesIns(name_task(self.task["net"], self.task["dataset_id"]))
        try:
            answer = proxy.get_properties(question, NODE_TIMEOUT, None).properties
        except Exception as error:  # in the app on the device, or on the way there
            raise TurnedAway(printable(error)) from None
        check_client(answer, self.num_clients, self.task)
        return answer

    def _is_gone(self, client):
        return self.connections.get(client.proxy.cid) is not client.proxy

    def remove(self, client):
        """Drop a client that Flower has lost. One that is only late is asked again: nobody would register it again."""
        if self._is_gone(client):
            super().remove(client)

    def wait_for_round(self, min_clients, check):
        self.num_available()  # has Flower look at once who is there
        super().wait_for_round(min_clients, check)

    def close(self, notice):
        """Admit nobody any more. There is nobody to tell: each message is answered by itself."""
        self.closed = True
