"""The host store: what goes in comes out, bit for bit, and nothing moves."""

import psutil
import pytest
import torch

from retrieval_attn.kv.host_store import HostStore


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
    with pytest.raises(MemoryError, match="the system refused .* GiB of address space"):
        HostStore(8, 128, 128, torch.bfloat16, capacity=1 << 50)


class TestInt8:
    def store(self, n=3000, seed=0):
        """Coordinates of very different size, as rotary keys have; then some that are twice as large as all before."""
        sizes = torch.logspace(-2, 2, 16)
        keys = random_rows(n, torch.float32, seed, dim=16) * sizes
        values = random_rows(n, torch.float32, seed + 1, dim=16)
        store = HostStore(2, 16, 16, torch.float32, capacity=5000, int8=True)
        for start in range(0, n, 500):
            store.append(keys[:, start : start + 500], values[:, start : start + 500])
        return store, keys, values

    def test_what_comes_back_is_within_a_step(self):
        store, keys, values = self.store()
        assert store.keys().dtype == torch.int8
        assert store.nbytes == 2 * 2 * 3000 * 16
        for stored, real in zip(store.read(0, 3000), (keys, values), strict=True):
            # A step is 1.5 / 127 of the largest number of its coordinate; two roundings at most, half a step each.
            most = 1.5 / 127 * real.abs().amax(1, keepdim=True) * 1.01
            assert ((stored - real).abs() <= most).all()
            assert (stored - real).norm() / real.norm() < 0.015

    def test_scales_move_to_the_other_side(self):
        """Scores by folded queries over integers are those over what `read` gives; so are means of values."""
        store, _, _ = self.store()
        query = torch.randn((1, 4, 3, 16))
        keys, values = store.read(0, 3000)
        scores = store.folded(query).view(1, 2, 6, 16) @ store.keys().float().mT
        torch.testing.assert_close(scores, query.view(1, 2, 6, 16) @ keys.mT, rtol=1e-4, atol=1e-3)
        weights = torch.softmax(torch.randn((1, 4, 3, 3000)), dim=-1).view(1, 2, 6, 3000)
        out = store.unfolded((weights @ store.values().float()).view(1, 4, 3, 16))
        torch.testing.assert_close(out, (weights @ values).view(1, 4, 3, 16), rtol=1e-4, atol=1e-4)

    def test_larger_numbers_make_room_and_it_is_told_before(self):
        store, keys, values = self.store()
        old, told = store.keys(), []
        store.before_rewrite = lambda: told.append(torch.equal(store.keys(), before))
        before = old.clone()
        store.append(keys[:, :10] * 3, values[:, :10])
        assert told == [True]
        # Who reads the old rows, as a build in another thread does, goes on reading them.
        assert torch.equal(old, before)
        again, _ = store.read(0, 3010)
        assert (again[:, :3000] - keys).norm() / keys.norm() < 0.03
        assert (again[:, 3000:] - keys[:, :10] * 3).norm() / (keys[:, :10] * 3).norm() < 0.02
        store.append(keys[:, :10], values[:, :10])
        assert told == [True]
        store.fork().append(keys[:, :10] * 9, values[:, :10])
        assert told == [True]

    def test_zeros_and_no_tokens(self):
        store = HostStore(2, 8, 8, torch.bfloat16, capacity=10, int8=True)
        store.append(torch.zeros((2, 0, 8)), torch.zeros((2, 0, 8)))
        store.append(torch.zeros((2, 3, 8)), torch.zeros((2, 3, 8)))
        keys, _ = store.read(0, 3)
        assert keys.dtype == torch.bfloat16
        assert not keys.any()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_numbers_that_are_none_are_refused(self, bad):
        store, _, values = self.store()
        with pytest.raises(ValueError, match="must be finite for kv_dtype='int8'"):
            store.append(torch.full((2, 1, 16), bad), values[:, :1])
        assert store.length == 3000

    def test_a_fork_has_scales_of_its_own(self):
        store, keys, values = self.store()
        twin = store.fork()
        before = twin.read(0, 3000)
        store.append(keys[:, :10] * 100, values[:, :10] * 100)
        for mine, then in zip(twin.read(0, 3000), before, strict=True):
            assert torch.equal(mine, then)


@pytest.mark.parametrize("int8", [False, True])
def test_forks_go_apart(int8):
    keys, values = random_rows(6000, torch.float32), random_rows(6000, torch.float32, 1)
    store = HostStore(2, 8, 8, torch.float32, capacity=10_000, int8=int8)
    store.append(keys, values)
    twin = store.fork()
    store.append(keys[:, :5], values[:, :5])
    store.crop(3000)
    store.append(-keys[:, :100], -values[:, :100])
    assert (store.length, twin.length) == (3100, 6000)
    close = 0.05 if int8 else 0
    for got, real in zip(twin.read(0, 6000), (keys, values), strict=True):
        torch.testing.assert_close(got, real, rtol=0, atol=close)
    for got, real in zip(store.read(0, 3100), (keys, values), strict=True):
        torch.testing.assert_close(got[:, :3000], real[:, :3000], rtol=0, atol=close)
        torch.testing.assert_close(got[:, 3000:], -real[:, :100], rtol=0, atol=close)
