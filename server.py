"""Train one model over the data of many devices, by federated averaging.

    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100
    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100 --resume

Waits for the clients, has all of them train at the same time in every round, averages what they send and tests the
result. Leaves server.ptl, best.ptl, history.csv and metrics.png in ckps/<dataset>/, and the curves in Weights & Biases.
"""

import errno
import functools
import hmac
import inspect
import ipaddress
import os
import queue
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
from pathlib import Path

from libs import (
    CKPS,
    DATASETS,
    KEEPALIVE,
    UserError,
    join_address,
    keep_alive,
    lock_file,
    mute_handlers,
    new_parser,
    np,
    number,
    on_signal,
    plain_args,
    printable,
    prove,
    quiet_flower,
    read_secret,
    run_script,
    say,
    split_address,
    tcp_sockets,
    torch,
)

import flwr.server
from flwr.common import Code, GetPropertiesIns, ReconnectIns
from flwr.server import ServerConfig, SimpleClientManager, start_server
from flwr.server.client_proxy import ClientProxy
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed

from data import describe_in_checkpoint, load_test
from engines import client_fit_fn
from nets import build_net, find_net, fingerprint, same_trial, trial
from record import Curves, Progress, Record, move_aside, resume, show_files, start_wandb
from strategies import STRATEGIES, FedAvg

HEARTBEAT = 20  # seconds between two words to a client that has nothing to do
BUSY = KEEPALIVE  # seconds after which the connection of a client that is busy has shown that it is alive
HANDSHAKE_TIMEOUT = 10  # seconds
READY_TIMEOUT = 120  # seconds for a client to read its shard anew, if it has to
MALFORMED = (TypeError, ValueError)  # what Flower raises on an answer that is none
SETTLE = 10  # seconds without a new client until a round starts with fewer than all
POLL = 0.5  # seconds until a signal or a failed worker is noticed while waiting
MAX_RETRY_DELAY = 30  # seconds until a round in which nobody trained is run again


def parse_args():
    parser = new_parser(__doc__)
    positive = number(float, 0, inside=True)
    parser.add_argument("--server_address", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all networks")
    parser.add_argument("--server_port", type=number(int, 1, 65535), help="port to listen on (default: 8080)")
    parser.add_argument(
        "--num_clients", type=number(int, 1), help="number of clients, with cids from 0 (default: as many as shards)"
    )
    parser.add_argument("--num_rounds", type=number(int, 1), default=100, help="number of the last round")
    parser.add_argument("--num_epochs", type=number(int, 1), default=1, help="epochs that a client trains in a round")
    parser.add_argument("--lr", type=positive, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), help="make the run one that can be repeated")
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default=FedAvg.__name__,
        help="how n results become one model: FedAvg takes their mean, weighted by images; the others withstand liars: "
        "FedMedian takes the median, FedTrimmedAvg the mean without n/5 values at each end (from n = 3 on at least 1), "
        "Krum the mean without the (n-3)/2 models (at least 1) that are farthest from the others",
    )
    parser.add_argument("--min_clients", type=number(int, 1), help="start rounds with this many (default: num_clients)")
    parser.add_argument("--round_timeout", type=positive, help="seconds until stragglers are left out (default: off)")
    parser.add_argument("--resume", action="store_true", help="go on from ckps/<dataset>/server.ptl")
    parser.add_argument("--secret_file", type=Path, help="file with a secret that clients must know too")
    parser.add_argument(
        "--certificates", type=Path, metavar="DIR", help="use TLS, with its ca.pem, server.pem, server.key"
    )
    parser.add_argument("--verbose", action="store_true", help="show the log of Flower too")
    parser.add_argument("--net", default="LeNet5", help="net to train, one of nets.py's: the devices build it too")
    args = parser.parse_args()
    args.server_address, args.server_port = split_address(args.server_address, args.server_port)
    return args


def count_clients(args, shards):
    """Settle num_clients and min_clients in `args`; `shards` is how many partition.py has cut, None if unknown."""
    if args.num_clients is None:
        args.num_clients = shards or 10
    elif shards not in (None, args.num_clients):
        say(f"note: {args.dataset} was cut into {shards} shards, and --num_clients is {args.num_clients}")
    args.min_clients = args.min_clients or args.num_clients
    if args.min_clients > args.num_clients:
        raise UserError(f"--min_clients {args.min_clients} is more than --num_clients {args.num_clients}")
    least = STRATEGIES[args.strategy].least
    if args.min_clients < least:
        raise UserError(
            f"--strategy {args.strategy} needs rounds of {least} clients or more; "
            f"--num_clients {args.num_clients} --min_clients {args.min_clients} allow smaller ones"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The clients. Flower keeps one stream to each, on which it answers one question at a time. Besides fit and evaluate the
# questions are get_properties, whose dictionary says what is meant:
#     {"nonce"}, then {"net", "dataset_id"}      the handshake, answered within HANDSHAKE_TIMEOUT and READY_TIMEOUT
#     {}                                         are you there? every HEARTBEAT seconds, unless it is busy
#     {"turned_away"} or {"stopped"}             the reason, before the stream ends
# The server gives up a client that is idle and silent for HEARTBEAT, busy for --round_timeout, or on a machine whose
# kernel is silent for KEEPALIVE (libs.py); a client gives up a server that is silent for SILENCE (client.py).
# The main thread runs the rounds; one thread a connection, "client …", has the handshake and then the heartbeat; one a
# question, "fit 3", waits for the answer; "record" keeps the record, "signals" notes signals.
# Registry._cv guards who is there; RemoteClient.lock is held while the client has a question to answer.


class Stopped(Exception):
    """A signal asked the server to stop."""


class ClientFailure(Exception):
    """A client gave no answer; `cid` says which, the text why."""

    def __init__(self, cid, reason):
        super().__init__(reason)
        self.cid = cid


class TurnedAway(Exception):
    """A client that may not take part: the text says why, to it and to the user; `cid` is what it called itself."""

    def __init__(self, reason, cid="unknown"):
        super().__init__(reason)
        self.cid = cid


class RemoteClient(ClientProxy):
    """A client that passed the handshake: Flower's proxy under its own cid, for one question at a time."""

    def __init__(self, proxy, properties):
        super().__init__(str(properties["cid"]))
        self.proxy, self.properties = proxy, properties
        self.lock = threading.Lock()  # held while it has a question to answer
        self.gone = threading.Event()

    def _ask(self, method, ins, timeout, group_id):
        started = time.monotonic()
        if not self.lock.acquire(timeout=timeout or -1):
            raise ClientFailure(self.cid, f"no answer within {timeout:g} s")
        try:
            return getattr(self.proxy, method)(ins, timeout, group_id)
        except MALFORMED as error:
            raise ClientFailure(self.cid, f"malformed answer: {printable(error)}") from error
        except GrpcBridgeClosed:
            late = timeout is not None and time.monotonic() - started >= timeout
            raise ClientFailure(self.cid, f"no answer within {timeout:g} s" if late else "connection lost") from None
        finally:
            self.lock.release()

    get_properties = functools.partialmethod(_ask, "get_properties")
    get_parameters = functools.partialmethod(_ask, "get_parameters")
    fit = functools.partialmethod(_ask, "fit")
    evaluate = functools.partialmethod(_ask, "evaluate")
    reconnect = functools.partialmethod(_ask, "reconnect")

    def heartbeat(self):
        """Say a word to the client every HEARTBEAT seconds, unless it is busy, until it is gone.

        So that both sides notice when the other is gone; where the client does not answer, its connection is ended.
        """
        while not self.gone.wait(HEARTBEAT):
            if self.lock.acquire(blocking=False):
                try:
                    self._say_a_word()
                finally:
                    self.lock.release()

    def is_alive(self):
        """Whether the client is there, found out within BUSY + HEARTBEAT seconds; one that is not is let go.

        A busy one cannot answer. But the kernel of a dead board does not answer TCP's keepalive either, so a
        connection that lasts for BUSY seconds is alive.
        """
        if not self.lock.acquire(timeout=BUSY):
            return not self.gone.is_set()
        try:
            return self._say_a_word()
        finally:
            self.lock.release()

    def _say_a_word(self):
        try:
            self.proxy.get_properties(GetPropertiesIns({}), HEARTBEAT, 0)
            return True
        except (GrpcBridgeClosed, *MALFORMED):
            self.close()
            return False

    def close(self):
        """Fail the question under way, and end the connection."""
        self.gone.set()
        self.proxy.bridge.close()


def handshake(num_clients, task, secret=None):
    """Decide on a client, without knowing how it is reached.

    A generator that yields questions, each a dictionary, is sent the answers, and returns what the client said of
    itself; it raises TurnedAway with the reason. `task` is what the client must have like the server: dataset,
    channels, num_classes, dataset_id (None: any), net, fingerprint, trial (nets.trial). With a `secret` (bytes) it must
    first prove that it knows it, and learns nothing before.
    """
    nonce, ready = secrets.token_hex(16), {}
    client = yield {"nonce": nonce}
    cid = client.get("cid")
    reason = why_not_client(client, nonce, num_clients, task["dataset"], secret)
    if reason is None:
        question = {"net": task["net"]}
        if task["dataset_id"] is not None:
            question["dataset_id"] = task["dataset_id"]
        ready = yield question
        reason = why_not_ready(ready, cid, task)
    if reason is not None:
        raise TurnedAway(reason, printable("unknown" if cid is None else cid, 20))
    return {**client, **ready}


def why_not_client(client, nonce, num_clients, dataset, secret):
    """The reason not to admit a client for what it says of itself, or None."""
    cid = client.get("cid")
    if secret is not None:
        proof = client.get("proof")
        if proof is None:
            return "the server asks for a secret: start the client with --secret_file"
        if not hmac.compare_digest(str(proof).encode(), prove(secret, nonce, cid).encode()):
            return "its secret is not the server's"
    if type(cid) is not int or not all(isinstance(client.get(name), str) for name in ("device_id", "process")):
        return "it is not this suite's client.py, or one of another version"
    if not 0 <= cid < num_clients:
        return f"cid {cid} is not in 0..{num_clients - 1} (server's --num_clients {num_clients})"
    if client.get("dataset") != dataset:
        return f"its dataset is {printable(client.get('dataset'), 40)}, the server's is {dataset}"
    return None


def why_not_ready(ready, cid, task):
    """The reason not to admit a client for the data and the net that it has made ready, or None."""
    shown = {name: printable(value, 40) for name, value in ready.items()}
    for name, what in (("num_classes", "classes"), ("channels", "colour channels")):
        if ready.get(name) != task[name]:
            return f"its dataset has {shown.get(name)} {what}, the server's has {task[name]}"
    if task["dataset_id"] not in (None, ready.get("dataset_id")):
        return (
            f"its shard is not of the server's cut of {task['dataset']}: partition.py has run in the meantime; "
            f"bring the device the newest bundles/client_{cid}.tar"
        )
    if "error" in ready:
        return printable(ready["error"])
    if ready.get("fingerprint") != task["fingerprint"]:
        return f"its fingerprint is {shown.get('fingerprint')}, the server's is {task['fingerprint']}: nets.py differs"
    outputs = ready.get("trial")
    whole = isinstance(outputs, bytes) and len(outputs) % 4 == 0
    if not whole or not same_trial(np.frombuffer(outputs, "<f4"), task["trial"]):
        return f"its {task['net']} computes something else than the server's: nets.py differs"
    for name in ("num_fit", "num_eval"):
        if type(ready.get(name)) is not int or ready[name] < 1:
            return f"its {name} is {shown.get(name)}, not a positive number of images"
    return None


def ask_all(proxy, questions):
    """Put the questions of a handshake to a connection: what it returns of the client. Raises TurnedAway."""
    answer = None
    while True:
        try:
            question = questions.send(answer)
        except StopIteration as end:
            return end.value
        try:
            timeout = READY_TIMEOUT if "net" in question else HANDSHAKE_TIMEOUT
            res = proxy.get_properties(GetPropertiesIns(question), timeout, 0)
        except MALFORMED:
            raise TurnedAway("it is not this suite's client.py") from None
        answer = res.properties if res.status.code == Code.OK else {}


def send_away(proxy, notice):
    """Give a connection the notice, if it is not empty, and end it; where it says "stopped", to come back later."""
    try:
        if notice:
            proxy.get_properties(GetPropertiesIns(notice), HANDSHAKE_TIMEOUT, 0)
        if "stopped" not in notice:
            proxy.reconnect(ReconnectIns(seconds=None), HANDSHAKE_TIMEOUT, 0)
    except (GrpcBridgeClosed, *MALFORMED):
        pass  # it is gone already, which is as good
    proxy.bridge.close()


class Registry(SimpleClientManager):
    """The clients that take part, by cid. Flower registers each connection here; the handshake decides on it."""

    def __init__(self, num_clients, task, secret=None, port=None):
        super().__init__()
        self.num_clients, self.task, self.secret, self.port = num_clients, task, secret, port
        self.connections = set()  # Flower's ids of the open ones, admitted or not
        self.seen, self.last_joined = set(), time.monotonic()  # cids that ever joined, and when the newest of them did
        self.closed, self.notice = False, {}  # no more clients, and what they are told

    def register(self, client):
        """Flower's: `client` is its proxy of a new connection."""
        if self.closed:
            raise ConnectionAbortedError("the server is about to stop")
        self.connections.add(client.cid)
        if self.port is not None:
            for sock in tcp_sockets(self.port):
                keep_alive(sock)
        threading.Thread(target=self._look_after, args=(client,), name=f"client {client.cid[:8]}", daemon=True).start()
        return True  # so that Flower carries our questions to it

    def unregister(self, client):
        """Flower's: the connection of its proxy `client` has ended."""
        with self._cv:
            self.connections.discard(client.cid)
            for admitted in list(self.clients.values()):
                if admitted.proxy is client:
                    self.remove(admitted)

    def remove(self, client):
        """Let a client go, whose connection is gone or as good as gone."""
        with self._cv:
            if self.clients.get(client.cid) is client:
                del self.clients[client.cid]
                if not self.closed:
                    say(f"cid {client.cid} left")
            client.close()
            self._cv.notify_all()

    def _look_after(self, proxy):
        """Have the handshake with a new connection; then keep the silence on it short, for as long as it lasts."""
        try:
            client = RemoteClient(proxy, ask_all(proxy, handshake(self.num_clients, self.task, self.secret)))
            admitted = self._admit(client)
        except GrpcBridgeClosed:
            proxy.bridge.close()
        except TurnedAway as reason:
            if not self.closed:
                say(f"turned away cid {reason.cid}: {reason}")
            send_away(proxy, self.notice if self.closed else {"turned_away": str(reason)})
        else:
            if admitted:
                client.heartbeat()
            else:
                send_away(proxy, self.notice)

    def _admit(self, client):
        """Take a client in: whether it could be. Raises TurnedAway where another one with its cid is alive."""
        before = None
        while True:
            with self._cv:
                if client.proxy.cid not in self.connections or self.closed:
                    return False
                other = self.clients.get(client.cid)
                before = other or before
                if other is None or other.gone.is_set() or other.properties["process"] == client.properties["process"]:
                    if other is not None:
                        other.close()
                    self.clients[client.cid] = client
                    if client.cid not in self.seen:  # for one that comes back no round is held up
                        self.seen.add(client.cid)
                        self.last_joined = time.monotonic()
                    self._cv.notify_all()
                    break
            if other.is_alive():
                reason = f"cid {client.cid} is in use by another device"
                if other.properties["device_id"] == client.properties["device_id"]:
                    reason += ", with the same id: one card is a copy of the other's; give each device a cid of its own"
                raise TurnedAway(reason, client.cid)
        say(f"cid {client.cid} {'is back' if before else 'joined'} ({len(self.clients)} of {self.num_clients} clients)")
        return True

    def sample(self, num_clients, min_num_clients=None, criterion=None):
        """All clients that are there, at most `num_clients`; never waits (`wait_for_round` does)."""
        with self._cv:
            return sorted(self.clients.values(), key=lambda client: int(client.cid))[:num_clients]

    def wait_for_round(self, min_clients, check):
        """Wait until all clients are there, or `min_clients` and nobody new for SETTLE seconds; say who is missing.

        `check` is called every POLL seconds, to raise what should end the waiting.
        """
        say_at, pause = time.monotonic() + 2, 5
        with self._cv:
            while len(self.clients) < self.num_clients:
                check()
                now = time.monotonic()
                if len(self.clients) >= min_clients and now - self.last_joined >= SETTLE:
                    return
                if now >= say_at:
                    missing = [str(cid) for cid in range(self.num_clients) if str(cid) not in self.clients]
                    cids = ", ".join(missing[:20] + ["…"] * (len(missing) > 20))
                    say(f"waiting for {len(missing)} of {self.num_clients} clients: cid {cids}")
                    say_at, pause = now + pause, min(2 * pause, 600)
                self._cv.wait(POLL)

    def close(self, notice):
        """Admit nobody any more, and send all clients away, with a notice to those that can hear it: the idle ones."""
        with self._cv:
            if self.closed:
                return
            self.closed, self.notice = True, notice
            clients = list(self.clients.values())

        def end(client):
            if client.lock.acquire(timeout=1 if notice else HEARTBEAT):  # at the end nobody trains any more
                send_away(client.proxy, notice)
            client.close()

        threads = [threading.Thread(target=end, args=(client,), name="goodbye", daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Server(flwr.server.Server):
    """Flower's server with a loop that waits for the right clients, can be stopped, and goes on from any round.

    A round is counted only if somebody trained in it.
    """

    def __init__(self, registry, strategy, min_clients=1, first_round=1):
        super().__init__(client_manager=registry, strategy=strategy)
        self.registry, self.min_clients, self.first_round = registry, min_clients, first_round
        self.signum, self.stopped = None, None  # what asked the server to stop, and when

    def stop(self, signum):
        """Note a signal (libs.on_signal). Ctrl-C a second time, a second later or more, ends the process at once."""
        if self.signum is None:
            self.signum, self.stopped = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self.stopped > 1:
            os._exit(128 + signum)

    def check(self):
        """Raise what should end the training early: a signal, or a failure to keep the record."""
        if self.signum is not None:
            raise Stopped
        self.strategy.check()

    def fit(self, num_rounds, timeout):
        """Run the rounds up to `num_rounds`, with `timeout` seconds (or None) for each question to the clients."""
        mute_handlers()  # Flower's start_server has just put its own there
        started, delay, current = time.monotonic(), 1, self.first_round
        self.parameters = self.strategy.initialize_parameters(self.registry)
        while current <= num_rounds:
            self.registry.wait_for_round(self.min_clients, self.check)
            instructions = self.strategy.configure_fit(current, self.parameters, self.registry)
            results, failures = self.ask("fit", instructions, timeout, current)
            parameters, _ = self.strategy.aggregate_fit(current, results, failures)
            if parameters is None:
                say(f"round {current}: nobody trained; it is run again in {delay} s")
                self.pause(delay)
                delay = min(2 * delay, MAX_RETRY_DELAY)
                continue
            self.parameters, delay = parameters, 1
            instructions = self.strategy.configure_evaluate(current, self.parameters, self.registry)
            results, failures = self.ask("evaluate", instructions, timeout, current)
            self.strategy.aggregate_evaluate(current, results, failures)
            current += 1
        return flwr.server.History(), time.monotonic() - started

    def ask(self, method, instructions, timeout, current):
        """Ask all clients at the same time: ([(client, its answer), …], [ClientFailure or (client, answer), …])."""
        answers, waiting = queue.SimpleQueue(), {client for client, _ in instructions}
        late = time.monotonic() + timeout + 1 if timeout else float("inf")

        def ask_one(client, ins):
            try:
                answers.put((client, (client, getattr(client, method)(ins, timeout, current))))
            except Exception as error:
                answers.put((client, error))

        for client, ins in instructions:
            threading.Thread(target=ask_one, args=(client, ins), name=f"{method} {client.cid}", daemon=True).start()
        results, failures = [], []
        while waiting:
            self.check()
            if time.monotonic() > late:  # Flower's own limit starts when all is sent, which to a dead link it never is
                late = float("inf")
                for client in waiting:
                    self.registry.remove(client)
            try:
                client, answer = answers.get(timeout=POLL)
            except queue.Empty:
                continue
            waiting.remove(client)
            good = isinstance(answer, tuple) and answer[1].status.code == Code.OK
            (results if good else failures).append(answer)
        return results, failures

    def pause(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check()
            time.sleep(min(POLL, max(0, until - time.monotonic())))

    def disconnect_all_clients(self, timeout):
        """Tell all clients that training is over."""
        self.registry.close({})


# ---------------------------------------------------------------------------------------------------------------------
# What must be there before the first round.


def check_address(host, port):
    """The address to listen on, "IP:port" or "[IP]:port". Raises UserError unless the server can listen there."""
    if "%" in host:  # Flower's start_server binds without the zone
        raise UserError(f"cannot listen on {host} alone: take --server_address :: (all networks)")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        return join_address(address[0], port)
    except (OSError, UnicodeError) as error:
        in_use = getattr(error, "errno", None) == errno.EADDRINUSE
        reason = "the port is in use; choose another with --server_port" if in_use else error
        raise UserError(f"cannot listen on {host}:{port}: {reason}") from None


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_certificates(folder):
    """The three certificates that Flower takes (bytes: CA, server, key), or None where `folder` is None."""
    if folder is None:
        return None
    paths = [folder / name for name in ("ca.pem", "server.pem", "server.key")]
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(paths[1], paths[2])
        ssl.create_default_context(cafile=paths[0])
        return tuple(path.read_bytes() for path in paths)
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"no usable ca.pem, server.pem and server.key in {folder} ({error.strerror or error}): "
            "make them with deploy/make_certificates.sh"
        ) from None


def main():
    args = parse_args()
    if not args.verbose:
        quiet_flower()

    # What the user gave: all of it is checked before anything is touched.
    secret = read_secret(args.secret_file)
    certificates = read_certificates(args.certificates)
    address = check_address(args.server_address, args.server_port)
    test, info = load_test(DATASETS / args.dataset, find_net(args.net).image_size)
    count_clients(args, info.get("num_clients"))
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = build_net(args.net, info["channels"], len(info["classes"]))
    folder = CKPS / args.dataset
    checkpoint = folder / "server.ptl"
    try:
        lock = lock_file(folder / "server.lock")
        if lock is None:
            raise UserError(f"another server is training {args.dataset} in {folder}")
        last_round, run_id = resume(checkpoint, model, args.dataset) if args.resume else (0, None)
        if last_round >= args.num_rounds:
            say(f"{checkpoint} has finished round {last_round} already; --num_rounds {args.num_rounds} adds none")
            return 0
        if not args.resume:
            move_aside(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if secret is None and not is_loopback(args.server_address):
        say(f"warning: whoever reaches {address} can take part in the training; --secret_file prevents that")

    # The parts, from the last to the first.
    settings = plain_args(args)
    run, where = start_wandb(args.dataset, run_id, settings)
    say(where)
    curves = Curves(run)
    progress = Progress(args.num_rounds, last_round)
    record = Record(
        model,
        checkpoint,
        last_round=last_round,
        test_loaders={"test": test},
        about={"dataset": args.dataset, "wandb_run_id": run.id, "args": settings, **describe_in_checkpoint(info)},
        on_row=progress.show_row,
        log=curves.log,
    )
    known = inspect.signature(client_fit_fn).parameters
    hyper_parameters = {name: value for name, value in settings.items() if name in known and value is not None}
    strategy = STRATEGIES[args.strategy](
        model,
        record=record,
        on_drop=progress.show_drop,
        on_fit_config_fn=lambda current: {"round": current, "num_rounds": args.num_rounds, **hyper_parameters},
        min_fit_clients=1,
        min_evaluate_clients=1,
        min_available_clients=1,
    )
    task = {
        "dataset": args.dataset,
        "dataset_id": info.get("id"),
        "channels": info["channels"],
        "num_classes": len(info["classes"]),
        "net": args.net,
        "fingerprint": fingerprint(model),
        "trial": trial(build_net(args.net, info["channels"], len(info["classes"]))),
    }
    registry = Registry(args.num_clients, task, secret, args.server_port)
    server = Server(registry, strategy, args.min_clients, last_round + 1)

    on_signal(server.stop)
    say(f"round {last_round + 1} to {args.num_rounds} with {args.num_clients} clients, on {address}")
    config = ServerConfig(num_rounds=args.num_rounds, round_timeout=args.round_timeout)
    code = run_rounds(server, server_address=address, config=config, certificates=certificates)
    code = end_rounds(server, code)
    progress.close()
    curves.finish()
    show_files(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gRPC's threads, which wait for clients that are cut off or frozen, would keep the process alive


def run_rounds(server, **kwargs):
    """Run the rounds, up to the last or to whatever ends them before it. Returns the exit code."""
    try:
        start_server(server=server, **kwargs)
    except Stopped:
        say(f"stopping ({signal.Signals(server.signum).name}; Ctrl-C now leaves at once)")
    except SystemExit as end:  # Flower's own way out: a port taken in the meantime, a signal before the first round
        if isinstance(end.code, str):
            say(f"server.py: {end.code}", sys.stderr)
            return 1
        return end.code or 128 + signal.SIGTERM
    except BaseException as error:
        return fail(error)
    return 0


def end_rounds(server, code):
    """Tell the clients, and save what is finished. Returns the exit code; `code` is that of the rounds."""
    server.registry.close({"stopped": "the server stopped before the last round"})
    try:
        server.strategy.close()
    except BaseException as error:
        code = code or fail(error)
    return 128 + server.signum if server.signum is not None else code


def fail(error):
    """Say why the server ends: in a line where a disk or folder is at fault, else with the traceback. Returns 1."""
    if isinstance(error, OSError):
        say(f"server.py: cannot go on: {error}", sys.stderr)
    else:
        traceback.print_exception(error)
        say(f"server.py: cannot go on: {type(error).__name__}: {error}", sys.stderr)
    return 1


if __name__ == "__main__":
    run_script(main)
