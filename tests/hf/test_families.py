"""Every type of language model that transformers registers gives stock's logits, or is refused by name early.

The sweep is family_sweep.py, which says how; what it found is kept in family_results.json, of which docs/models.md is
made.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from families import TYPES
from family_page import PAGE, RECORDED, page

# One of each kind: with biases, windows beside full attention, recurrent with positions to be said, learned sinks; two
# that see images, one of them with positions on three axes.
EQUAL = ["gpt2", "gemma3_text", "bamba", "falcon_h1", "gpt_oss", "mistral3", "qwen2_vl"]

REFUSED = ["inkling_text", "gemma2", "deepseek_v3", "blip-2", "paligemma"]

# Without the keys that are far, logits of a family differ by more than this; those of an equal one by less than a tenth
# of TOLERANCE in family_sweep.py.
BLUNT = 0.02


# Other releases know other types, and serve fewer.
AS_RECORDED = pytest.mark.skipif(
    transformers.__version__ != json.loads(RECORDED.read_text())["transformers"],
    reason="the record is of another release of transformers",
)


def sweep(*families: str) -> dict[str, dict[str, Any]]:
    """What becomes of these families, or of all, in a process that has run no thread yet: it forks one for each."""
    script = Path(__file__).parents[1] / "helpers" / "family_sweep.py"
    done = subprocess.run([sys.executable, script, *families], capture_output=True, text=True, check=True)
    return {row["family"]: row for row in map(json.loads, done.stdout.splitlines())}


def verdicts(rows: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {name: (row["result"], row["reason"]) for name, row in rows.items()}


@pytest.fixture(scope="module")
def recorded():
    return {row["family"]: row for row in json.loads(RECORDED.read_text())["families"]}


@AS_RECORDED
def test_a_few_families_fare_as_recorded(recorded):
    assert set(recorded) == set(TYPES)
    found = sweep(*EQUAL, *REFUSED)
    assert verdicts(found) == verdicts({name: recorded[name] for name in found})
    assert {name: row["result"] for name, row in found.items()} == {
        **dict.fromkeys(EQUAL, "equal"),
        **dict.fromkeys(REFUSED, "refused"),
    }
    assert all(found[name]["blunt"] > BLUNT for name in EQUAL)


def test_the_record_has_every_type_and_no_failure(recorded):
    assert {row["result"] for row in recorded.values()} == {"equal", "refused"}
    equal = [row for row in recorded.values() if row["result"] == "equal"]
    assert all(row["blunt"] > BLUNT and row["error"] < 1e-4 for row in equal)
    # Their parts for sound take no attention function, so that their share cannot be told.
    told = [row for row in equal if row["family"] not in ("gemma4", "apertus1p5")]
    assert all(0.3 < row["mass"] < 0.7 for row in told)
    assert all(row["reason"].startswith(f"'{name}' ") for name, row in recorded.items() if row["result"] == "refused")


def test_the_page_is_what_was_recorded():
    assert PAGE.read_text() == page(json.loads(RECORDED.read_text()))


@AS_RECORDED
@pytest.mark.long
def test_every_type_fares_as_recorded(recorded):
    assert verdicts(sweep()) == verdicts(recorded)
