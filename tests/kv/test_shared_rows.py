"""Rows that forks and files share: each side reads its own, and what is common is held once."""

import mmap
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import examples

from retrieval_attn.kv.address_space import AddressSpace, OpenFile
from retrieval_attn.kv.shared_rows import FEW, SharedRows

CAPACITY = 40_000


def numbers(n, seed=0, heads=2, dim=8, dtype=torch.float32):
    return torch.randn((heads, n, dim), generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(content, folder=None):
    heads, _, dim = content.shape
    rows = SharedRows(heads, CAPACITY, dim, content.dtype, folder)
    rows.write(0, content)
    return rows


def huge_pages():
    """Whether the system gives them to memory that asks."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return switch.exists() and "[never]" not in switch.read_text()


def in_huge_pages(tensor):
    """Bytes of the mapping of a tensor that lie in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no mapping holds it")


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return tmp_path if request.param == "disk" else None


@pytest.mark.parametrize("n", [1, 100, FEW + 1, 20_000])
def test_a_fork_and_its_origin_write_apart(folder, n):
    content = numbers(n)
    rows = rows_of(content, folder)
    address = rows.tensor.data_ptr()
    twin = rows.fork(n)
    assert rows.tensor.data_ptr() == address
    assert torch.equal(twin.tensor[:, :n], content)
    rows.write(n, numbers(500, 1))
    twin.write(n, numbers(500, 2))
    half = n // 2
    rows.forget(half)
    rows.write(half, numbers(30, 3))
    for side, seed in ((rows, 1), (twin, 2)):
        assert torch.equal(side.tensor[:, n + 30 : n + 500], numbers(500, seed)[:, 30:])
    assert torch.equal(twin.tensor[:, :n], content)
    assert torch.equal(rows.tensor[:, half : half + 30], numbers(30, 3))


changes = st.lists(
    st.tuples(st.sampled_from(["append", "crop", "fork"]), st.integers(0, 5), st.floats(0, 1), st.integers(0, 2**31)),
    min_size=2,
    max_size=12,
)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return tmp_path_factory.mktemp("disk")


@examples(60)
@given(first=st.integers(1, 12_000), steps=changes, on_disk=st.booleans())
def test_any_history_of_forks_crops_and_appends(disk, first, steps, on_disk):
    """Beside plain tensors that are copied at every step."""
    start = numbers(first)
    sides = [(rows_of(start, disk if on_disk else None), start)]
    for what, which, share, seed in steps:
        place = which % len(sides)
        rows, plain = sides[place]
        n = plain.shape[1]
        if what == "append" and n < 25_000:
            new = numbers(1 + int(share * 6000), seed)
            rows.write(n, new)
            sides[place] = (rows, torch.cat([plain, new], dim=1))
        elif what == "crop":
            rows.forget(int(share * n))
            sides[place] = (rows, plain[:, : int(share * n)])
        elif what == "fork" and len(sides) < 6:
            sides.append((rows.fork(n), plain.clone()))
        for rows, plain in sides:
            assert torch.equal(rows.tensor[:, : plain.shape[1]], plain)


def test_forks_share_memory():
    """Of 64 MiB, ten forks take next to nothing; a fork that writes 2 MiB anew takes about that."""
    content = torch.ones((2, 131_072, 64))
    rows = SharedRows(2, 1 << 18, 64, torch.float32)
    rows.write(0, content)
    del content
    first = rows.fork(131_072)
    before = psutil.virtual_memory().available
    forks = [rows.fork(131_072) for _ in range(10)]
    assert before - psutil.virtual_memory().available < 16 << 20
    assert all(float(fork.tensor[1, 131_071, 63]) == 1 for fork in [first, *forks])


def resident():
    return psutil.Process().memory_info().rss


def test_a_few_rows_take_a_few_pages():
    """Not a huge page per head: a short session of a model of 32 layers and 8 heads would take a gigabyte."""
    new = numbers(16, heads=32, dim=64, dtype=torch.bfloat16)
    before = resident()
    rows = SharedRows(32, 1 << 17, 64, torch.bfloat16)
    rows.write(0, new)
    assert resident() - before < 2 << 20
    assert torch.equal(rows.tensor[:, :16], new)


@pytest.mark.skipif(not huge_pages(), reason="this system gives no huge pages")
def test_many_rows_lie_in_huge_pages():
    """Retrieved rows lie far apart; in small pages each would miss the TLB."""
    rows = SharedRows(2, 1 << 18, 64, torch.float32)
    for start in range(0, 1 << 17, 1 << 12):
        rows.write(start, torch.ones((2, 1 << 12, 64)))
    held = 2 * (1 << 17) * 64 * 4
    assert in_huge_pages(rows.tensor) > 0.8 * held


@pytest.mark.parametrize("offset", [0, 8, 4096, 5000, 123_456])
@pytest.mark.parametrize("n", [1, 100, 9_999])
def test_rows_of_a_file_are_read_where_they_lie(tmp_path, offset, n):
    content = numbers(n, dtype=torch.bfloat16, dim=10)
    path = tmp_path / "rows"
    raw = content.view(torch.uint8).numpy().tobytes()
    path.write_bytes(b"x" * offset + raw)
    rows = SharedRows(2, CAPACITY, 10, torch.bfloat16, None, n * 20, offset)
    file = OpenFile(os.open(path, os.O_RDONLY))
    rows.cover(file, offset, n)
    assert torch.equal(rows.tensor[:, :n], content)
    rows.write(n, numbers(5000, 1, dim=10, dtype=torch.bfloat16))
    twin = rows.fork(n + 5000)
    rows.forget(n // 2)
    rows.write(n // 2, numbers(1, 2, dim=10, dtype=torch.bfloat16))
    assert torch.equal(twin.tensor[:, :n], content)
    assert torch.equal(twin.tensor[:, n : n + 5000], numbers(5000, 1, dim=10, dtype=torch.bfloat16))
    assert path.read_bytes() == b"x" * offset + raw


def test_freezing_beside_a_reader_shows_it_nothing_else():
    content = numbers(30_000, dim=32)
    rows, stop, wrong = rows_of(content), threading.Event(), []

    def read():
        while not stop.is_set():
            if not torch.equal(rows.tensor[:, :30_000], content):
                wrong.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        twins = []
        for i in range(20):
            twins.append(rows.fork(30_000))
            rows.forget(29_000 - i)
            rows.write(29_000 - i, content[:, 29_000 - i :])
            rows._shared = 0
    finally:
        stop.set()
        reader.join()
    assert not wrong


def test_bytes_on_disk_are_in_the_folder(tmp_path):
    before = psutil.disk_usage(str(tmp_path)).free
    rows = SharedRows(2, 1 << 20, 64, torch.float32, tmp_path)
    rows.write(0, torch.ones((2, 65_536, 64)))
    assert before - psutil.disk_usage(str(tmp_path)).free > 20 << 20
    assert list(tmp_path.iterdir()) == []
    del rows
    assert before - psutil.disk_usage(str(tmp_path)).free < 20 << 20


@pytest.mark.parametrize("restored", [False, True])
def test_what_is_shared_takes_no_room_on_disk(tmp_path, restored):
    """One more token must not allocate room for all that a file or the origin holds."""
    content = torch.ones((2, 200_000, 64))
    rows = SharedRows(2, 1 << 20, 64, torch.float32, tmp_path, 0, 0)
    if restored:
        (tmp_path / "rows").write_bytes(content.numpy().tobytes())
        rows.cover(OpenFile(os.open(tmp_path / "rows", os.O_RDONLY)), 0, 200_000)
    else:
        rows.write(0, content)
        rows = rows.fork(200_000)
    before = psutil.disk_usage(str(tmp_path)).free
    rows.write(200_000, torch.ones((2, 1, 64)))
    assert before - psutil.disk_usage(str(tmp_path)).free < 16 << 20


def test_a_fork_opens_few_files():
    """One for all heads: a model of many layers would else have no descriptors left."""
    rows = rows_of(numbers(10_000, heads=16))
    before = psutil.Process().num_fds()
    fork = rows.fork(10_000)
    assert psutil.Process().num_fds() - before <= 1
    assert torch.equal(fork.tensor[:, :10_000], numbers(10_000, heads=16))


FULL_DISK = """
import sys, torch
from pathlib import Path
from retrieval_attn.kv.shared_rows import SharedRows
rows = SharedRows(2, 1 << 20, 64, torch.float32, Path(sys.argv[1]))
held = 0
try:
    while True:
        rows.write(held, torch.full((2, 1000, 64), float(held)))
        held += 1000
except OSError as error:
    print(held, float(rows.tensor[1, held - 1, 63]) == held - 1000, error)
"""


def test_a_full_disk_is_an_error_and_not_the_end(tmp_path):
    """Without room made beforehand, writing to a mapped file on a full disk kills the process (SIGBUS)."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert done.returncode == 0, done.stderr
    held, whole, message = done.stdout.split(" ", 2)
    assert int(held) >= 5000
    assert whole == "True"
    assert "the disk of kv_dir is full" in message


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(OSError, match="cannot hold keys and values: No such file"):
        AddressSpace(1, tmp_path / "missing")


def test_a_refused_reservation_names_need_free_and_the_ways_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match=r"refused 1.00 GiB .* are free .*ulimit.*int8.*kv_dir=PATH.*shorter text"):
        AddressSpace(1 << 30)
