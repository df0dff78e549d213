"""Compiling Triton kernels for cards that are not here.

The tests of what kernels compute run them in Triton's interpreter, whose kernels cannot be compiled; so this runs in a
process of its own, many kernels at a time. Results stay in Triton's cache, and a second run is quick.
"""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

# Bytes of shared memory that one program may use, by compute capability: A100, RTX 4090, H100.
SHARED_LIMIT = {80: 163 * 1024, 89: 101_376, 90: 227 * 1024}


class Build(NamedTuple):
    """One kernel as a launch on a card of compute capability `cc` would have it compiled.

    kernel: "module:function", e.g. "retrieval_attn.kernels.sparse.on_gpu:_attend".
    signature: ((argument, type), ...) of all arguments that are not in `constexprs`. Types are "*fp16", "*i32", "i32",
    "i64", "fp32" ...; ":16" behind says what a launch usually finds, an address or a number that 16 divides, without
    which loads are neither wide nor asynchronous.
    constexprs, options: ((name, value), ...), numbers, booleans or strings; options are num_warps, num_stages ...
    """

    kernel: str
    cc: int
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


class Built(NamedTuple):
    """shared: bytes a program; registers a thread; stack: bytes a thread, spilled registers above all."""

    shared: int
    registers: int
    stack: int


@functools.cache
def compile_all(builds: tuple[Build, ...]) -> dict[Build, Built | str]:
    """What became of each build: its measures, or the error. Call it with the builds of a whole test module."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(builds), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {build: r if isinstance(r, str) else Built(*r) for build, r in zip(builds, results, strict=True)}


def compile_case(of: Callable[..., Build], case: tuple[Any, ...], cases: list[Any]) -> Built | str:
    """What became of the build `of(*case)`; the cases with the same marks are compiled together with it."""
    marks = next(c.marks for c in cases if c.values == case)
    return compile_all(tuple(of(*c.values) for c in cases if c.marks == marks))[of(*case)]


def assert_fits(built: Built | str, cc: int) -> None:
    """The build succeeded, its shared memory exists on such a card, and no register is spilled to memory."""
    assert isinstance(built, Built), built
    assert built.shared <= SHARED_LIMIT[cc]
    assert built.stack == 0


def _compile(build: Build) -> tuple[int, int, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = build.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature, constexprs = dict(build.signature), dict(build.constexprs)
    types = {k: "constexpr" if k in constexprs else signature[k].removesuffix(":16") for k in kernel.arg_names}
    divisible = [(i,) for i, k in enumerate(kernel.arg_names) if signature.get(k, "").endswith(":16")]
    source = ASTSource(kernel, types, constexprs, {i: [["tt.divisibility", 16]] for i in divisible})
    target = GPUTarget("cuda", build.cc, 32)
    compiled = triton.compile(source, target=target, options=dict(build.options))
    return (compiled.metadata.shared, *_registers_and_stack(compiled.asm["cubin"]))


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return int(found[0]), int(found[1])


def _result(build: Build) -> tuple[int, int, int] | str:
    try:
        return _compile(build)
    except Exception as error:  # whatever a compiler may raise is the result of this build, not of the others
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps([_result(Build(*build)) for build in json.load(sys.stdin)]))
