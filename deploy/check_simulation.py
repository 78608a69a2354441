"""Why make simulate is refused, in one line, before it installs anything: with the standard library alone."""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def known_flags():
    """The names of server.py's flags that a simulation takes: those of the Flower App, but for one."""
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.flwr.app.config]\n")[1].split("\n[")[0]
    names = set(re.findall(r"^(\w+) = ", config, re.MULTILINE))
    return names - {"folder", "round_timeout"}  # in a simulation clients wait for a core


def why_not(argv):
    """Why the simulation with the flags `argv` is not to be, or None."""
    for word in argv:
        flag = re.match(r"--(?:no-)?(\w+)", word)
        if flag and not any(name.startswith(flag[1]) for name in (*known_flags(), "help")):
            return f"--{flag[1]} has no effect in a simulation (see --help)"
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dataset", nargs="?", const="CIFAR10", default="CIFAR10")
    parser.add_argument("--num_clients", nargs="?")
    args, _ = parser.parse_known_args(argv)
    folder = ROOT / "datasets" / args.dataset
    if not folder.is_dir():
        return None
    try:
        there = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["num_clients"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{args.dataset} has no dataset.json of partition.py: run that first"
    if (folder / "bundles").is_dir() and args.num_clients not in (None, str(there)):
        return (
            f"{args.dataset} is split into {there} shards, and devices may have its bundles, which a new split would "
            f"make useless: split it into {args.num_clients} with partition.py, or choose another --dataset"
        )
    return None


if __name__ == "__main__":
    problem = why_not(sys.argv[1:])
    if problem:
        print(f"simulate.py: {problem}", file=sys.stderr)
        sys.exit(2)
