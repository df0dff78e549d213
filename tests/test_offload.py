"""The host store: what goes in comes out, bit for bit, and nothing moves."""

import psutil
import pytest
import torch

from retrieval_attn.offload import HostStore


def random_rows(n, dtype, seed=0, heads=2, dim=8):
    return torch.randn((heads, n, dim), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offload_then_gather_returns_the_same_bits(dtype):
    """Law 5."""
    store = HostStore(2, 8, 8, dtype, capacity=1000)
    parts = [random_rows(n, dtype, seed) for seed, n in enumerate((1, 63, 500))]
    for part in parts:
        store.append(part, -part)
    everything = torch.cat(parts, dim=1)
    assert torch.equal(store.keys(), everything)
    assert torch.equal(store.values(), -everything)
    assert torch.equal(store.keys(60, 70), everything[:, 60:70])
    assert store.keys().dtype == dtype
    assert store.nbytes == 2 * 564 * 8 * 2 * dtype.itemsize


def test_appending_moves_nothing():
    store = HostStore(2, 8, 8, torch.float32, capacity=1000)
    store.append(random_rows(10, torch.float32), random_rows(10, torch.float32))
    address = store.keys().data_ptr()
    store.append(random_rows(900, torch.float32), random_rows(900, torch.float32))
    assert store.keys().data_ptr() == address


def test_outgrowing_the_capacity_keeps_everything():
    store = HostStore(2, 8, 4, torch.bfloat16, capacity=10)
    keys, values = random_rows(35, torch.bfloat16), random_rows(35, torch.bfloat16, dim=4)
    for start in range(0, 35, 7):
        store.append(keys[:, start : start + 7], values[:, start : start + 7])
    assert torch.equal(store.keys(), keys)
    assert torch.equal(store.values(), values)


def test_reserved_memory_is_not_used():
    before = psutil.Process().memory_info().rss
    store = HostStore(8, 128, 128, torch.bfloat16, capacity=1 << 20)  # 4 GiB of address space
    store.append(random_rows(10, torch.bfloat16, heads=8, dim=128), random_rows(10, torch.bfloat16, heads=8, dim=128))
    # Large pages: every head's first page of keys and of values may be 2 MiB.
    assert psutil.Process().memory_info().rss - before < 64 * 2**20


def test_crop_then_append_overwrites():
    store = HostStore(2, 8, 8, torch.float32, capacity=100)
    first, second = random_rows(50, torch.float32), random_rows(20, torch.float32, seed=1)
    store.append(first, first)
    store.crop(30)
    store.append(second, second)
    assert torch.equal(store.keys(), torch.cat([first[:, :30], second], dim=1))


def test_impossible_reservation_names_the_size():
    with pytest.raises(MemoryError, match="cannot reserve .* GiB of address space for"):
        HostStore(8, 128, 128, torch.bfloat16, capacity=1 << 50)
