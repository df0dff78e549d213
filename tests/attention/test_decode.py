from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from laws import rarely, some_of
from tail_layers import layer, relative

from retrieval_attn.attention.decode import StepClock, decode
from retrieval_attn.attention.layer_memory import LayerMemory, MemoryShape
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.far_index import n_covered
from retrieval_attn.kernels import attend_near


def memory_of(keys, values, query, **options):
    defaults = {"index": "exact", "n_sink": 4, "n_local": 32, "exact_below": 0, "top_k": 64}
    memory = LayerMemory(
        RetrievalConfig(**(defaults | options)), MemoryShape(len(keys), 32, 32, torch.float32, 1 << 14)
    )
    queries = query[:, :, :1].expand(-1, -1, keys.shape[1], -1)
    memory.append(queries, keys[None], values[None])
    return memory


def steps(n=3, S=4000, **options):
    """The errors of n steps against full attention, the clock, and the memory."""
    query, keys, values, scale = layer(S=S)
    memory, clock = memory_of(keys, values, query, **options), StepClock()
    memory.scale = scale
    errors = []
    for t in range(n):
        q = query[:, :, t : t + 1]
        out = decode(q, memory, scale, clock)
        errors.append(relative(out.out, attend_near(q, keys[None], values[None], scale).out))
    return errors, clock, memory


@pytest.mark.parametrize("estimator", ["topk", "tail", "lift"])
def test_top_k_of_everything_is_full_attention(estimator):
    errors, clock, _ = steps(estimator=estimator, top_k=10_000)
    assert max(errors) < 1e-5
    assert clock.recovered / clock.steps > 0.9999
    assert clock.used / clock.steps == 4000 - 36


def test_estimators_are_told_apart_by_their_error():
    error = {name: sum(steps(estimator=name)[0]) for name in ("topk", "tail", "lift")}
    assert error["tail"] < 0.5 * error["topk"]
    assert error["lift"] < 0.8 * error["topk"]


def test_mass_reads_as_many_keys_as_it_takes():
    _, few, _ = steps(estimator="tail", mass=0.3, min_k=8, max_k=2048)
    errors, many, memory = steps(estimator="tail", mass=0.95, min_k=8, max_k=4000)
    assert 8 <= few.used / few.steps < many.used / many.steps
    assert many.recovered / many.steps >= 0.94
    assert max(errors) < 0.05
    assert memory.reach is not None


def test_mass_keeps_floor_and_ceiling():
    _, clock, _ = steps(estimator="topk", mass=0.01, min_k=20, max_k=50, top_k=4)
    # The newest far keys, which no index covers yet, are read in any case.
    newest = 4000 - 36 - n_covered(4000 - 36)
    assert clock.used / clock.steps == 20 + newest
    assert clock.visited_fraction == 1
    _, clock, _ = steps(estimator="tail", mass=0.9999, min_k=20, max_k=50, top_k=30)
    assert clock.used / clock.steps == 50 + newest


@pytest.mark.parametrize("estimator", ["topk", "tail", "lift"])
def test_verification_reports_the_true_error_and_changes_nothing(estimator):
    errors, clock, _ = steps(n=3, estimator=estimator, verify_every=1)
    assert clock.checks == 3
    assert clock.error == pytest.approx(sum(errors), rel=1e-3)
    assert clock.worst_error == pytest.approx(max(errors), rel=1e-3)
    assert clock.recall == 3
    assert 0 < clock.mass < 3
    assert steps(n=3, estimator=estimator)[0] == errors
    assert steps(n=3, estimator=estimator, verify_every=2)[1].checks == 1


def test_verification_sees_what_an_index_misses():
    _, clock, _ = steps(n=3, index="ivf", effort=1, verify_every=1, top_k=100)
    assert clock.recall / clock.checks < 0.9
    _, clock, _ = steps(n=1, index="ivf", effort=1, verify_every=1, top_k=2000)
    assert clock.recall < 0.5


def share_of_the_best(t, k, S=4000):
    """Of step t, the true share of the window, of the newest far keys and of the k best others; over all heads."""
    query, keys, _, scale = layer(S=S)
    R = query.shape[1] // len(keys)
    weights = torch.softmax(query[0, :, t].double() @ keys.double().repeat_interleave(R, 0).mT * scale, dim=-1)
    weights = torch.stack([weights[h, h] for h in range(len(weights))])
    covered = slice(4, 4 + n_covered(S - 36))
    best = weights[:, covered].topk(k).values.sum(-1)
    return float((best + weights.sum(-1) - weights[:, covered].sum(-1)).mean())


def test_the_verified_mass_is_the_true_share_of_what_was_read():
    _, clock, _ = steps(n=3, estimator="topk", top_k=20, share_group=False, verify_every=1)
    true = [share_of_the_best(t, 20) for t in range(3)]
    assert max(true) < 0.9
    assert clock.mass == pytest.approx(sum(true), rel=1e-4)


def test_the_recovered_mass_is_about_the_true_one():
    """By the estimator's own account; counted with the wrong sign it was above 1."""
    _, clock, _ = steps(n=3, estimator="tail", top_k=20, share_group=False, verify_every=1)
    assert clock.mass / clock.checks < 0.9
    assert clock.recovered / clock.steps == pytest.approx(clock.mass / clock.checks, abs=0.05)


@pytest.mark.parametrize("estimator", ["topk", "tail", "lift"])
def test_int8_is_verified_against_the_values_that_the_integers_stand_for(estimator):
    _, clock, _ = steps(n=3, estimator=estimator, top_k=10_000, verify_every=1, kv_dtype="int8")
    assert clock.worst_error < 1e-5
    assert clock.recall == 3
    assert clock.mass == pytest.approx(3, rel=1e-4)
    errors, clock, _ = steps(n=3, estimator=estimator, top_k=20, verify_every=1, kv_dtype="int8")
    assert clock.error == pytest.approx(sum(errors), rel=0.1)
    assert clock.mass < 2.9


@pytest.mark.parametrize("estimator", ["topk", "tail", "lift"])
def test_top_k_keys_are_read_whatever_they_stand_for(estimator):
    """A sample searches for one key more, which only sets its threshold."""
    _, clock, _ = steps(n=2, estimator=estimator, top_k=20)
    assert clock.used / clock.steps == 20 + 4000 - 36 - n_covered(4000 - 36)


def test_every_row_of_a_batch_is_verified():
    """The layer's clock counts the steps of all rows: with two rows, every second step was one row's for ever."""
    query, keys, values, scale = layer(T=4)
    clock, errors = StepClock(), []
    whole, few = (memory_of(keys, values, query, top_k=k, estimator="topk", verify_every=2) for k in (10_000, 20))
    for t in range(4):
        for memory in (whole, few):
            out = decode(query[:, :, t : t + 1], memory, scale, clock).out
        errors.append(relative(out, attend_near(query[:, :, t : t + 1], keys[None], values[None], scale).out))
    assert clock.checks == 4
    assert clock.error == pytest.approx(errors[1] + errors[3], rel=1e-3)


def test_a_crop_forgets_how_far_the_last_step_reached():
    query, keys, values, scale = layer()
    memory = memory_of(keys, values, query, index="graph", mass=0.9, min_k=2)
    decode(query[:, :, :1], memory, scale, StepClock())
    assert memory.reach is not None
    assert memory.last_ids is not None
    memory.crop(keys.shape[1] - 1)
    assert memory.reach is None
    assert memory.last_ids is None


def test_tokens_that_leave_the_window_enter_the_estimate():
    query, keys, values, scale = layer(S=4000)
    memory = memory_of(keys[:, :3000], values[:, :3000], query)
    decode(query[:, :, :1], memory, scale, StepClock())
    for n in range(3000, 4000, 250):
        rows = slice(n, n + 250)
        memory.append(query[:, :, :1].expand(-1, -1, 250, -1), keys[None, :, rows], values[None, :, rows])
        decode(query[:, :, :1], memory, scale, StepClock())
        assert memory.tail().length == n_covered(memory.split.n_far)
    out = decode(query[:, :, 1:2], memory, scale, StepClock()).out
    assert relative(out, attend_near(query[:, :, 1:2], keys[None], values[None], scale).out) < 0.1
    memory.crop(3500)
    decode(query[:, :, :1], memory, scale, StepClock())
    assert memory.tail().length == n_covered(memory.split.n_far) == n_covered(3500 - 36)


def test_a_crop_interrupted_anywhere_is_mended_by_the_next(monkeypatch):
    """The index was cut last, and a second crop, which found the store short already, left it too long."""
    query, keys, values, scale = layer(S=4000)
    places = ["index.exact.ExactIndex.truncate", "far.far_index.TailSummary.truncate", "kv.host_store.HostStore.crop"]
    for place in [*places, "kv.window.Window.crop", "far.query_sample.QuerySample.crop"]:
        memory = memory_of(keys, values, query)
        decode(query[:, :, :1], memory, scale, StepClock())
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"retrieval_attn.{place}", _interrupt)
            memory.crop(3500)
        memory.crop(3500)
        memory.append(query[:, :, :1].expand(-1, -1, 500, -1), keys[None, :, :500], values[None, :, :500])
        out = decode(query[:, :, 1:2], memory, scale, StepClock()).out
        other = [torch.cat([x[:, :3500], x[:, :500]], 1)[None] for x in (keys, values)]
        assert memory.split.n_far == 4000 - 36
        assert memory.index().n_keys == memory.tail().length == n_covered(4000 - 36)
        assert relative(out, attend_near(query[:, :, 1:2], *other, scale).out) < 0.1


def test_an_interrupted_append_to_the_summary_makes_it_anew(monkeypatch):
    query, keys, values, scale = layer(S=4000)
    memory = memory_of(keys[:, :3000], values[:, :3000], query)
    decode(query[:, :, :1], memory, scale, StepClock())
    rows = slice(3000, 3064)
    memory.append(query[:, :, :1].expand(-1, -1, 64, -1), keys[None, :, rows], values[None, :, rows])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("retrieval_attn.far.far_index.TailSummary.append", _interrupt)
        decode(query[:, :, :1], memory, scale, StepClock())
    decode(query[:, :, :1], memory, scale, StepClock())
    assert memory.tail().length == n_covered(memory.split.n_far)


@pytest.mark.parametrize("index", ["exact", "ivf", "scan", *rarely("graph", "page")])
@pytest.mark.parametrize("estimator", ["topk", "tail"])
def test_int8_reads_what_the_store_holds(index, estimator):
    """Scales are on the queries and on the output: all far keys, as integers, give what `read` gives in float32."""
    query, keys, values, scale = layer(S=3000)
    memory = memory_of(keys, values, query, index=index, estimator=estimator, kv_dtype="int8", top_k=3000)
    assert memory.store.keys().dtype == torch.int8
    out = decode(query[:, :, :1], memory, scale, StepClock())
    stored = [x[None].clone() for x in memory.store.read(0, 3000)]
    # What is near was never rounded.
    for x, real in zip(stored, (keys, values), strict=True):
        x[0, :, :4], x[0, :, -32:] = real[:, :4], real[:, -32:]
    assert relative(out.out, attend_near(query[:, :, :1], *stored, scale).out) < 1e-5
    assert 1e-4 < relative(out.out, attend_near(query[:, :, :1], keys[None], values[None], scale).out) < 0.05


@pytest.mark.parametrize(("n", "background"), some_of([5, 63, 64, 127, 128, 129, 500], [False, True]))
def test_newest_far_keys_are_read_before_an_index_covers_them(n, background):
    """Keys that no index covers yet are in neither too few nor too many places, whoever appends them."""
    query, keys, values, scale = layer(S=36 + n + 200)
    memory = memory_of(keys[:, : 36 + n], values[:, : 36 + n], query, top_k=10_000)
    with ThreadPoolExecutor(1) as pool:
        memory.far_index.submit = pool.submit if background else None
        for end in range(36 + n + 1, 36 + n + 201):
            memory.append(query[:, :, :1], keys[None, :, end - 1 : end], values[None, :, end - 1 : end])
            out = decode(query[:, :, 1:2], memory, scale, StepClock())
            whole = attend_near(query[:, :, 1:2], keys[None, :, :end], values[None, :, :end], scale)
            assert relative(out.out, whole.out) < 1e-5
            index = memory.index()
            assert (index.n_keys if index else 0) == n_covered(memory.split.n_far)


def _interrupt(*args):
    raise KeyboardInterrupt
