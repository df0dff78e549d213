"""Train and measure the embedded model: a tiny Qwen2 that answers questions about facts in very long texts.

It is no part of a wheel; from a checkout, in the environment that `make test` makes:

    python -m retrieval_attn.bench.train.command --out DIR --device cpu --seed 0 [--corpus prose.txt.xz]
    python -m retrieval_attn.bench.train.command --eval-only DIR --lengths 8k,32k,64k,128k --questions 100

Training goes from copying random tokens to conversations about documents of doubling length. Behind
very long ones full back-propagation is too slow on a CPU; there the document runs forward once, its hidden states are
kept, and only the questions behind it (and the keys and values made from the kept states) take part in
back-propagation.
A checkpoint follows each stage; the same command resumes. `--corpus` adds real prose (plain or .xz, works separated by
form feeds) to the generated filler.
"""

import argparse
from pathlib import Path

from retrieval_attn.bench.train.evaluate import evaluate
from retrieval_attn.bench.train.run import train


def _length(text: str) -> int:
    return int(text[:-1]) * 1024 if text[-1] in "kK" else int(text)


def main() -> None:
    """Train a model, or measure one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for tokenizer, checkpoints and model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="real prose to train on, .txt or .txt.xz")
    parser.add_argument("--eval-only", type=Path, metavar="DIR", help="measure the model in DIR instead of training")
    parser.add_argument("--lengths", default="8k,32k,64k,128k")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--books", type=Path, nargs="*", default=[], help="texts to use as filler in measurements")
    args = parser.parse_args()
    if args.eval_only:
        lengths = [_length(part) for part in args.lengths.split(",")]
        evaluate(args.eval_only, lengths, args.questions, args.books, args.device, args.seed)
    elif args.out:
        train(args.out, args.device, args.seed, args.corpus)
    else:
        parser.error("one of --out and --eval-only is needed")


if __name__ == "__main__":
    main()
