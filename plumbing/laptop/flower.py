"""What the server uses of Flower beside its public API, so that one file changes when Flower moves it.

GrpcBridgeClosed: raised by a proxy whose connection has ended. A proxy of the scripts has its connection as `bridge`.
start_server: runs the rounds for the scripts. Deprecated since Flower 1.13; it lets clients connect over gRPC.
start_grid: the same on Flower's engines, for a Server that works with proxies.
"""

from flwr.server import start_server
from flwr.server.compat.app import start_grid
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed

__all__ = ["GrpcBridgeClosed", "start_grid", "start_server"]
