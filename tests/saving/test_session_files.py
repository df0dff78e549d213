"""Sessions on disk: what was saved comes back, whatever happens while saving, and nothing else is taken for it."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from laws import rarely, times
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_chat_model

import retrieval_attn as ra
from retrieval_attn.index import storage
from retrieval_attn.saving import atomic_folder, checksums
from retrieval_attn.saving.session_files import FORMAT

EVERYTHING = 1 << 20
CONFIG = ra.RetrievalConfig(index="exact", top_k=EVERYTHING, n_sink=4, n_local=16, exact_below=0, prefill_chunk=50)
TEXT = "The lighthouse keeper counts ships. " * 8

REFUSALS = (ValueError, OSError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def llm(folder):
    return ra.load(folder, CONFIG, dtype="float32")


@pytest.fixture(scope="module")
def session(llm):
    session = llm.session("Be brief.")
    session.ask(TEXT, max_new_tokens=3)
    return session


@pytest.fixture
def saved(session, tmp_path):
    session.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("index", ["exact", "ivf", "graph"])
def test_save_then_restore_gives_the_same_tokens(tmp_path, kind, index):
    """Law 5. Few keys are retrieved, so that the restored index must find the same ones."""
    config = ra.RetrievalConfig(index=index, top_k=8, n_sink=4, n_local=16, exact_below=0)
    llm = ra.load(save_tiny_chat_model(tmp_path / "model", kind), config, dtype="float32")
    session = llm.session("Be brief.")
    session.ask(TEXT + "How many?", max_new_tokens=5)
    session.save(tmp_path / "saved")
    restored = llm.restore(tmp_path / "saved")
    assert restored.messages == session.messages
    ours, theirs = (s.ask("And now?", max_new_tokens=20) for s in (session, restored))
    assert theirs.token_ids == ours.token_ids
    assert theirs.stats.reused_tokens == ours.stats.reused_tokens > 0


def test_a_session_without_far_tokens_or_without_any(llm, tmp_path):
    session = llm.session("Be brief.")
    session.save(tmp_path / "empty")
    session.ask("?", max_new_tokens=1)
    session.save(tmp_path / "short")
    restored = llm.restore(tmp_path / "empty")
    assert restored.ask("?", max_new_tokens=1).token_ids == session.last.token_ids
    assert llm.restore(tmp_path / "short").token_ids == session.token_ids


def test_any_text_comes_back(llm, tmp_path):
    session = llm.session()
    session.ask('"\\\n\0 naïve \N{SNOWMAN}', max_new_tokens=1)
    session.messages.append({"role": "user", "content": "half a character: \ud800"})
    session.save(tmp_path / "saved")
    assert llm.restore(tmp_path / "saved").messages == session.messages


@pytest.mark.parametrize(
    ("index", "kv_dtype", "on_disk"),
    [
        ("scan", "int8", True),
        ("graph", "auto", False),
        *rarely(("graph", "int8", True), ("scan", "int8", False), ("page", "auto", True)),
    ],
)
def test_restored_is_the_same_to_the_bit(folder, tmp_path, kv_dtype, on_disk, index):
    """Also int8, whose near tokens were never rounded; and rows stay in the file, which nobody may need any more."""
    (tmp_path / "rows").mkdir()
    kv_dir = str(tmp_path / "rows") if on_disk else None
    config = dataclasses.replace(CONFIG, index=index, top_k=8, kv_dtype=kv_dtype, kv_dir=kv_dir)
    llm = ra.load(folder, config, dtype="float32")
    session = llm.session()
    session.ask(TEXT + "How many?", max_new_tokens=70)
    session.save(tmp_path / "saved")
    restored = llm.restore(tmp_path / "saved")
    for ours, theirs in zip(session.cache.memories, restored.cache.memories, strict=True):
        assert torch.equal(ours.store.keys(), theirs.store.keys())
        assert torch.equal(ours.store.values(), theirs.store.values())
        assert torch.equal(ours.window.keys(), theirs.window.keys())
        assert theirs.store.scales().keys() == ours.store.scales().keys()
    shutil.rmtree(tmp_path / "saved")
    forks = [restored.fork(), restored]
    for turn in ("And now?", TEXT):
        expected = session.ask(turn, max_new_tokens=70).token_ids
        assert [s.ask(turn, max_new_tokens=70).token_ids for s in forks] == [expected] * 2


def test_a_restored_session_leaves_its_file_alone_and_can_replace_it(llm, session, tmp_path):
    session.save(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    restored = llm.restore(tmp_path / "saved")
    restored.answer(restored.token_ids[:100], max_new_tokens=30)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    restored.save(tmp_path / "saved")
    again = llm.restore(tmp_path / "saved")
    assert again.token_ids == restored.token_ids
    turns = [s.ask("And now?", max_new_tokens=20).token_ids for s in (restored, again)]
    assert turns[0] == turns[1]


def test_the_arrays_of_an_index_are_hashed_once_with_their_file(folder, tmp_path, monkeypatch):
    llm = ra.load(folder, dataclasses.replace(CONFIG, index="page"), dtype="float32")
    session = llm.session()
    session.ask(TEXT, max_new_tokens=3)
    session.save(tmp_path / "saved")
    again, files, digest, file_digest = [], [], storage._digest, checksums._digest
    monkeypatch.setattr(storage, "_digest", lambda data: again.append(type(data)) or digest(data))
    monkeypatch.setattr(checksums, "_digest", lambda path: files.append(path.name) or file_digest(path))
    llm.restore(tmp_path / "saved")
    n_indexes = sum(name.endswith(".index") for name in files)
    assert len(files) == len(set(files))
    assert n_indexes > 0
    assert again == [bytes] * n_indexes


def test_where_files_cannot_cover_memory_they_are_read(llm, saved, monkeypatch):
    expected = llm.restore(saved).ask("And now?", max_new_tokens=10).token_ids
    monkeypatch.setattr("retrieval_attn.kv.shared_rows.CAN_COVER", False)
    restored = llm.restore(saved)
    fork = restored.fork()
    assert [s.ask("And now?", max_new_tokens=10).token_ids for s in (restored, fork)] == [expected] * 2


def test_a_session_beyond_the_limits_is_refused(folder, saved):
    llm = ra.load(folder, dataclasses.replace(CONFIG, max_host_bytes=1000), dtype="float32")
    with pytest.raises(MemoryError, match="max_host_bytes=1000"):
        llm.restore(saved)


def test_save_replaces_an_older_session_and_nothing_else(llm, tmp_path):
    session = llm.session()
    session.ask("One", max_new_tokens=2)
    session.save(tmp_path / "saved")
    session.ask("Two", max_new_tokens=2)
    session.save(tmp_path / "saved")
    assert len(llm.restore(tmp_path / "saved").messages) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"name": "a browser extension"}')
    for name in ("mine", "mine/manifest.json"):
        with pytest.raises(FileExistsError, match="not a saved session"):
            session.save(tmp_path / name)


def test_a_link_to_a_session_stays_a_link(session, saved, llm, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(saved)
    llm.restore(link).save(link)
    assert link.is_symlink()
    assert llm.restore(saved).token_ids == session.token_ids
    assert [p.name for p in link.parent.iterdir()] == ["link"]


def test_session_saved_after_an_interrupted_read_restores_its_own_cache(llm, tmp_path):
    """The cache then holds tokens that are not part of the conversation."""
    session = llm.session()
    session.ask("One?", max_new_tokens=3)

    def stop_late(progress):
        if progress.done >= 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read(TEXT, on_progress=stop_late)
    session.save(tmp_path / "saved")
    restored = llm.restore(tmp_path / "saved")
    question = "How many ships does the keeper count, and why? " * 3
    ours, theirs = (s.ask(question, max_new_tokens=6) for s in (session, restored))
    assert theirs.token_ids == ours.token_ids
    assert theirs.stats.reused_tokens == ours.stats.reused_tokens
    assert ours.token_ids == llm.generate(session.token_ids[:-6], max_new_tokens=6).token_ids


@pytest.mark.parametrize("layer", [0, 1])
def test_session_saved_after_a_pass_was_interrupted_between_layers(llm, tmp_path, monkeypatch, layer):
    """And again before the cache was settled: some layers then hold tokens that others do not."""
    session, done = llm.session(), []

    def interrupt(self, *args, **kwargs):
        done.append(1)
        if len(done) == 4 + layer:
            raise KeyboardInterrupt
        return attend(self, *args, **kwargs)

    layer_type = type(session.cache.layers[0])
    attend = layer_type.attend
    monkeypatch.setattr(layer_type, "attend", interrupt)
    monkeypatch.setattr(type(session.cache), "settle", lambda cache: None)
    with pytest.raises(KeyboardInterrupt):
        session.ask(TEXT, max_new_tokens=3)
    monkeypatch.undo()
    session.save(tmp_path / "saved")
    theirs, ours = (s.ask(TEXT, max_new_tokens=3) for s in (llm.restore(tmp_path / "saved"), session))
    assert theirs.token_ids == ours.token_ids
    assert theirs.stats.reused_tokens == ours.stats.reused_tokens == 50


class TestRestoreRefuses:
    def test_nothing_there(self, llm, tmp_path):
        with pytest.raises(FileNotFoundError, match="no saved session"):
            llm.restore(tmp_path / "nothing" / "at all")

    def test_another_model(self, saved, tmp_path):
        other = ra.load(save_tiny_chat_model(tmp_path / "other", "qwen2"), CONFIG, dtype="float32")
        with pytest.raises(ValueError, match="another model"):
            other.restore(saved)

    def test_other_options_that_decide_what_is_stored(self, saved, folder):
        other = ra.load(folder, dataclasses.replace(CONFIG, n_local=17), dtype="float32")
        with pytest.raises(ValueError, match="saved with n_local=16, but the model is loaded with 17"):
            other.restore(saved)
        assert ra.load(folder, dataclasses.replace(CONFIG, threads=1, top_k=5), dtype="float32").restore(saved)

    def test_other_formats(self, llm, saved):
        manifest = json.loads((saved / "manifest.json").read_text())
        for number, says in ((FORMAT + 1, "saved by a later version"), (1, "saved by an earlier version")):
            (saved / "manifest.json").write_text(json.dumps(manifest | {"format": number}))
            with pytest.raises(ValueError, match=f"{says}: it has format {number}"):
                llm.restore(saved)


def said(folder):
    """What a manifest says, without what sealing adds."""
    manifest = checksums.read_manifest(folder, FORMAT)
    return {name: value for name, value in manifest.items() if name not in ("sha256", "format", "files")}


def seal_again(folder, fields):
    """As a forger would."""
    (folder / "manifest.json").unlink()
    checksums.write_manifest(folder, FORMAT, fields)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("versions", None, "must be an object, got None"),
        ("model", 5, "must be a string, got 5"),
        ("config", [], r"must be an object, got \[\]"),
        ("config", {"n_sink": "x"}, "n_sink must be an integer"),
        ("config", {"nonsense": 1}, "unknown config field 'nonsense'"),
        ("system", 5, "must be a string or null, got 5"),
        ("messages", "hello", "must be a list of role and content"),
        ("messages", [{"role": "user"}], "must be a list of role and content"),
        ("messages", [{"role": "user", "content": 5}], "must be a list of role and content"),
        ("answer_start", True, "must be an integer or null"),
        ("answer_start", -1, "must lie within token_ids, got -1"),
        ("answer_start", 10**6, "must lie within token_ids, got 1000000"),
        ("turn_open", 0, "must be true or false, got 0"),
        ("token_ids", [1.0], r"must be a list of integers, got \[1.0\]"),
        ("token_ids", [-1], "must be between 0 and 259"),
        ("cached_ids", [260], "must be between 0 and 259"),
        ("cached_ids", [], "it must not list layer-000.index"),
        ("cached_ids", [5] * 10, "it must not list layer-000.index"),
        ("cached_ids", [5] * 300, r"must hold keys \[2, 300, 16\]"),
    ],
)
def test_a_sealed_manifest_is_not_believed(llm, saved, name, value, says):
    fields = said(saved)
    seal_again(saved, fields | {name: value})
    with pytest.raises(ValueError, match=f"(manifest.json|layer-000.safetensors) .*{says}"):
        llm.restore(saved)


def test_a_sealed_manifest_that_lacks_a_field(llm, saved):
    fields = said(saved)
    for name in fields:
        seal_again(saved, {key: value for key, value in fields.items() if key != name})
        with pytest.raises(ValueError, match=f"manifest.json is damaged: {name} is missing"):
            llm.restore(saved)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        *(without(name) for name in ("keys", "values", "sample_counts", "sample_recent")),
        lambda tensors: tensors | {"keys": tensors["keys"][:, 1:].contiguous()},
        lambda tensors: tensors | {"keys": tensors["keys"][0].contiguous()},
        lambda tensors: tensors | {"values": tensors["values"].double()},
        lambda tensors: tensors | {"sample_counts": tensors["sample_counts"][:3].contiguous()},
        lambda tensors: {},
    ],
)
def test_sealed_tensors_of_another_kind(llm, saved, change):
    path, fields = saved / "layer-001.safetensors", said(saved)
    save_file(change(load_file(path)), path)
    seal_again(saved, fields)
    with pytest.raises(ValueError, match=r"layer-001.safetensors"):
        llm.restore(saved)


def test_sealed_files_of_another_kind(llm, saved, session, tmp_path):
    fields = said(saved)
    swap(saved / "layer-000.index", saved / "layer-001.index")
    seal_again(saved, fields)
    with pytest.raises(ValueError, match="layer-000.index belongs to other keys"):
        llm.restore(saved)
    (saved / "layer-001.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    (saved / "layer-000.index").write_bytes(b"")
    for name in ("layer-000.index", "layer-001.safetensors"):
        seal_again(saved, fields)
        with pytest.raises(ValueError, match=name):
            llm.restore(saved)
        shutil.rmtree(saved)
        session.save(saved)
        (saved / "layer-001.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    (saved / "layer-001.safetensors").unlink()
    seal_again(saved, fields)
    with pytest.raises(ValueError, match="manifest.json is damaged: it does not list layer-001.safetensors"):
        llm.restore(saved)


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def flip(path, rng):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def fuzz_header(path, rng):
    """New bytes where a safetensors file keeps the length of its header, names and offsets, and a manifest its text."""
    raw = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 20)):
        raw[rng.randrange(min(len(raw), 300))] ^= rng.randint(1, 255)
    path.write_bytes(raw + b" ")


def fuzz_text(path, rng):
    """Break, nest or lengthen the text of a manifest, or what comes first in another file."""
    raw = path.read_bytes()
    at = rng.randrange(min(len(raw), 2000))
    path.write_bytes(raw[:at] + rng.choice([b"[" * 50_000, b'"', b"}", b"\xff", b"9" * 5000, b"null"]) + raw[at:])


def repeat(path, rng):
    path.write_bytes(path.read_bytes() * rng.randint(2, 3))


def empty(path, rng):
    path.write_bytes(b"")


def delete(path, rng):
    path.unlink()


def overwrite(path, rng):
    """The content of another file; all differ."""
    others = [other for other in sorted(path.parent.iterdir()) if other != path]
    path.write_bytes(rng.choice(others).read_bytes())


MUTATIONS = (flip, flip, flip, truncate, fuzz_header, fuzz_text, repeat, empty, delete, overwrite)


def test_200_damaged_sessions(llm, saved, tmp_path):
    """Each is refused, by the name of the damaged file."""
    rng = random.Random(0)
    names = sorted(path.name for path in saved.iterdir())
    for number in range(200):
        damaged = tmp_path / str(number)
        shutil.copytree(saved, damaged)
        path = damaged / rng.choice(names)
        rng.choice(MUTATIONS)(path, rng)
        with pytest.raises(REFUSALS, match=path.name) as caught:
            llm.restore(damaged)
        assert "\n" not in str(caught.value)
        shutil.rmtree(damaged)


def test_100_forged_headers(llm, saved, tmp_path):
    """The checksums agree, the header is nonsense: refused, or read as what it says, never another exception."""
    rng, fields, refused = random.Random(1), said(saved), 0
    for number in range(100):
        forged = tmp_path / str(number)
        shutil.copytree(saved, forged)
        forge_header(forged / f"layer-00{rng.randrange(3)}.{rng.choice(['safetensors', 'index'])}", rng)
        seal_again(forged, fields)
        with contextlib.suppress(REFUSALS):
            refused += 1
            llm.restore(forged)
            refused -= 1
        shutil.rmtree(forged)
    assert refused > 60


def forge_header(path, rng):
    raw = path.read_bytes()
    stop = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:stop])
    name = rng.choice(sorted(header))
    if name == "__metadata__" or rng.random() < 0.2:
        del header[name]
    else:
        field, values = rng.choice(
            [
                ("dtype", ["F16", "I64", "U8", "F64", "BOOL"]),
                ("shape", [[], [0], [2, 2], header[name]["shape"][::-1], [*header[name]["shape"], 1]]),
                ("data_offsets", [[0, 0], [0, 8], [8, 0], [0, 1 << 62]]),
            ]
        )
        header[name][field] = rng.choice(values)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[stop:])


@pytest.fixture
def grown(llm, saved):
    """The saved session, one turn later."""
    grown = llm.restore(saved)
    grown.ask("And now?", max_new_tokens=2)
    return grown


def assert_untouched(llm, session, saved, grown):
    """The older session is whole, nothing is left beside it, and the live one goes on."""
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    restored = llm.restore(saved)
    assert restored.token_ids == session.token_ids
    before = list(grown.token_ids)
    done = grown.ask("Sure?", max_new_tokens=2)
    assert grown.token_ids[: len(before)] == before
    assert done.token_ids == llm.generate(grown.token_ids[:-2], max_new_tokens=2).token_ids


def test_a_file_that_cannot_be_written_leaves_the_older_session(llm, session, saved, grown):
    """A limit on the size of files stops the writer as a full disk does: midway, in its own code."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"saved was not saved: File too large; at least .* MiB are needed") as caught:
            grown.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert_untouched(llm, session, saved, grown)


def test_a_disk_that_fills_up_leaves_the_older_session(llm, session, saved, grown, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device; at least .* needed, .* free"):
        grown.save(saved)
    monkeypatch.undo()
    assert_untouched(llm, session, saved, grown)


def test_a_folder_that_may_not_be_written_to(llm, session, saved, grown, monkeypatch):
    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "x", path)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PermissionError, match="saved was not saved: Permission denied"):
        grown.save(saved)
    monkeypatch.undo()
    assert_untouched(llm, session, saved, grown)


# In a process of its own, with file systems of its own, which end with it.
FULL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
import retrieval_attn as ra
from retrieval_attn.index import storage
model, config, source, disk = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], check=True)
llm = ra.load(model, eval(config, vars(ra)), dtype="float32")
older, saved = llm.restore(source), Path(disk, "home", "saved")
older.save(saved)
grown = llm.restore(saved)

def fail_to_save():
    grown.ask("And now?", max_new_tokens=2)
    try:
        grown.save(saved)
    except OSError as error:
        print(error)
    assert list(saved.parent.iterdir()) == [saved]
    assert llm.restore(saved).token_ids == older.token_ids

# Room for the tensors, but for nothing else; then not even for them.
tensors = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
for room in (tensors + 8192, tensors // 2):
    filler = Path(disk, "filler")
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
    fail_to_save()
    filler.unlink()
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
fail_to_save()
"""


def may_mount(disk):
    """The command under which file systems may be mounted, or None."""
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        mount = [*command, "mount", "-t", "tmpfs", "none", str(disk)]
        if shutil.which("unshare") and subprocess.run(mount, capture_output=True).returncode == 0:
            return command
    return None


@pytest.mark.long
def test_a_real_disk_full_and_read_only(folder, saved, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = may_mount(disk)
    if unshare is None:
        pytest.skip("no file system may be mounted here")
    command = [*unshare, sys.executable, "-c", FULL_DISK, folder, repr(CONFIG), saved, disk]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    full, fuller, read_only = done.stdout.splitlines()
    for line in (full, fuller):
        assert re.search(r"saved was not saved: No space left on device; at least .* MiB are needed, .* are free", line)
    assert "saved was not saved: Read-only file system" in read_only


# Forks a process that saves two sessions in turn to one place until it is killed; so imports are paid once.
SAVER = """
import os, sys, time
import torch
import retrieval_attn as ra
from retrieval_attn.index import storage
from retrieval_attn.saving import atomic_folder
model, config, target, one_step, *folders = sys.argv[1:]
torch.set_num_threads(1)
if one_step == "False":
    # Time to be killed between the two.
    rename, atomic_folder._exchange = os.rename, lambda a, b: False
    os.rename = lambda a, b: (rename(a, b), time.sleep(0.05))
llm = ra.load(model, eval(config, vars(ra)), dtype="float32")
sessions = [llm.restore(folder) for folder in folders]
parent = os.getpid()
while sys.stdin.readline():
    child = os.fork()
    while child == 0 and os.getppid() == parent:
        for session in sessions:
            session.save(target)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.mark.parametrize(("one_step", "kills"), [(True, 18), *rarely((False, 10))])
def test_killed_at_any_instant_of_a_save(llm, folder, session, saved, grown, tmp_path, one_step, kills):
    """`kill -9` leaves one of the two sessions, whole; the next save clears away what it left besides."""
    grown.save(tmp_path / "grown")
    target = tmp_path / "place" / "target"
    session.save(target)
    command = [sys.executable, "-c", SAVER, folder, repr(CONFIG), target, str(one_step), saved, tmp_path / "grown"]
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    rng, left_over = random.Random(0), 0
    with subprocess.Popen(
        list(map(str, command)), env=os.environ | threads, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as saver:
        for _ in range(times(kills)):
            print(file=saver.stdin, flush=True)
            pid = int(saver.stdout.readline())
            time.sleep(rng.uniform(0.01, 0.2))
            os.kill(pid, 9)
            assert saver.stdout.readline() == "dead\n"
            left_over += len(list(target.parent.iterdir())) > 1
            restored = llm.restore(target)
            assert restored.token_ids in (session.token_ids, grown.token_ids)
        saver.stdin.close()
    # Otherwise all kills came between two saves, and nothing was tested.
    assert left_over
    restored.save(target)
    assert list(target.parent.iterdir()) == [target]
    ours, theirs = (s.ask("Sure?", max_new_tokens=3) for s in (restored, llm.restore(target)))
    assert theirs.token_ids == ours.token_ids


def test_a_save_cut_between_two_renames_is_undone(llm, session, saved):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    saved.rename(saved.with_name(f".saved.{child.pid}.0.old"))
    assert llm.restore(saved).token_ids == session.token_ids
    assert list(saved.parent.iterdir()) == [saved]


def test_needed_room_is_what_the_tensors_take(session, saved, monkeypatch, tmp_path):
    needed = []
    monkeypatch.setattr(atomic_folder, "_check_room", lambda folder, at_least: needed.append(at_least))
    session.save(tmp_path / "again")
    written = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert 0.98 * written < needed[0] < written
