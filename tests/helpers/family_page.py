"""docs/models.md, from what the sweep found: `python family_sweep.py > found; python family_page.py found`."""

import json
import sys
from pathlib import Path
from typing import Any

import transformers

RECORDED = Path(__file__).with_name("family_results.json")

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

HEAD = """\
# Which models are served

Every type that transformers {version} registers for causal language models ("text"), or for models that see images, too
("image-text", of which the text side is served: text in, text out), as a tiny random model in float32 whose best 32
keys hold about half of the attention. *Equal*: with all keys read, the logits of a prompt in one pass and in chunks, of
the answer, of a batch padded on the left and of a follow-up turn are those of stock attention, through transformers'
`generate` and through `retrieval_attn.load`; the error is the largest difference of a logit over the largest logit.
*Refused*: the model is refused by its name, with this reason, before its weights are read. There is nothing else:
{equal} types are equal ({text} text, {image_text} image-text), {refused} are refused.

Made by `tests/helpers/family_page.py`; `make test` tries a few of the types anew, `make test-long` all of them.

| type | kind | result | reason, or error of the logits |
| --- | --- | --- | --- |
"""


def page(recorded: dict[str, Any]) -> str:
    """The page that says what was recorded."""
    rows = recorded["families"]
    n = {result: sum(row["result"] == result for row in rows) for result in ("equal", "refused")}
    kinds = [row["kind"] for row in rows if row["result"] == "equal"]
    n |= {"text": kinds.count("text"), "image_text": kinds.count("image-text")}
    return HEAD.format(version=recorded["transformers"], **n) + "".join(map(_line, rows))


def _line(row: dict[str, Any]) -> str:
    what = row["reason"].removeprefix(f"'{row['family']}' ") if row["reason"] else f"{row['error']:.0e}"
    return f"| `{row['family']}` | {row['kind']} | {row['result']} | {what} |\n"


def main() -> None:
    found = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    recorded = {"transformers": transformers.__version__, "families": sorted(found, key=lambda row: row["family"])}
    lines = ",\n  ".join(map(json.dumps, recorded["families"]))
    RECORDED.write_text(f'{{"transformers": "{recorded["transformers"]}", "families": [\n  {lines}\n]}}\n')
    PAGE.write_text(page(recorded))


if __name__ == "__main__":
    main()
