"""Kills of what writes chains of versions from Python: `python tests/faults/kills.py 200` (`make faults KILLS=200`) publishes
and appends so many times each, kills -9 each run after a random part of its time, and reads the chain after every one: each
version whole and bit for bit what was published, none lost that was reported, nothing that stays under a temporary name.

The runs are forks of this process, which has loaded torch already, so that kills land in the writing and not in imports.
"""

import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import xorz

SIZES = {"a": (300, 200), "b": (500,), "c": (64, 1000)}


def state(number: int) -> dict[str, torch.Tensor]:
    """The tensors of a version: the base's, a word more of each changed with every version."""
    made = torch.Generator().manual_seed(1)
    out = {name: torch.randn(size, generator=made).bfloat16() for name, size in SIZES.items()}
    for tensor in out.values():
        tensor.view(-1)[: 7 * number] *= -1.5
    return out


def run(work) -> int:
    """`work` in a fork, killed after a random time below `LONGEST`; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"kills: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    time.sleep(random.random() * LONGEST[0])
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


LONGEST = [0.1]


def whole(folder: Path, least: int) -> int:
    """The head of a chain all of whose versions are what was published, `least` or newer."""
    chain = xorz.Versions(state(0), folder)
    head = chain.head
    assert head >= least, f"version {least} was reported, but the chain ends at {head}"
    for number in range(max(0, head - 3), head + 1):
        found, want = chain.state_dict(number), state(number)
        assert all(torch.equal(found[name], want[name]) for name in want), f"version {number} is another"
    return head


def kill_many(count: int, step, folder: Path, head: int = 0) -> collections.Counter:
    """Kill `step(head)`, which adds one version to the chain in `folder`, so many times."""
    met: collections.Counter = collections.Counter()
    start = time.monotonic()
    step(head)
    LONGEST[0] = 1.3 * (time.monotonic() - start)
    head = whole(folder, head + 1)
    for _ in range(count):
        status = run(lambda head=head: step(head))
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0, status
        # Who came through has reported its version.
        now = whole(folder, head if killed else head + 1)
        assert now in (head, head + 1), (head, now)
        met["killed"] += killed
        met["whole"] += now > head
        LONGEST[0] *= 1.02 if killed else 0.9
        head = now
    # What the killed ones left goes with the next whole run.
    step(head)
    whole(folder, head + 1)
    left = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
    assert not left, left
    return met


def publishes(count: int, folder: Path) -> collections.Counter:
    """Kills of `Versions.publish`."""
    return kill_many(
        count, lambda head: xorz.Versions(state(0), folder, keyframe=4).publish(state(head + 1)), folder
    )


def appends(count: int, folder: Path) -> collections.Counter:
    """Kills of `Versions.append`, of steps that another chain has made."""
    other = folder.with_name("source")
    source = xorz.Versions(state(0), other, keyframe=1000)

    def step(head: int) -> None:
        xorz.Versions(state(0), folder, keyframe=4).append(steps[head])

    steps = []
    for number in range(1, count + 4):
        source.publish(state(number))
        path = other.with_name(f"step-{number}.xorz")
        shutil.copyfile(source.path(number), path)
        steps.append(path)
    return kill_many(count, step, folder)


def main(count: int) -> None:
    """Both, and what they met."""
    random.seed(count)
    torch.set_num_threads(1)
    for work in (publishes, appends):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "chain"
            place.mkdir()
            met = work(count, place)
        print(
            f"{work.__name__}: {count} runs, {met['killed']} killed, {met['whole']} had come through: every chain whole"
        )
        assert met["killed"] >= count // 3 and met["whole"] >= 1, dict(met)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
