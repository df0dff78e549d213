"""The folder tree is the data flow: imports point down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each file of the runtime may know of the runtime, in the order a request meets them.
RUNTIME = ["host", "cores", "jobs", "config", "patterns", "choose", "window", "resident", "pages", "rows", "int8"]
RUNTIME += ["offload", "build", "far_index", "memory", "stream", "estimate", "decode"]
RUNTIME += ["break_even", "prefill", "compat", "hf", "plan_terms", "plan", "generate", "batch", "session"]
RUNTIME += ["durable", "sealed", "manifest", "saved", "llm", "plan_report", "search_patterns", "chat", "cli"]

# Imports inside a function that close a circle on purpose: the later file calls back into the earlier one's object.
CALLBACKS = {("session", "saved"), ("llm", "saved")}


def imports(path: Path) -> set[str]:
    """Modules that a file imports while running, not only for type checking."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}: {ast.unparse(node)}"
            package = {"index": "retrieval_attn.index", "kernels": "retrieval_attn.kernels"}.get(path.parent.name, "")
            found.add(".".join(filter(None, [package if node.level else "", node.module])))
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "retrieval_attn"}


@pytest.mark.parametrize("path", files("index"), ids=lambda p: p.name)
def test_index_is_a_leaf_without_torch(path):
    assert all(name.startswith(("retrieval_attn.index", "retrieval_attn.host")) for name in ours(path))
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "transformers", "triton"}


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: p.name)
def test_kernels_is_a_leaf_without_transformers(path):
    assert all(name.startswith(("retrieval_attn.kernels", "retrieval_attn.host")) for name in ours(path))
    assert not {name.split(".")[0] for name in imports(path)} & {"transformers", "faiss"}


@pytest.mark.parametrize("path", files("retrieval_attn"), ids=lambda p: p.name)
def test_runtime_points_down(path):
    if path.stem == "__init__":
        return
    known = {name.split(".")[1] for name in ours(path) if name != "retrieval_attn"}
    later = {n for n in known & set(RUNTIME) if RUNTIME.index(n) >= RUNTIME.index(path.stem)}
    assert {(path.stem, n) for n in later} <= CALLBACKS
    if path.stem not in ("chat", "cli"):
        assert "bench" not in known


def test_one_file_imports_faiss_and_few_know_transformers_caches():
    everywhere = [p for folder in ("index", "kernels", "retrieval_attn") for p in files(folder)]
    assert [p.name for p in everywhere if "faiss" in imports(p)] == ["ivf.py"]
    # plan_terms.py only asks which layers a model has.
    assert {p.name for p in everywhere if "transformers.cache_utils" in imports(p)} <= {"hf.py", "plan_terms.py"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("retrieval_attn", ["torch", "transformers", "faiss", "numba"]),
        ("retrieval_attn.index", ["torch", "transformers", "triton"]),
        ("retrieval_attn.kernels", ["transformers", "triton"]),
        ("retrieval_attn.cli", ["torch", "transformers"]),
    ],
)
def test_importing_is_light(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registering_can_be_undone():
    from transformers import AttentionInterface

    import retrieval_attn as ra

    before = dict(AttentionInterface._global_mapping)
    ra.unregister()
    assert "retrieval" not in AttentionInterface()
    ra.register()
    assert "retrieval" in AttentionInterface()
    if "retrieval" not in before:
        ra.unregister()
