"""What prefill brings to the device: every earlier token once, in order, the next tile on its way in time."""

import contextlib

import pytest
import torch

from retrieval_attn.attention.layer_memory import LayerMemory, MemoryShape
from retrieval_attn.attention.to_device import _brought, earlier, heads_at_once, tokens_on_device, whole_heads
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.kv.device_prefix import DevicePrefix

G, D = 2, 8


def memory_of(n, **options):
    memory = LayerMemory(
        RetrievalConfig(**({"prefill_tile": 100} | options)), MemoryShape(G, D, D, torch.float32, 2000)
    )
    keys = torch.randn((1, G, n, D))
    memory.append(torch.randn((1, 2 * G, n, D)), keys, -keys)
    return memory, keys


@pytest.mark.parametrize("n", [1, 99, 100, 101, 950])
@pytest.mark.parametrize("on_device", [0, 1, 100, 333, 2000])
def test_every_earlier_token_comes_once(n, on_device):
    memory, keys = memory_of(n)
    memory.device_prefix = DevicePrefix(on_device)
    for start in range(0, n, 70):
        part = keys[:, :, start : start + 70]
        memory.device_prefix.append(start, part, -part)
    assert memory.device_prefix.length == min(n, on_device)
    tiles = list(earlier(memory, torch.device("cpu")))
    assert all(tile.shape[2] <= 100 for tile, _ in tiles)
    assert torch.equal(torch.cat([tile for tile, _ in tiles], dim=2), keys)
    assert torch.equal(torch.cat([tile for _, tile in tiles], dim=2), -keys)


def test_what_stays_on_the_device_is_a_prefix():
    resident = DevicePrefix(300)
    x = torch.randn((1, G, 400, D))
    resident.append(0, x[:, :, :100], x[:, :, :100])
    resident.append(150, x[:, :, 150:200], x[:, :, 150:200])
    assert resident.length == 100
    resident.crop(40)
    resident.append(40, -x[:, :, 40:400], -x[:, :, 40:400])
    assert resident.length == 300
    kept = torch.cat([keys for keys, _ in resident.tiles(64)], dim=2)
    assert torch.equal(kept, torch.cat([x[:, :, :40], -x[:, :, 40:300]], dim=2))
    assert resident.nbytes == 2 * G * 300 * D * 4


def test_a_crop_of_the_memory_reaches_the_device():
    memory, keys = memory_of(500)
    memory.device_prefix = DevicePrefix(400)
    memory.device_prefix.append(0, keys, -keys)
    memory.crop(250)
    assert torch.equal(torch.cat([tile for tile, _ in earlier(memory, torch.device("cpu"))], dim=2), keys[:, :, :250])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("heads", [slice(0, 2), slice(1, 2)])
def test_whole_heads_are_all_tokens_of_some_heads(kv_dtype, heads):
    memory, keys = memory_of(500, kv_dtype=kv_dtype)
    got, values = whole_heads(memory, keys[:, :, 400:], -keys[:, :, 400:], heads)
    close = 0.06 if kv_dtype == "int8" else 0
    torch.testing.assert_close(got, keys[:, heads], rtol=0, atol=close)
    torch.testing.assert_close(values, -keys[:, heads], rtol=0, atol=close)


def test_as_many_heads_as_two_tiles_hold():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    memory, _ = memory_of(1)
    assert [heads_at_once(memory, n, cuda) for n in (1, 200, 201, 400, 10_000)] == [2, 2, 1, 1, 1]
    # Views take no room; what is read from int8 does.
    assert heads_at_once(memory, 10_000, cpu) == 2
    assert heads_at_once(memory_of(1, kv_dtype="int8")[0], 10_000, cpu) == 1


def test_without_a_gpu_nothing_is_kept_twice():
    memory, _ = memory_of(1, device_kv_budget=1 << 30)
    assert tokens_on_device(memory.config, memory, torch.device("cpu")) == 0


@pytest.mark.parametrize("budget", [0, 1000, 1 << 20])
def test_a_budget_is_shared_by_layers_and_sequences(budget):
    shape = MemoryShape(G, D, D, torch.float32, 2000, n_layers=4, n_sequences=2)
    memory = LayerMemory(RetrievalConfig(device_kv_budget=budget), shape)
    tokens = tokens_on_device(memory.config, memory, torch.device("cuda"))
    row = 2 * G * D * 4
    assert tokens * row * 8 <= budget < (tokens + 1) * row * 8


class FakeCuda:
    """Streams and events that run nothing and note the order: enough to see who waits for whom."""

    def __init__(self, monkeypatch):
        self.log = []
        outer = self

        class Event:
            def __init__(self):
                self.recorded = None

            def record(self, stream):
                self.recorded = (stream.name, len(outer.log))
                outer.log.append(("record", stream.name))

            def synchronize(self):
                outer.log.append(("host waits", self.recorded))

        class Stream:
            def __init__(self, device=None, name="copies"):
                self.name = name

            def wait_event(self, event):
                outer.log.append((f"{self.name} waits", event.recorded))

            def wait_stream(self, stream):
                outer.log.append((f"{self.name} waits for all", stream.name))

        attention = Stream(name="attention")
        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        # Asked without a device, it would be another device's stream.
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: attention)
        monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))


def test_tiles_are_brought_one_ahead_and_never_over_one_in_use(monkeypatch):
    memory, keys = memory_of(450)
    fake = FakeCuda(monkeypatch)
    spans = [(start, min(450, start + 100)) for start in range(0, 450, 100)]
    got = []
    for i, (tile, values) in enumerate(_brought(memory.store, spans, torch.device("cpu"))):
        # By now the next tile is on its way, too.
        copies = [entry for entry in fake.log if entry == ("record", "copies")]
        assert len(copies) == min(len(spans), i + 2)
        assert torch.equal(values, -tile)
        got.append(tile.clone())
    assert torch.equal(torch.cat(got, dim=2), keys)
    # Attention waited for each tile's own copy; the third copy on waited for attention to be done with its place.
    arrived = [entry[1] for entry in fake.log if entry[0] == "attention waits"]
    assert len(arrived) == len(spans)
    assert arrived == sorted(set(arrived))
    # A lane's memory may have been another tensor's: before its first copy all attention so far must be done.
    first_copy = fake.log.index(("record", "copies"))
    assert ("copies waits for all", "attention") in fake.log[:first_copy]
    assert fake.log.count(("copies waits for all", "attention")) == 2
    freed = [entry[1] for entry in fake.log if entry[0] == "copies waits"]
    assert freed[:2] == [None, None]
    assert [stream for stream, _ in freed[2:]] == ["attention"] * (len(spans) - 2)


def test_tiles_given_up_half_way_leave_no_copy_under_way(monkeypatch):
    memory, _ = memory_of(450)
    fake = FakeCuda(monkeypatch)
    tiles = _brought(memory.store, [(0, 100), (100, 200), (200, 300)], torch.device("cpu"))
    next(tiles)
    tiles.close()
    assert fake.log[-1] == ("attention waits for all", "copies")
