"""Promise: a version that changes nothing (a trainer's first sync, a step without a gradient) is taken like any other, and is
the one that is served then; the next is a step from it.
"""

import engines
import models
import pytest
import torch
import xorz
from engines import PROMPTS, ask
from safetensors.torch import load_file
from xorz.vllm.client import UpdateError, update


def test_versions_that_are_equal(tmp_path):
    base = models.base("llama", engines.FOLDER)
    words = load_file(base / "model.safetensors")
    moved = {
        name: tensor + 0.05 * torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in words.items()
    }
    llm = engines.engine(base, weight_transfer_config={"backend": "xorz"})
    try:
        said = [[s.tokens for s in ask(llm, PROMPTS)]]
        with xorz.Publisher(base, tmp_path / "run", keyframe=2) as publisher:
            for number, state in enumerate((words, words, moved, moved), 1):
                assert publisher.publish(state).result() == number
                [report] = update(llm, tmp_path / "run", number)
                assert report["version"] == str(number) and llm.get_weight_version() == str(number)
                assert (report["changed"] > 0) == (number == 3)
                with pytest.raises(UpdateError, match=f"version {number} is served already"):
                    update(llm, tmp_path / "run", number)
                said.append([s.tokens for s in ask(llm, PROMPTS)])
        assert said[0] == said[1] == said[2] and said[3] == said[4] and said[2] != said[3]
        # From a version to one of the same words, forwards and back, past others.
        for number, same in ((2, 0), (1, 0), (4, 3), (3, 3), (0, 0)):
            [report] = update(llm, tmp_path / "run", number)
            assert report["version"] == str(number)
            assert [s.tokens for s in ask(llm, PROMPTS)] == said[same]
    finally:
        engines.stop(llm)
