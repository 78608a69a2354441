"""Where the server listens, its certificates, and the command that starts a client."""

import contextlib
import datetime
import errno
import ipaddress
import shlex
import socket
import ssl

from plumbing.common.arguments import join_address, nonempty_path, number, refuse_readable
from plumbing.common.process import UserError, say
from plumbing.laptop.flags import optional

from cryptography import x509  # which Flower needs, too


def add_connection_flags(add):
    add("--server_address", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all networks")
    add("--server_port", type=number(int, 1, 65535), help="port to listen on (default: 8080)")
    add("--secret_file", type=optional(nonempty_path), help="file with a secret that clients must know, too")
    add("--certificates", type=optional(nonempty_path), metavar="DIR", help="use TLS: ca.pem, server.pem, server.key")


def announce(args, address, next_round):
    """Print which rounds the server runs, where it listens, and how to start a client."""
    if not is_loopback(args.server_address):
        if args.secret_file is None:
            say(f"warning: anyone who reaches {address} can take part in the training; --secret_file prevents that")
        elif args.certificates is None:
            say("warning: whoever sits between server and device can read and change all; --certificates prevents it")
    say(f"round {next_round} to {args.num_rounds} with {args.num_clients} clients, on {address}")
    if next_round > 1:
        say("clients that are still running come back by themselves within 30 s")
    say(describe_client_command(args))


def check_address(host, port):
    """Return the address to listen on, "IP:port" or "[IP]:port". Raise UserError if the server cannot listen there."""
    if "%" in host:  # gRPC binds without the zone
        raise UserError(f"cannot listen on {host} alone: use --server_address :: (all networks)")
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


def parse_ip(host):
    """Return `host` as an address of ipaddress; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host):
    return host == "localhost" or getattr(parse_ip(host), "is_loopback", False)


def own_addresses():
    """Return the addresses by which others may reach this machine, that of the default route first.

    IPv6 only if it has no IPv4. Connecting a UDP socket sends nothing: it looks up the route, and with it the address.
    """
    v4, v6 = [], []
    for found, family, far in ((v4, socket.AF_INET, "192.0.2.1"), (v6, socket.AF_INET6, "2001:db8::1")):  # nobody's
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((far, 9))
            found.append(sock.getsockname()[0])
    with contextlib.suppress(OSError):
        v4 += socket.gethostbyname_ex(socket.gethostname())[2]
    for _, card in socket.if_nameindex() if hasattr(socket, "SO_BINDTODEVICE") else []:  # Linux: of each network card
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, card.encode())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.connect(("255.255.255.255", 9))
            v4.append(sock.getsockname()[0])
    return list(dict.fromkeys(filter(is_reachable, v4))) or list(filter(is_reachable, v6))


def is_reachable(address):
    ip = ipaddress.ip_address(address)
    return not (ip.is_loopback or ip.is_unspecified or (ip.version == 6 and ip.is_link_local))


def names_in_certificate(path):
    """Return the names and addresses for which the certificate in the file `path` is valid."""
    names = x509.load_pem_x509_certificate(path.read_bytes()).extensions
    names = names.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def describe_client_command(args):
    """Return the command that starts a client, as a line to copy, with an address of this machine."""
    host, others = args.server_address, []
    if getattr(parse_ip(host), "is_unspecified", False):  # all addresses of this machine
        addresses = own_addresses() or ["LAPTOP_IP"]
        if args.certificates is not None:
            with contextlib.suppress(ValueError, x509.ExtensionNotFound):
                named = names_in_certificate(args.certificates / "server.pem")
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
    where, cid = "run on the device", "0"
    if args.num_clients > 1:
        where, cid = f"run on each device (N = 0…{args.num_clients - 1})", "N"
    where += f" (this machine is also {', '.join(others)})" if others else ""
    return f"{where}: .venv/bin/python client.py {shlex.join(words)} --cid {cid}"


def check_dates(path, remedy):
    """Raise UserError if the certificate in the file `path` has expired, or is not valid yet."""
    certificate, now = x509.load_pem_x509_certificate(path.read_bytes()), datetime.datetime.now(datetime.UTC)
    problem, date = "has expired", certificate.not_valid_after_utc
    if certificate.not_valid_before_utc > now:
        problem, date = "is not valid yet", certificate.not_valid_before_utc
    elif date >= now:
        return
    raise UserError(
        f"certificate {path} {problem}, by this machine's clock ({date:%Y-%m-%d %H:%M} UTC): {remedy} with "
        "deploy/make_certificates.sh"
    )


def read_certificates(folder):
    """Return the three certificates that Flower takes (bytes: CA, server, key), or None if `folder` is None."""
    if folder is None:
        return None
    paths = [folder / name for name in ("ca.pem", "server.pem", "server.key")]
    refuse_readable(paths[2], "key")
    try:
        check_dates(paths[0], "move it and ca.key away, and make new ones")
        check_dates(paths[1], "make a new one")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(paths[1], paths[2])
        ssl.create_default_context(cafile=paths[0])
        return tuple(path.read_bytes() for path in paths)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UserError(
            f"no usable ca.pem, server.pem and server.key in {folder} "
            f"({getattr(error, 'strerror', None) or error}): make them with deploy/make_certificates.sh"
        ) from None
