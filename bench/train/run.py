"""All stages, one after the other, with a checkpoint behind each; and the model as it is shipped."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from retrieval_attn.bench.train.dialogues import Writer
from retrieval_attn.bench.train.model import new_model
from retrieval_attn.bench.train.prose import make_pools, read_corpus
from retrieval_attn.bench.train.stages import STAGES, run_stage
from retrieval_attn.bench.train.tokenizer import train_tokenizer


def train(out: Path, device: str, seed: int, corpus_path: Path | None) -> None:
    """Run all stages, resuming behind the last checkpoint in out/checkpoints; export the model into out."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    log = (out / "train.log").open("a")

    def say(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    start = time.time()
    corpus = read_corpus(corpus_path, 24_000_000, seed)
    if not (out / "tokenizer.json").exists():
        train_tokenizer(corpus, seed, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    pools = make_pools(tokenizer, corpus, seed)
    sizes = [len(pool.tokens) for pool in pools]
    say(f"seed {seed} vocabulary {len(tokenizer)} prose tokens {sizes} {time.time() - start:.0f} s")
    model = new_model(tokenizer, seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for number, stage in enumerate(STAGES):
        path = checkpoints / f"{number:02d}-{stage.name}.pt"
        if path.exists():
            state = torch.load(path, map_location=device)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            continue
        torch.manual_seed(seed + number)
        writer = Writer(tokenizer, pools, np.random.default_rng([seed, number]))
        run_stage(model, optimizer, writer, stage, device, say)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        export(model, out)
    say(f"trained in {time.time() - start:.0f} s")


def export(model: Qwen2ForCausalLM, out: Path) -> None:
    """Save rounded to bfloat16 in the transformers layout, ready for `from_pretrained`."""
    copy = Qwen2ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.update(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, do_sample=False
    )
    copy.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    # Releases before 5.0 look for rope_theta here.
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
