"""What is wrong where the server cannot be reached: gRPC reports all of it as the same UNAVAILABLE."""

from __future__ import annotations

import contextlib
import socket
import ssl

from plumbing.common.process import UserError

PROBE_TIMEOUT = 5  # seconds
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2's preface, SETTINGS
SETTINGS = b"\x04"  # the type of that frame, in its fourth byte
NOT_YET_VALID, HAS_EXPIRED = 9, 10  # of X509_V_ERR_CERT_…


def knock(host, port, context=None):
    """Send HTTP/2's first bytes, over TLS if `context` is given, and return the first bytes of the answer."""
    with socket.create_connection((host, port), timeout=PROBE_TIMEOUT) as sock:
        with context.wrap_socket(sock, server_hostname=host) if context else contextlib.nullcontext(sock) as stream:
            stream.sendall(HELLO)
            return stream.recv(9)


def tls_context(**kwargs):
    context = ssl.create_default_context(**kwargs)
    context.set_alpn_protocols(["h2"])
    return context


def probe(host: str, port: int, root_certificate: str | None) -> str | None:
    """Return None if the server answers, else what is wrong at the moment, as text.

    Raises UserError if waiting would not help: only one side speaks TLS, or the certificate does not fit.
    """
    address = f"{host}:{port}"
    try:
        if root_certificate is not None:
            context = tls_context(cafile=root_certificate)
            return None if knock(host, port, context) else f"the server at {address} hangs up"
        if knock(host, port)[3:4] == SETTINGS:
            return None
        anyone = tls_context()
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
        with contextlib.suppress(ssl.SSLError):
            knock(host, port, anyone)
            raise UserError(f"the server at {address} speaks TLS: give its ca.pem as --root_certificate")
        return f"what answers at {address} is not the server"
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == NOT_YET_VALID:  # a Pi has no clock of its own, and first has to ask for the time
            return f"the certificate of the server at {address} is not valid yet by this device's clock"
        if error.verify_code == HAS_EXPIRED:
            raise UserError(
                f"the certificate of the server at {address} has expired, by this device's clock: make a new one there "
                "with deploy/make_certificates.sh"
            ) from None
        raise UserError(
            f"the certificate of the server at {address} does not fit {root_certificate}: {error.verify_message}"
        ) from None
    except ssl.SSLEOFError:
        return f"the server at {address} hangs up"
    except ssl.SSLError:
        raise UserError(f"the server at {address} does not speak TLS: leave out --root_certificate") from None
    except OSError as error:
        return f"no server at {address} ({error.strerror or error})"
    except UnicodeError:
        raise UserError(f"--server_address {host} is neither a name nor an IP address") from None
