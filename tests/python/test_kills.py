"""Promise: whoever is killed while publishing or appending a version leaves a whole chain, and loses none that was reported."""

import importlib.util
import random
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("kills", Path(__file__).parents[1] / "faults/kills.py")
kills = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kills)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("verb", ["publishes", "appends"])
def test_killed_runs_leave_whole_chains(verb, tmp_path):
    random.seed(3)
    folder = tmp_path / "chain"
    folder.mkdir()
    met = getattr(kills, verb)(12, folder)
    assert met["killed"] >= 3, met
