"""What a user may type: flags and their types, addresses, the secret, a Flower App's folder."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import shlex
from pathlib import Path

from plumbing.common.process import UserError

LEAST_SECRET = 20  # characters: whoever hears a proof may try shorter ones at home
HAS_MODE_BITS = os.name == "posix"  # on Windows, files are always readable by others


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows every default, and keeps the lines of the description as they are."""

    def _get_help_string(self, action):
        if action.required or action.dest == "help" or "(default" in action.help:
            return action.help
        default = {None: "none", False: "off"}.get(action.default, action.default)
        return f"{action.help} (default: {default})"


def new_parser(description):
    """Return a parser with the flag that all scripts share. `description` is the script's docstring."""

    def name(text):
        if not re.fullmatch(r"\w[\w.-]*", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a plain name of letters, digits, dots, dashes")
        return text

    parser = Parser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--dataset", type=name, default="CIFAR10", help="name of the folder in datasets/")
    return parser


def number(kind, low, high=float("inf"), inside=False):
    """An argparse type: a number of `kind` (int or float) in low..high; with `inside`, neither low nor high itself."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value < high if inside else low <= value <= high):
            what = "a whole number" if kind is int else "a number"
            where = f"above {low} and below {high}" if inside else f"from {low} to {high}"
            where = where.replace(" and below inf", "").replace(" to inf", " up")
            raise argparse.ArgumentTypeError(f"{text} is not {what} {where}")
        return value

    return parse


def nonempty_path(text):
    """An argparse type: a Path. "", as from an unset variable, would name the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def given_flags(parser: argparse.ArgumentParser, flags=None) -> set[str]:
    """Return the names of the arguments that are in `flags` (None: the command line), whatever their values."""
    nothing = object()
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(flags)), nothing))
    return {name for name, value in vars(parser.parse_args(flags, unset)).items() if value is not nothing}


def plain_args(args: argparse.Namespace) -> dict:
    """Return the arguments of a script as a checkpoint can hold them: a dictionary of plain types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def list_datasets(folder: Path) -> str:
    """Return which datasets are in the folder datasets/, as the end of a message; "" if there are none."""
    names = sorted(path.parent.name for path in folder.glob("[!.]*/dataset.json"))
    return f" (--dataset can be {', '.join(names)})" if names else ""


def find_folder(config: dict) -> Path:
    """Return the suite's folder, which a Flower App finds in its `config`. Raises UserError if it is not there."""
    folder = config.get("folder", "")
    if not (isinstance(folder, str) and Path(folder).is_absolute() and Path(folder).is_dir()):
        raise UserError(f"folder is {folder!r} in the config: it has to be the suite's folder here, from / on")
    return Path(folder)


def refuse_readable(path: Path, what: str) -> None:
    """Raise UserError if the file `path`, a secret of the kind `what`, exists and others can read it."""
    if HAS_MODE_BITS and path.exists() and path.stat().st_mode & 0o077:
        raise UserError(f"{what} {path} can be read by others: chmod 600 {shlex.quote(str(path))}")


def read_secret(path: Path | None) -> bytes | None:
    """Return the secret in the file `path` (bytes, without surrounding white space), or None if `path` is None."""
    if path is None:
        return None
    try:
        refuse_readable(path, "secret file")
        secret = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"secret file {path} cannot be read: {error.strerror}") from None
    if len(secret) < LEAST_SECRET:
        file = shlex.quote(str(path))
        raise UserError(
            f"the secret in {path} has {len(secret)} characters, and {LEAST_SECRET} are the least: make one with "
            f"head -c 32 /dev/urandom | base64 > {file} && chmod 600 {file}"
        )
    return secret


def split_address(text: str, port: int | None = None) -> tuple[str, int]:
    """Split an address that the user gave into (host, port), the host without brackets, with its IPv6 zone.

    Takes "host", "host:port", "[::1]:port", "fe80::1%eth0", and all these as pasted from a browser. `port` is the value
    of --server_port, or None. Raises UserError for an address that can never be reached. (urllib.parse accepts most of
    these, such as 192.168.1.300, or laptop: without a port.)
    """
    rest = re.sub(r"^\w+://", "", text.strip()).rstrip("/")
    host, colon, tail = rest, "", ""
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        colon, tail = tail[:1], tail[1:]
        if not bracket or ":" not in host or colon not in ("", ":"):
            raise UserError(f"--server_address {text} is neither a name nor an IP address")
    elif rest.count(":") == 1:
        host, colon, tail = rest.partition(":")
    address, percent, zone = host.partition("%")
    try:
        ip = ipaddress.ip_address(address)
        if percent and not (zone and ip.version == 6):
            raise ValueError
        if ip.version == 6 and ip.is_link_local and not zone:
            raise UserError(f"--server_address {text} needs the network card, as in {address}%eth0")
    except ValueError:
        name = r"(\w([\w-]{0,61}\w)?\.)*(?!\d+$)\w([\w-]{0,61}\w)?\.?"  # the last part is no number: that's a bad IP
        if len(host) > 253 or re.fullmatch(name, host) is None:
            raise UserError(f"--server_address {text} is neither a name nor an IP address") from None
    if not colon:
        return host, 8080 if port is None else port
    if not re.fullmatch(r"[0-9]{1,5}", tail) or not 0 < int(tail) < 65536:
        raise UserError(f"--server_address {text} has {tail or 'nothing'!r} for a port, not a number from 1 to 65535")
    if port not in (None, int(tail)):
        raise UserError(f"--server_address {text} and --server_port {port} name two ports")
    return host, int(tail)


def join_address(host: str, port: int) -> str:
    """Return "host:port", or "[::1]:port" for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
