"""The server's door: the streams of the devices over gRPC, and what keeps strangers from closing it to them.

A stranger is a stream that has not yet proved that it knows the secret (without a secret: not yet said who it is). It
has a place for PATIENCE + GOODBYE seconds; there are PLACES of them, and PER_ADDRESS for one address. A device with a
pass, made of the secret or of the ticket that it got when it was here before, needs no place. What strangers send is
read one frame at a time, of FIRST bytes, and the rest stays with them: gRPC's window of 64 KiB. A stream has a thread
of the pool, and in the handshake one of the registry's.
"""

import concurrent.futures
import ipaddress
import threading
import urllib.parse

from plumbing.common.frames import METHOD, options
from plumbing.common.process import UserError
from plumbing.common.proof import is_same, make_pass, make_ticket, name_channel
from plumbing.laptop.stream import GOODBYE, PATIENCE, Stream

import grpc

PLACES, PER_ADDRESS = 32, 4
CONNECTIONS = 3000  # at most, besides two for each device; one that says nothing costs 17 KiB
FILES = 500  # that the server needs besides connections
PASSES = 10_000  # that are remembered: each is good for one stream
OLD_METHOD = "/flwr.proto.FlowerService/Join"  # of FL-IoT up to 1.1, and of Flower's own start_client
SERVER_OPTIONS = [
    ("grpc.max_concurrent_streams", 1),  # on a connection
    ("grpc.server_handshake_timeout_ms", 1000 * (PATIENCE + GOODBYE)),  # for a connection to begin with HTTP/2, or TLS
    ("grpc.max_connection_idle_ms", 1000 * (PATIENCE + GOODBYE)),  # without a stream
    ("grpc.max_metadata_size", 4096),
    ("grpc.so_reuseport", 0),  # or a second server could take the same port
]


class Door(grpc.GenericRpcHandler):
    """Lets streams in, to be handed to the registry.

    registry: a registry.Registry.
    channel: see proof.name_channel.
    """

    def __init__(self, registry, channel):
        self.registry, self.channel = registry, channel
        self.strangers, self.passes = {}, {}  # {stream: its address}; the nonces of those used, oldest first
        self.lock = threading.Lock()

    def service(self, handler_call_details):
        """Be called by gRPC: return who handles a stream to this method."""
        if handler_call_details.method == OLD_METHOD:
            self.registry.turn_away_old()
        if handler_call_details.method != METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self.join)

    def join(self, messages, context):
        """Be called by gRPC in a thread of its pool, for each stream: yield what the device is sent."""
        stream = Stream(context, lambda: self.leave(stream), self.channel)
        known = self.knows(dict(context.invocation_metadata()).get("pass", ""))
        if not known and not self.take_place(stream, address_of(context.peer())):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many strangers")
        if context.add_callback(stream.end):
            self.registry.register(stream)
            yield from stream.carry(messages)
        stream.end()

    def take_place(self, stream, address):
        """Give a stranger a place, and return whether there was one."""
        with self.lock:
            mine = sum(other == address for other in self.strangers.values())
            free = len(self.strangers) < PLACES and mine < PER_ADDRESS
            if free:
                self.strangers[stream] = address
            return free

    def leave(self, stream):
        with self.lock:
            self.strangers.pop(stream, None)

    def knows(self, text):
        """Return whether the text is a pass (proof.make_pass) that was not used before."""
        nonce, _, rest = text.partition(" ")
        device_id, _, given = rest.partition(" ")
        keys = [make_ticket(self.registry.ticket_key, device_id).encode(), self.registry.secret]
        if not any(key is not None and is_same(given, make_pass(key, nonce)) for key in keys):
            return False
        with self.lock:
            if nonce in self.passes:
                return False
            self.passes[nonce] = True
            if len(self.passes) > PASSES:
                del self.passes[next(iter(self.passes))]
            return True


def address_of(peer):
    """Return the address in gRPC's name of a peer, such as ipv4:10.0.0.7:5678; for IPv6 its network, /64."""
    host = urllib.parse.unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return peer
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def raise_file_limit():
    """Let this process open as many files as it may. Return how many."""
    try:
        import resource  # not on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    except (ImportError, ValueError, OSError):
        return 1024


def listen(registry, server_address, certificates=None):
    """Return a gRPC server that has been started, whose streams go to the `registry`. Raise UserError if it cannot."""
    authority, certificate, key = certificates or (None, None, None)
    devices = 2 * registry.num_clients  # one may come back while its old stream still seems to be there
    connections = max(devices, min(CONNECTIONS + devices, raise_file_limit() - FILES))
    streams = PLACES + 2 * devices
    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(streams, "stream"),
        handlers=[Door(registry, name_channel(authority))],
        options=[*options(), *SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", connections)],
        maximum_concurrent_rpcs=streams,
    )
    try:
        if certificates is None:
            server.add_insecure_port(server_address)
        else:
            server.add_secure_port(server_address, grpc.ssl_server_credentials([(key, certificate)]))
    except RuntimeError:  # taken since it was checked (laptop/listening)
        raise UserError(f"cannot listen on {server_address}: the port is in use") from None
    server.start()
    return server


def start_server(*, server_address, server, config, certificates=None):
    """Run the rounds of `server` with the devices that come to `server_address`, as Flower's start_server did.

    server: a laptop/rounds.Rounds. config: a flwr.server.ServerConfig.
    certificates: (ca.pem, server.pem, server.key), bytes; None: without TLS.

    Where the rounds end by an exception, the door stays open, so that the devices can be told why.
    """
    door = listen(server.client_manager(), server_address, certificates)
    server.fit(num_rounds=config.num_rounds, timeout=config.round_timeout)
    server.disconnect_all_clients(timeout=None)
    door.stop(None)
