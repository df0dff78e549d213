"""How right the model's answers are, and the loss that makes them better."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2ForCausalLM

from retrieval_attn.bench.train.dialogues import Batch
from retrieval_attn.bench.train.model import forward
from retrieval_attn.bench.train.shared_context import Context


class Score(NamedTuple):
    """loss for back-propagation; right: one bool per answer, true if every token of it was the likeliest."""

    loss: Tensor
    right: Tensor


def score(
    model: Qwen2ForCausalLM,
    batch: Batch,
    context: Context | None = None,
    prose_weight: float = 0.0,
    dilution: float = 1.0,
) -> Score:
    """Cross-entropy on the answers, and with prose_weight on a sample of the other tokens.

    With dilution each row counts its filler up to that many times, to train for longer documents than the row's.

    An answer is right exactly when greedy decoding would give it, its end included.
    """
    log_weights = None
    if dilution > 1:
        log_weights = batch.filler * torch.rand(len(batch.ids), 1, device=batch.ids.device) * math.log(dilution)
    with torch.autocast(batch.ids.device.type, torch.bfloat16):
        h = forward(model, batch.ids, context, log_weights)[:, :-1]
    targets, answer = batch.ids[:, 1:], batch.answer[:, 1:]
    rows = answer > 0
    logits = model.lm_head(h[rows].float())
    loss = F.cross_entropy(logits, targets[rows])
    hits = logits.argmax(-1) == targets[rows]
    names = (torch.arange(len(rows), device=rows.device)[:, None] * (answer.max() + 1) + answer)[rows]
    _, group = names.unique(return_inverse=True)
    wrong = torch.zeros(int(group.max()) + 1, device=rows.device).index_add_(0, group, (~hits).float())
    if prose_weight:
        others = (answer == 0).flatten().nonzero()[:, 0]
        others = others[torch.randperm(len(others), device=others.device)[:1024]]
        prose = F.cross_entropy(model.lm_head(h.flatten(0, 1)[others].float()), targets.flatten()[others])
        loss = loss + prose_weight * prose
    return Score(loss, wrong == 0)
