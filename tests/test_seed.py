"""With --seed, two runs from one command give the same history; without, they do not."""

import numpy as np
import pandas as pd


def history(suite, *args):
    """The rows of a run of two rounds with two clients, without the seconds."""
    server = suite.server("--dataset", "Tiny", "--num_clients", 2, "--num_rounds", 2, *args)
    clients = [suite.client(cid, "--dataset", "Tiny") for cid in range(2)]
    assert [process.wait() for process in (server, *clients)] == [0, 0, 0]
    return pd.read_csv(suite.ckps("Tiny") / "history.csv").drop(columns="round_seconds")


def test_seed_makes_a_run_one_that_can_be_repeated(tiny):
    first, second, other, unseeded = (
        history(tiny, *args) for args in (["--seed", 7], ["--seed", 7], ["--seed", 8], [])
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)
    for different in (other, unseeded):
        assert (first["fit_loss"] != different["fit_loss"]).all()


def test_order_of_the_images_differs_from_round_to_round_and_from_device_to_device(monkeypatch):
    from plumbing.device.task import Task

    import client

    seeds = []
    monkeypatch.setattr(client, "client_fit_fn", lambda *args, seed, **kwargs: seeds.append(seed) or {})
    monkeypatch.setattr(client.Client, "set_parameters", lambda *args: None)
    monkeypatch.setattr(client.Client, "get_parameters", lambda *args: [])
    for cid in (0, 1):
        device = client.Client(Task(None, {"fit": type("Loader", (), {"dataset": [0]})}), properties={"cid": cid})
        for current in (1, 2, 1):
            device.fit([], {"round": current, "seed": 7})
    assert seeds[0] == seeds[2] and seeds[3] == seeds[5] and len(set(seeds)) == 4
