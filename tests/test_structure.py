"""The rules of the house: who may import whom, and how long a file, a function, a class may be."""

import ast

from helpers import ROOT

SCRIPTS = ("libs", "nets", "data", "engines", "strategies", "server")
DEVICE = {"libs", "nets", "data", "engines", "client"}  # what a device has of the root
LAPTOP_ONLY = {"pandas", "wandb", "matplotlib"}
ROOMS = {  # of plumbing: what else of plumbing each may import
    "common": set(),
    "device": {"common"},
    "laptop": {"common"},
    "sources": {"common"},
}


def imported(path):
    """The modules that a file imports, at its top or inside functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return names | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def rooms():
    """The modules of plumbing with their room: [(path, "common"), …]."""
    return [(path, path.parent.name) for path in sorted((ROOT / "plumbing").glob("*/*.py"))]


def test_imports_of_the_scripts_go_one_way():
    modules = {path.stem: imported(path) for path in ROOT.glob("*.py")}
    assert set(modules) == {*SCRIPTS, "client", "partition"}
    for module, names in modules.items():
        if module in SCRIPTS:
            assert names & set(modules) <= set(SCRIPTS[: SCRIPTS.index(module)]), module
    assert modules["client"] & set(modules) <= DEVICE and modules["partition"] & set(modules) == {"libs"}
    for module in DEVICE:
        assert not modules[module] & LAPTOP_ONLY, module


def test_plumbing_imports_no_script_and_its_rooms_only_what_they_may():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path, room in rooms():
        names = imported(path)
        assert not names & scripts, f"{path} imports {names & scripts}"
        others = {name.split(".")[1] for name in names if name.startswith("plumbing.")}
        assert others <= {room, *ROOMS[room]}, f"{path} imports {others}"
        if room in ("common", "device"):
            assert not names & LAPTOP_ONLY, f"{path} imports {names & LAPTOP_ONLY}"
