"""What we use of Flower beside what it documents is still there: where it is not, this says what, and who needs it."""

import importlib
import inspect
import os
import tomllib

import pytest
from helpers import ROOT

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

INSIDES = (
    ("flwr.server.compat.app", "start_grid", "laptop/nodes: the rounds on Flower's engines"),
    ("flwr.server.compat.grid_client_proxy", "GridClientProxy", "laptop/nodes: a SuperNode"),
    ("flwr.client", "ClientApp", "client.py: the app"),
    ("flwr.server", "ServerApp", "server.py: the app"),
)


@pytest.mark.parametrize("module, name, needed", INSIDES)
def test_what_we_use_is_there(module, name, needed):
    try:
        found = hasattr(importlib.import_module(module), name)
    except ImportError:
        found = False
    assert found, f"Flower has no {module}.{name} any more, which is needed for {needed}"


def test_parameters_are_arrays_as_npy_bytes():
    """laptop/checks reads, and strategies.py writes, Parameters(tensors=[bytes, …], tensor_type="numpy.ndarray")."""
    import numpy as np
    from flwr.common import Parameters, ndarrays_to_parameters

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    parameters = ndarrays_to_parameters([array])
    assert list(inspect.signature(Parameters).parameters) == ["tensors", "tensor_type"], "Parameters has other fields"
    assert parameters.tensor_type == "numpy.ndarray" and parameters.tensors[0].startswith(b"\x93NUMPY"), parameters
    assert parameters.tensors[0].endswith(array.tobytes()), "Parameters holds no .npy bytes any more"


def test_a_simulated_supernode_is_known_by_its_partition_id():
    from flwr.common.constant import PARTITION_ID_KEY

    assert PARTITION_ID_KEY == "partition-id", "client.client_fn tells a simulation by another key"


def test_a_simulation_is_known_by_how_often_it_looks_for_answers():
    from flwr.superlink.grid.inmemory_grid import InMemoryGrid

    known = "pull_interval" in inspect.signature(InMemoryGrid).parameters
    assert known, "laptop/nodes tells a simulation's grid by its pull_interval"


def test_a_lost_supernode_is_called_unavailable():
    from flwr.server.superlink.linkstate.utils import NODE_UNAVAILABLE_ERROR_REASON

    assert "navailable" in NODE_UNAVAILABLE_ERROR_REASON, "laptop/nodes knows a lost SuperNode by that word"


def test_the_apps_settings_are_the_servers_flags():
    """Each flag of server.py is a setting of the Flower App with the same default, but for those of its wire."""
    from plumbing import VERSION

    import server

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    wire = {"server_address", "server_port", "secret_file", "certificates", "compress"}
    assert config.pop("folder") == ""
    flags = vars(server.parse_args({}))
    assert VERSION == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert set(config) == set(flags) - wire, "pyproject.toml's [tool.flwr.app.config] is not the flags of server.py"
    assert vars(server.parse_args(config)) == flags


@pytest.mark.parametrize(
    "settings, flags",
    [
        (
            {"seed": 0, "lr": 1e-05, "resume": True, "num_rounds": 3},
            {"seed": 0, "lr": 1e-05, "resume": True, "num_rounds": 3},
        ),
        (
            {"augment": False, "allow_new_data": True, "resume": "a b"},
            {"augment": False, "allow_new_data": True, "resume": "a b"},
        ),
        (
            {"augment": True, "round_timeout": "auto", "seed": ""},
            {"augment": True, "round_timeout": "auto", "seed": None},
        ),
    ],
)
def test_settings_mean_what_they_say(settings, flags):
    import server

    args = vars(server.parse_args(settings))
    assert {name: args[name] for name in flags} == flags


@pytest.mark.parametrize("settings", [{"num_rounds": 0}, {"strategy": "Mean"}, {"lr": True}, {"seed": 1.5}])
def test_wrong_settings_are_refused(settings):
    from libs import UserError

    import server

    with pytest.raises(UserError):
        server.parse_args(settings)


def test_a_supernode_without_folder_or_cid_is_told_so(tmp_path):
    from libs import UserError

    from flwr.common import Context

    import client

    def context(**node_config):
        names = {"run_id": 1, "node_id": 1, "node_config": node_config, "state": None}
        return Context(**names, run_config={"dataset": "Tiny", "fedbn": False, "folder": str(tmp_path)})

    with pytest.raises(UserError, match="folder is ''"):
        client.client_fn(context(cid=1))
    with pytest.raises(UserError, match="cid is None in the SuperNode's --node-config"):
        client.client_fn(context(folder=str(tmp_path)))
