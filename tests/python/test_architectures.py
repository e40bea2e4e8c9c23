"""Promise: whole architectures of transformers are served right, alone (exact: bit for bit) and in mixed
batches, or refused.

Twenty that have every kind of module; `make test-models` runs them all, by the same code.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import survey

pytestmark = pytest.mark.usefixtures("one_thread")

RIGHT = [
    "causal/falcon", "causal/gpt_oss", "causal/granitemoe", "causal/glm4_moe", "causal/deepseek_v3", "causal/llama4_text",
    "causal/mamba", "causal/gemma2", "causal/phi3", "causal/gpt_neox", "causal/blenderbot", "seq2seq/bart", "seq2seq/t5",
    "encoder/distilbert", "encoder/electra", "vision/vit", "vision/resnet", "speech/whisper",
]  # fmt: skip
OTHERS = {"encoder/deberta": "right, not bits", "causal/xlnet": "right"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*RIGHT, *OTHERS])
def test_architectures_are_served_right_or_refused(name):
    result = survey.survey(*name.split("/"))
    assert result["verdict"] == OTHERS.get(name, "right"), result


@pytest.mark.filterwarnings("ignore")
def test_the_survey_would_notice_another_models_numbers(monkeypatch):
    """Its mutant: tenants are served the base's first linear layer."""
    from xorz.serve.site import Site

    right = Site.linear

    def wrong(self, rows, input, *place):
        if self.name.endswith("layers.0.mlp.gate_proj"):
            return torch.nn.functional.linear(input, self.base["weight"], self.base.get("bias"))
        return right(self, rows, input, *place)

    monkeypatch.setattr(Site, "linear", wrong)
    monkeypatch.setattr("xorz.serve.forwards._plan", lambda *_: None)
    assert survey.survey("causal", "llama")["verdict"] == "WRONG"
