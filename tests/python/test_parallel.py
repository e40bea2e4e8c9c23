"""Promise: layers that are cut over ranks give one rank's answer: column-wise bit for bit in mode="deterministic", row-wise
within the roundings of the ranks' sums; gradients too; uneven cuts too; and what cannot be cut is refused by name.
"""

import pathlib
import socket
import subprocess
import sys

import pytest
import torch

CHILD = pathlib.Path(__file__).with_name("parallel_child.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("world", [2, 3])
def test_layers_that_are_cut_over_ranks_give_one_ranks_answer(world):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(CHILD)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        done = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [out.strip() for out, _ in done] == ["ok"] * world, "\n".join(error[-3000:] for _, error in done)
