"""A net of one's own, as the README shows it, on shards whose last batch is of one image."""

import re
import shutil

import numpy as np
from helpers import ROOT, history, write_images

SNIPPET = re.search(r"```python\n(class Small.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def test_net_of_the_readme_trains_where_a_batch_of_one_would_be_left_over(suite, tmp_path):
    nets = (suite.root / "nets.py").read_text()
    before, line, after = re.split(r"(?m)^(NETS = .*)$", nets)
    (suite.root / "nets.py").write_text(before + SNIPPET + "\n\n" + line.replace("LeNet5,", "LeNet5, Small,") + after)
    source = write_images(tmp_path / "odd.zip", 82, 10)  # 41 a client, 33 of them to fit
    suite.partition("--dataset", "Tiny", "--source", source, "--num_clients", 2)
    server = suite.server("--dataset", "Tiny", "--net", "Small", "--num_rounds", 3)
    clients = [suite.client(cid, "--dataset", "Tiny") for cid in range(2)]
    assert [process.wait() for process in (server, *clients)] == [0, 0, 0], server
    rows = history(suite)
    assert list(rows["clients"]) == [2, 2, 2] and list(rows["failures"]) == [0, 0, 0]
    assert np.isfinite(rows["test_loss"]).all()


def test_net_that_is_not_there_is_named_before_anything_is_touched(tiny):
    server = tiny.server("--dataset", "Tiny", "--net", "ResNet50")
    assert server.wait() == 2 and server.err == "server.py: nets.py has no net ResNet50; it has LeNet5, GroupNet\n"
    assert not tiny.ckps("Tiny").exists()


def test_checkpoint_of_a_net_that_is_gone_is_named(suite, three_shards):
    shutil.copytree(three_shards, suite.root / "datasets")
    suite.ckps("Tiny").mkdir(parents=True)
    import torch

    torch.save({"net": "Gone", "model": {}}, suite.ckps("Tiny") / "server.ptl")
    server = suite.server("--dataset", "Tiny", "--resume")
    assert server.wait() == 2
    (line,) = server.err.splitlines()
    assert "its net is Gone, which nets.py has not" in line
