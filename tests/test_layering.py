"""The folder tree is the data flow: rooms stand in an order, imports point down it, and no files form a circle."""

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The rooms of the package, lowest first. A file of a room may import its own room and those before it.
ROOMS = [
    "atomic_file",
    "arrays",
    "code_cache",
    "compiled",
    "threads",
    "config",
    "index",
    "kernels",
    "kv",
    "far",
    "attention",
    "hf",
]
ROOMS += [
    "plan",
    "detokeniser",
    "generate",
    "batch",
    "saving",
    "session",
    "llm",
    "search_patterns",
    "terminal",
    "embedded",
]
ROOMS += ["bench", "cli"]

# What the two leaves share with the runtime.
GROUND = {"arrays", "atomic_file", "compiled", "threads.pool"}

# The rooms of the benchmarks, lowest first.
BENCH_ROOMS = ["shared", "vectors", "methods", "quality", "demo", "latency", "recall", "kernels", "memory", "long"]
BENCH_ROOMS += ["ppl", "fidelity", "ruler", "needle", "scbench", "harness", "compare", "report", "suite", "gpu_check"]
BENCH_ROOMS += ["train"]

# A folder that holds more is divided.
MOST_FILES = 20


def module_of(path: Path) -> str:
    """The dotted name below `retrieval_attn`; "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "retrieval_attn" else parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


FILES = {
    module_of(path): path
    for folder in ("retrieval_attn", "index", "kernels", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Every module that a file imports, also within functions, and for type checking alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out, as from retrieval_attn..., not relative"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def known(path: Path) -> set[str]:
    """The modules of ours among them."""
    found = set()
    for name in imported(path):
        own = name.removeprefix("retrieval_attn.")
        if name.startswith("retrieval_attn.") and own in FILES:
            found.add(own)
        elif name.startswith("retrieval_attn."):
            found.add(own.rpartition(".")[0])
    return found - {""}


GRAPH = {module: known(path) - {module} for module, path in FILES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, one after the other; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_each_other_in_a_circle():
    assert circle(GRAPH) == []


def test_a_circle_is_found():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


def folder_graph() -> dict[str, set[str]]:
    """Which folders import which; a file beside folders is a room of its own."""

    def room(module: str) -> str:
        package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
        return package if package not in ("", "bench", "index", "kernels") else module

    graph: dict[str, set[str]] = {}
    for module, seen in GRAPH.items():
        if FILES[module].name != "__init__.py":
            graph.setdefault(room(module), set()).update(room(other) for other in seen)
    return {name: seen - {name} for name, seen in graph.items()}


def test_no_folders_import_each_other_in_a_circle():
    assert circle(folder_graph()) == []


@pytest.mark.parametrize("module", [m for m in GRAPH if m], ids=str)
def test_rooms_point_down(module):
    room = module.split(".")[0]
    assert room in ROOMS, f"{room} has no place in ROOMS"
    seen = {other.split(".")[0] for other in GRAPH[module]}
    above = {other for other in seen if ROOMS.index(other) > ROOMS.index(room)}
    assert not above, f"{module} stands below {above}"
    if room in ("index", "kernels"):
        assert {m for m in GRAPH[module] if m.split(".")[0] != room} <= GROUND
    if room not in ("bench", "cli"):
        assert "bench" not in seen


@pytest.mark.parametrize("module", [m for m in GRAPH if m.startswith("bench.")], ids=str)
def test_rooms_of_the_benchmarks_point_down(module):
    room = module.split(".")[1]
    assert room in BENCH_ROOMS, f"{room} has no place in BENCH_ROOMS"
    seen = {other.split(".")[1] for other in GRAPH[module] if other.startswith("bench.")}
    assert not {other for other in seen if BENCH_ROOMS.index(other) > BENCH_ROOMS.index(room)}


def test_folders_are_small():
    folders = {path.parent for path in FILES.values()}
    sizes = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: n for name, n in sizes.items() if n > MOST_FILES} == {}


def users_of(library: str) -> set[str]:
    return {m for m, path in FILES.items() if any(n == library or n.startswith(f"{library}.") for n in imported(path))}


def test_what_each_folder_never_knows():
    for library in ("torch", "transformers", "triton"):
        assert not {m for m in users_of(library) if m.split(".")[0] == "index"}
    assert not {m for m in users_of("transformers") if m.split(".")[0] == "kernels"}
    assert {m for m in users_of("faiss") if not m.startswith("bench.")} == {"index.ivf"}


def test_above_the_kernels_nobody_computes_with_an_lse():
    """States are merged, put beside each other, and asked for shares; hf.layer copies rows of them."""
    naming = {
        module
        for module, path in FILES.items()
        if any(isinstance(node, ast.Attribute) and node.attr == "lse" for node in ast.walk(ast.parse(path.read_text())))
    }
    assert {m for m in naming if m.split(".")[0] not in ("kernels", "bench")} == {"hf.layer"}


def test_no_clock_decides_what_is_read():
    """In the rooms that choose what is read, the time is only looked at to be told in the stats."""
    deciding = {m for m in FILES if m.split(".")[0] in ("index", "kernels", "kv", "far", "attention", "hf")}
    clocks = {m for name in ("time", "timeit", "datetime", "random") for m in users_of(name)}
    assert deciding & clocks == {"attention.decode", "far.index_build"}
    # How much memory is free says which index a far context gets, and that is told beside it.
    assert deciding & users_of("psutil") == {"far.index_choice"}


def test_one_folder_knows_transformers_caches():
    runtime = {m for m in users_of("transformers.cache_utils") if not m.startswith("bench.")}
    # plan.terms only asks which layers a model has.
    assert {m for m in runtime if not m.startswith("hf.")} <= {"plan.terms"}


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
