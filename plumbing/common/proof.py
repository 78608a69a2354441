"""The proof that both ends know the secret, and the pass that spares a device the strangers' queue."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets


def new_nonce() -> str:
    return secrets.token_hex(16)


def digest(key: bytes, *texts: str) -> str:
    """Return the HMAC-SHA-256 of the texts, as hex digits."""
    return hmac.new(key, json.dumps(texts).encode(), hashlib.sha256).hexdigest()


def name_channel(authority: bytes | None) -> str:
    """Return what both ends know of the channel between them: the digest of ca.pem; "" without TLS.

    (grpcio tells neither end which keys its connection has.) A device that was given another authority's certificate,
    or none, proves something else than the server expects.
    """
    return "" if authority is None else hashlib.sha256(b"".join(authority.split())).hexdigest()


def prove_client(secret: bytes, channel: str, nonces: tuple[str, str], about: dict) -> str:
    """Return a device's proof: over both nonces, the server's first, the channel, and all that it says of itself."""
    return digest(secret, "client", *nonces, channel, json.dumps(about, sort_keys=True))


def prove_server(secret: bytes, channel: str, nonces: tuple[str, str]) -> str:
    return digest(secret, "server", *nonces, channel)


def is_same(proof: str, right: str) -> bool:
    """Compare two proofs, in a time that does not tell where they differ."""
    return hmac.compare_digest(proof.encode(), right.encode())


def make_ticket(key: bytes, device_id: str) -> str:
    """Return a server's ticket for a device that it has met; `key` is known to the server alone."""
    return digest(key, "ticket", device_id)


def make_pass(key: bytes, nonce: str) -> str:
    """Return the proof, for one connection, that a device knows `key`: its ticket, or the secret."""
    return digest(key, "pass", nonce)
