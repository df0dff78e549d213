"""A real trained model, against ids that stock transformers and an independent forward pass both gave."""

import json
from pathlib import Path

import pytest
import torch
from laws import rarely
from transformers import AutoModelForCausalLM

import retrieval_attn as ra
from retrieval_attn.hf.versions import cache_argument

FOLDER = Path(__file__).parents[2] / "shared" / "models" / "stories260K"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the model is not here: {FOLDER}")


def cases():
    return json.loads((FOLDER / "expected.json").read_text())["cases"] if FOLDER.is_dir() else []


def greedy(model, case, cache=None):
    prompt = torch.tensor([case["prompt_ids"]])
    n_new = len(case["greedy_ids"]) - len(case["prompt_ids"])
    return model.generate(prompt, **cache_argument(cache), max_new_tokens=n_new, do_sample=False)[0].tolist()


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["prompt"][:20])
def test_full_attention(case):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    assert greedy(model, case) == case["greedy_ids"]


@pytest.mark.parametrize("index", ["graph", *rarely("exact", "ivf")])
@pytest.mark.parametrize("case", cases()[:1] + rarely(*cases()[1:]), ids=lambda case: case["prompt"][:20])
def test_every_key_retrieved(case, index):
    """A window of 4 + 8 tokens, so that nearly the whole story is far."""
    ra.register()
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="retrieval")
    config = ra.RetrievalConfig(index=index, top_k=512, n_sink=4, n_local=8, exact_below=0)
    assert greedy(model, case, ra.RetrievalCache(model.config, config)) == case["greedy_ids"]
