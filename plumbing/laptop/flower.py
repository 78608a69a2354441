"""What the server uses of Flower beside its public API, so that one file changes when Flower moves it.

start_grid: runs the rounds on Flower's engines, for a Server that works with proxies.
"""

from flwr.server.compat.app import start_grid

__all__ = ["start_grid"]
