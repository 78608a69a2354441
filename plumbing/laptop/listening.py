"""Where the server listens, its certificates, and the command that starts a client."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import shlex
import socket
import ssl
import struct
import sys
import time

from plumbing.common.arguments import join_address, refuse_readable
from plumbing.common.process import UserError


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
        reason = {
            errno.EADDRINUSE: "the port is in use; choose another with --server_port",
            errno.EADDRNOTAVAIL: "that is not an address of this machine; use 0.0.0.0",
        }.get(getattr(error, "errno", None), getattr(error, "strerror", None) or error)
        raise UserError(f"cannot listen on {host}:{port}: {reason}") from None


def is_unspecified(host):
    """Whether `host` stands for all addresses of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_addresses():
    """The addresses by which others may reach this machine, the one of its way out first; IPv6 where it has no IPv4."""
    found = {socket.AF_INET: [], socket.AF_INET6: []}
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # nobody's, for documents
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((far, 9))  # of UDP: asks the routes, and sends nothing
            found[family].append(sock.getsockname()[0])
    with contextlib.suppress(OSError):
        found[socket.AF_INET] += socket.gethostbyname_ex(socket.gethostname())[2]
    for _, name in socket.if_nameindex() if sys.platform == "linux" else []:
        import fcntl

        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            found[socket.AF_INET].append(socket.inet_ntoa(answer[20:24]))
    addresses = found[socket.AF_INET] if any(map(is_far, found[socket.AF_INET])) else found[socket.AF_INET6]
    return list(dict.fromkeys(filter(is_far, addresses)))


def is_far(address):
    ip = ipaddress.ip_address(address)
    return not (ip.is_loopback or ip.is_unspecified or (ip.version == 6 and ip.is_link_local))


def decode_certificate(path):
    """What the certificate in a file says, as ssl.SSLSocket.getpeercert has it; {} where that cannot be told."""
    try:
        return ssl._ssl._test_decode_cert(str(path))  # Python reads one's own in no other way
    except Exception:
        return {}


def names_in_certificate(folder):
    """The names and addresses to which the certificate in `folder` is made out; [] where that cannot be told."""
    return [name for _, name in decode_certificate(folder / "server.pem").get("subjectAltName", ())]


def describe_client_command(args):
    """What starts a client, in one line, with an address of this machine: to be copied to the devices."""
    host, others = args.server_address, []
    if is_unspecified(host):
        addresses = own_addresses() or ["LAPTOP_IP"]
        named = names_in_certificate(args.certificates) if args.certificates else []
        addresses = [address for address in addresses if address in named] or named or addresses
        host, *others = addresses
    words = ["--server_address", host]
    if args.server_port != 8080:
        words += ["--server_port", str(args.server_port)]
    words += ["--dataset", args.dataset]
    if args.secret_file is not None:
        words += ["--secret_file", str(args.secret_file)]
    if args.certificates is not None:
        words += ["--root_certificate", str(args.certificates / "ca.pem")]
    where, cid = "on the device", "0"
    if args.num_clients > 1:
        where, cid = f"on each device, with its number, 0 to {args.num_clients - 1}, for N", "N"
    where += f" (this machine is also {', '.join(others)})" if others else ""
    return f"{where}: .venv/bin/python client.py {shlex.join(words)} --cid {cid}"


def read_certificates(folder):
    """The three certificates that Flower takes (bytes: CA, server, key), or None where `folder` is None."""
    if folder is None:
        return None
    paths = [folder / name for name in ("ca.pem", "server.pem", "server.key")]
    refuse_readable(paths[2], "key")
    for path, remedy in zip(paths[:2], ("move it and ca.key away, and make new ones", "make a new one"), strict=True):
        said = decode_certificate(path)
        for name, past, problem in (("notAfter", True, "has expired"), ("notBefore", False, "is not valid yet")):
            if name in said and (ssl.cert_time_to_seconds(said[name]) < time.time()) == past:
                raise UserError(
                    f"certificate {path} {problem}, by this machine's clock ({said[name]}): {remedy} with "
                    "deploy/make_certificates.sh"
                )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(paths[1], paths[2])
        ssl.create_default_context(cafile=paths[0])
        return tuple(path.read_bytes() for path in paths)
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"no usable ca.pem, server.pem and server.key in {folder} ({error.strerror or error}): "
            "make them with deploy/make_certificates.sh"
        ) from None
