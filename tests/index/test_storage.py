"""One file per index: what was saved comes back, and nothing else is taken for it."""

import numpy as np
import pytest
from index_vectors import as_bfloat16, attention_like

from retrieval_attn.index import INDEX_KINDS, build_index, load_index, storage

every_kind = pytest.mark.parametrize("kind", INDEX_KINDS)


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=1500, n_queries=64)


@pytest.fixture(scope="module")
def indexes(scene):
    return {kind: build_index(kind, as_bfloat16(scene.keys), scene.queries) for kind in INDEX_KINDS}


def same(a, b, q):
    for x, y in zip(a.search(q, k=50), b.search(q, k=50), strict=True):
        np.testing.assert_array_equal(x, y)
    assert (a.kind, a.shape, a.n_keys) == (b.kind, b.shape, b.n_keys)


@every_kind
@pytest.mark.parametrize("with_keys", [True, False])
def test_a_loaded_index_gives_the_same_results(kind, with_keys, scene, indexes, tmp_path):
    path = tmp_path / "layer.index"
    indexes[kind].save(path, with_keys)
    loaded = load_index(path, keys=None if with_keys else as_bfloat16(scene.keys))
    same(indexes[kind], loaded, scene.later)
    assert list(tmp_path.iterdir()) == [path]


@every_kind
def test_a_loaded_index_grows_like_the_first(kind, scene, tmp_path):
    index = build_index(kind, scene.keys[:, :700], scene.queries)
    index.append(scene.keys[:, 700:800])
    index.save(tmp_path / "a")
    loaded = load_index(str(tmp_path / "a"))
    for at in range(800, 1500, 350):
        index.append(scene.keys[:, at : at + 350])
        loaded.append(scene.keys[:, at : at + 350])
    same(index, loaded, scene.later)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_keys_keep_their_dtype_and_size(dtype, scene, tmp_path):
    stored = as_bfloat16(scene.keys) if dtype == "bfloat16" else scene.keys.astype(dtype)
    build_index("exact", stored).save(tmp_path / "a")
    saved = storage.read(tmp_path / "a")
    assert saved.keys.dtype_name == dtype
    np.testing.assert_array_equal(saved.keys.array, stored)
    assert (tmp_path / "a").stat().st_size < stored.nbytes + 4096


def test_without_keys_the_file_needs_them(scene, indexes, tmp_path):
    indexes["graph"].save(tmp_path / "a", with_keys=False)
    with pytest.raises(ValueError, match="saved without its keys; pass them"):
        load_index(tmp_path / "a")


@pytest.mark.parametrize("with_keys", [True, False])
def test_other_keys_are_refused(with_keys, scene, indexes, tmp_path):
    indexes["graph"].save(tmp_path / "a", with_keys)
    with pytest.raises(ValueError, match="other keys"):
        load_index(tmp_path / "a", keys=as_bfloat16(scene.keys[:, ::-1].copy()))
    with pytest.raises(ValueError, match=r"belongs to keys \(2, 1500, 64\) bfloat16, got \(2, 1499, 64\)"):
        load_index(tmp_path / "a", keys=as_bfloat16(scene.keys[:, 1:]))
    with pytest.raises(ValueError, match="got .* float32"):
        load_index(tmp_path / "a", keys=scene.keys)


@every_kind
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(kind, share, indexes, tmp_path):
    indexes[kind].save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="truncated"):
        load_index(tmp_path / "a")


@every_kind
def test_an_altered_file_is_refused(kind, indexes, tmp_path):
    indexes[kind].save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in (start, (start + len(whole)) // 2, len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="damaged: the checksum of"):
            load_index(tmp_path / "a")


def test_an_altered_header_is_refused(indexes, tmp_path):
    indexes["graph"].save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    assert whole.count(b"bfloat16") == 1
    (tmp_path / "a").write_bytes(whole.replace(b"bfloat16", b"bfloat61"))
    with pytest.raises(ValueError, match="damaged: the checksum of its header"):
        load_index(tmp_path / "a")


def test_other_versions_and_other_files_are_refused(indexes, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "VERSION", 99)
    indexes["exact"].save(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 99, this program reads version 2; build the index again"):
        load_index(tmp_path / "a")
    storage.save_file({"x": np.zeros(3)}, tmp_path / "b")
    with pytest.raises(ValueError, match="no index file"):
        load_index(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no index file at"):
        load_index(tmp_path / "c")


def test_a_failed_save_leaves_the_old_file(indexes, tmp_path, monkeypatch):
    indexes["exact"].save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        indexes["graph"].save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@every_kind
def test_what_the_caller_has_verified_is_not_hashed_again(kind, scene, indexes, tmp_path, monkeypatch):
    """Only the header is, which says what the arrays mean; without `verified`, every array is hashed, once."""
    path, keys, hashed, digest = tmp_path / "a", as_bfloat16(scene.keys), [], storage._digest
    indexes[kind].save(path, with_keys=False)
    monkeypatch.setattr(storage, "_digest", lambda data: hashed.append(data) or digest(data))
    same(indexes[kind], load_index(path, keys, verified=True), scene.later)
    assert [type(data) for data in hashed] == [bytes]
    hashed.clear()
    load_index(path, keys)
    arrays = [data.nbytes for data in hashed if not isinstance(data, bytes)]
    size = path.stat().st_size
    assert size - 8192 < sum(arrays) <= size
