"""Imports of the root modules go one way: each module only imports those before it, and scripts no script."""

import ast

from helpers import ROOT

ORDER = ("libs", "nets", "data", "engines", "record", "strategies", "wire", "registry", "server")
DEVICE = {"libs", "nets", "data", "engines", "wire", "client"}  # all that a device has


def imported(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return names | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_imports_go_one_way():
    modules = {path.stem: imported(path) for path in ROOT.glob("*.py")}
    assert set(modules) == {*ORDER, "client", "partition"}
    for module, names in modules.items():
        if module in ORDER:
            assert names & set(modules) <= set(ORDER[: ORDER.index(module)]), module
    assert modules["client"] & set(modules) <= DEVICE and modules["partition"] & set(modules) == {"libs"}
    for module in DEVICE:
        assert not modules[module] & {"wandb", "matplotlib", "pandas"}, module
