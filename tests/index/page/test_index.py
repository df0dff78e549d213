"""Pages: bounds that bound, boundaries that stay put while keys come and go, and exact search inside what is opened."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from index_vectors import STORED, as_bfloat16, attention_like, recall
from laws import examples, rarely

from retrieval_attn.arrays import as_float32
from retrieval_attn.index import build_index, load_index
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.loops.largest import choose
from retrieval_attn.index.page import index as page
from retrieval_attn.index.page.search import dots_run, score_pages
from retrieval_attn.index.page.summary import SCORES, PageSummaries, Scheme
from retrieval_attn.index.protocol import Steps

# The summaries and searches of a dtype take 25 s to compile.
every_dtype = pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16", "float16")])
every_score = pytest.mark.parametrize("score", SCORES)


@pytest.fixture(scope="module")
def scene():
    return attention_like(n_keys=3000)


def pages_of(keys, score="halfway", page_size=16, n_reps=2):
    return PageSummaries.of(Scheme(page_size, score, n_reps), Keys(keys), Steps())


def page_scores(pages, queries):
    """(G, N, P) float32, for queries (G, N, D)."""
    out = np.empty((*queries.shape[:2], pages.n_pages), np.float32)
    rows = pages.rows.view(np.int16) if pages.rows.dtype == np.float16 else pages.rows
    score_pages(rows, pages.n_pages, pages.bonus, pages.scheme.asked(queries), 3, out)
    return out


def in_pages(keys, page_size=16):
    """(G, P, page_size, D) float32 of the full pages."""
    n_pages = keys.shape[1] // page_size
    return as_float32(keys)[:, : n_pages * page_size].reshape(len(keys), n_pages, page_size, -1)


@every_dtype
@pytest.mark.parametrize("page_size", [8, 16, 50])
def test_summaries_follow_their_definitions(dtype, page_size, scene):
    keys = STORED[dtype](scene.keys[:, :333])
    paged = in_pages(keys, page_size)
    rows = {score: as_float32(pages_of(keys, score, page_size).rows[:, :, 0]) for score in SCORES}
    step = {"float32": 2.0**-20, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    bounds = np.concatenate([paged.max(axis=2), paged.min(axis=2)], axis=2)
    mean = paged.mean(axis=2, dtype=np.float64)
    np.testing.assert_array_equal(rows["minmax"], bounds)
    np.testing.assert_allclose(rows["mean"], mean, rtol=step, atol=1e-5)
    np.testing.assert_allclose(rows["halfway"], (bounds + np.tile(mean, 2)) / 2, rtol=step, atol=1e-5)


def test_representatives_are_keys_far_apart(scene):
    keys = scene.keys[:, :320]
    paged, rows = in_pages(keys), pages_of(keys, "reps", n_reps=3).rows
    for head, p in np.ndindex(rows.shape[:2]):
        taken = []
        away = np.linalg.norm(paged[head, p] - paged[head, p].mean(axis=0), axis=1)
        for row in rows[head, p]:
            taken.append(int(np.flatnonzero((paged[head, p] == row).all(axis=1))[0]))
            assert away[taken[-1]] > away.max() * (1 - 1e-5)
            away = np.linalg.norm(paged[head, p][:, None] - paged[head, p][taken], axis=2).min(axis=1)
        assert len(set(taken)) == 3


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def keys_and_query(draw):
    """Keys (1, 16, D) as float32 or bfloat16 and a query (D,), any finite floats at all."""
    dim = draw(st.integers(1, 9))
    keys = draw(arrays(np.float32, (1, 16, dim), elements=FINITE))
    if draw(st.booleans()):
        # Cut, not rounded: the largest float32 would become infinity.
        keys = (keys.view(np.uint32) >> 16).astype(np.uint16)
    return keys, draw(arrays(np.float32, dim, elements=FINITE))


@given(keys_and_query())
@example((np.full((1, 16, 4), np.finfo(np.float32).max, np.float32), np.full(4, -1e-30, np.float32)))
@example((np.full((1, 16, 4), 1e-45, np.float32), np.full(4, 3e38, np.float32)))
def test_no_key_scores_above_the_bound_of_its_page(keys_query):
    keys, query = keys_query
    rows = pages_of(keys, "minmax").rows[0, 0, 0]
    bounds = as_float32(rows).astype(np.float64)
    asked = Scheme(16, "minmax", 1).asked(query[None, None])[0, 0].astype(np.float64)
    high, low = (bounds * asked).reshape(2, -1)
    exact = as_float32(keys[0]).astype(np.float64) * query.astype(np.float64)
    # Term by term, so that any order of summation, rounded or not, keeps it.
    assert (high + low >= exact).all()
    assert np.isfinite(bounds).all()


@every_dtype
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_computed_bounds_are_bounds_up_to_rounding(dtype, size, scene):
    keys = STORED[dtype]((scene.keys * np.float32(size)).astype(np.float32))
    queries = scene.later.reshape(2, -1, 64)
    scores = page_scores(pages_of(keys, "minmax"), queries)
    best = np.einsum("gnd,gpsd->gnps", queries, in_pages(keys)).max(axis=3)
    sizes = np.abs(queries).max() * np.abs(as_float32(keys)).max() * 64
    assert (scores >= best - 64 * np.finfo(np.float32).eps * sizes).all()
    assert (scores > best).mean() > 0.99


@every_score
def test_scores_of_pages_follow_their_definitions(score, scene):
    queries = scene.later.reshape(2, -1, 64)[:, :7]
    pages = pages_of(scene.keys, score, n_reps=3)
    paged = in_pages(scene.keys)
    each = np.einsum("gnd,gpsd->gnpsd", queries, paged)
    rows = np.einsum("gnd,gprd->gnpr", queries, pages.rows) if score == "reps" else None
    expected = {
        "mean": lambda: each.sum(axis=4).mean(axis=3),
        "minmax": lambda: each.max(axis=3).sum(axis=3),
        "halfway": lambda: (each.max(axis=3).sum(axis=3) + each.sum(axis=4).mean(axis=3)) / 2,
        "reps": lambda: rows.max(axis=3),
    }[score]()
    np.testing.assert_allclose(page_scores(pages, queries), expected, rtol=1e-4, atol=1e-3)


def test_the_page_that_overflows_is_opened():
    """Its score is infinity minus infinity; taken for small, it would hide what else is in the page."""
    keys = np.zeros((1, 64, 16), np.float32)
    keys[0, 16:32, :2] = 3e38, -3e38
    keys[0, 20] = 1.0
    queries = np.full((1, 1, 16), 100.0, np.float32)
    assert page_scores(pages_of(keys), queries)[0, 0].tolist() == [0.0, np.inf, 0.0, 0.0]


@given(arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False)), st.data())
def test_the_largest_are_chosen_and_of_equal_ones_the_first(values, data):
    n = data.draw(st.integers(1, len(values)))
    out = np.empty(n, np.int64)
    choose(values, out)
    np.testing.assert_array_equal(out, np.sort(np.argsort(-values, kind="stable")[:n]))


def test_choosing_survives_what_is_no_number():
    values = np.array([1.0, np.nan, 3.0, -np.nan, 2.0], np.float32)
    for n in range(1, 6):
        out = np.full(n, -1)
        choose(values, out)
        assert len(set(out)) == n
        assert out.min() >= 0


@every_dtype
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (3, 5), (4, 64), (15, 80), (16, 128)])
def test_equal_keys_get_equal_scores_wherever_they_stand(dtype, n, dim):
    rng = np.random.default_rng(n)
    key, query = (rng.standard_normal((1, dim), dtype=np.float32) for _ in range(2))
    flat = STORED[dtype](np.repeat(key, n, axis=0))
    out = np.empty(n + 3, np.float32)
    dots_run((flat.view(np.int16) if dtype == "float16" else flat).reshape(-1), 0, dim, n, query[0], out)
    assert (out[:n] == out[0]).all()
    np.testing.assert_allclose(out[0], as_float32(flat)[0].astype(np.float64) @ query[0], rtol=1e-4, atol=1e-4)


def opened(keys, queries, pages, effort):
    """By definition: the keys that lie in the best pages or after the last one, (G, N, S) bool."""
    scores = page_scores(pages, queries)
    size, n_keys = pages.scheme.page_size, keys.shape[1]
    seen = np.zeros((*scores.shape[:2], n_keys), bool)
    for head, i in np.ndindex(scores.shape[:2]):
        for p in np.argsort(-scores[head, i], kind="stable")[:effort]:
            seen[head, i, p * size : (p + 1) * size] = True
    seen[:, :, pages.n_pages * size :] = True
    return seen


@every_score
@every_dtype
@pytest.mark.parametrize(
    ("n_keys", "page_size", "effort"), [(63, 8, 3), (1000, 16, 20), (1000, 30, 32), (2999, 128, 9)]
)
def test_the_best_keys_of_the_best_pages_are_found(score, dtype, n_keys, page_size, effort, scene):
    keys = STORED[dtype](scene.keys[:, :n_keys])
    queries = scene.later[:, :5].reshape(2, -1, 64)
    index = build_index("page", keys, page_size=page_size, score=score, n_reps=2)
    hit = index.search(scene.later[:, :5], k=20, effort=effort)
    seen = opened(keys, queries, pages_of(keys, score, page_size), effort)
    truth = np.where(seen, np.einsum("gnd,gsd->gns", queries, as_float32(keys)), -np.inf)
    best = -np.sort(-truth, axis=-1)[..., :20]
    np.testing.assert_allclose(hit.scores.reshape(best.shape), best, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(truth, hit.ids.reshape(best.shape), -1), best, rtol=1e-4, atol=1e-4)
    n_reps = 2 * (n_keys // page_size) if score == "reps" else 0
    assert (hit.visited == seen[0, 0].sum() + n_reps).all()


@every_score
def test_all_pages_but_one_equal_exact_but_for_that_page(score, scene):
    """Opening all pages is the scan of the exact index; one page less is the page index's own code."""
    index, exact = build_index("page", scene.keys, score=score), build_index("exact", scene.keys)
    whole = index.search(scene.later, k=50, effort=10_000)
    np.testing.assert_array_equal(whole.ids, exact.search(scene.later, k=50).ids)
    hit = index.search(scene.later, k=50, effort=3000 // 16 - 1)
    assert recall(hit.ids, whole.ids) > 0.99
    assert (hit.visited < whole.visited).sum() == (0 if score == "reps" else hit.visited.size)


@pytest.mark.parametrize("k", [1, 16, 17, 100, 999])
def test_enough_pages_are_opened_to_fill_the_answer(k, scene):
    hit = build_index("page", scene.keys[:, :1000]).search(scene.later, k=k, effort=1)
    assert (hit.ids >= 0).all()
    assert all(len(set(row)) == k for row in hit.ids.reshape(-1, k))
    # 1000 keys are 62 pages and 8 keys more.
    assert (hit.visited == 16 * max(1, -(-(k - 8) // 16)) + 8).all()


def test_default_effort_finds_most_and_reads_few():
    scene = attention_like(n_keys=20_000, n_later=16)
    keys = as_bfloat16(scene.keys)
    hit = build_index("page", keys).search(scene.later, k=50)
    assert recall(hit.ids, build_index("exact", keys).search(scene.later, k=50).ids) > 0.9
    assert hit.visited.max() < 0.25 * 20_000


def test_halfway_is_better_than_mean_and_bound(scene):
    """One lone key in a page that looks elsewhere, and pages that are good all over."""
    exact = build_index("exact", scene.keys).search(scene.later, k=50)
    found = {
        score: recall(build_index("page", scene.keys, score=score).search(scene.later, k=50, effort=30).ids, exact.ids)
        for score in SCORES
    }
    assert found["halfway"] >= max(found["mean"], found["minmax"]) - 0.01


@every_score
def test_planted_keys_are_found(score, scene):
    """A key of large inner product in a page of keys that mean nothing to the query."""
    keys = scene.keys.copy()
    q = scene.later[:, 3]
    for h in range(4):
        keys[h // 2, 700 + 500 * (h % 2)] = 20.0 * q[h]
    hit = build_index("page", keys, score=score, n_reps=1).search(q, k=1, effort=6)
    assert hit.ids[:, 0].tolist() == [700, 1200, 700, 1200]


@pytest.mark.parametrize("n_heads", [2, 6, 10])
@pytest.mark.parametrize("n_times", [1, 3])
def test_any_number_of_heads_and_queries(n_heads, n_times, monkeypatch):
    scene = attention_like(n_heads, 2, 2000, 8, n_times, dim=32)
    index = build_index("page", scene.keys)
    whole = index.search(scene.later, k=20, effort=40)
    monkeypatch.setattr(page, "MAX_SCORES", 1)  # four queries at a time
    parts = index.search(scene.later, k=20, effort=40)
    np.testing.assert_array_equal(whole.ids, parts.ids)
    for h in range(n_heads):
        alone = build_index("page", scene.keys[h // (n_heads // 2)][None]).search(
            scene.later[h : h + 1], k=20, effort=40
        )
        assert np.mean(alone.ids == whole.ids[h]) > 0.95
        np.testing.assert_allclose(alone.scores[0], whole.scores[h], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dim", [1, 3, 80, 129])
def test_any_dimension(dim):
    rng = np.random.default_rng(dim)
    keys, q = rng.standard_normal((2, 500, dim), dtype=np.float32), rng.standard_normal((2, dim), dtype=np.float32)
    hit = build_index("page", keys).search(q, k=30, effort=20)
    seen = opened(keys, q[:, None], pages_of(keys), 20)[:, 0]
    best = -np.sort(-np.where(seen, np.einsum("gd,gsd->gs", q, keys), -np.inf), axis=1)[:, :30]
    np.testing.assert_allclose(hit.scores, best, rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_smaller_id():
    keys = np.ones((1, 4000, 20), np.float32)
    hit = build_index("page", keys).search(np.ones((3, 20), np.float32), k=50, effort=10)
    np.testing.assert_array_equal(hit.ids, np.tile(np.arange(50), (3, 1)))
    hit = build_index("page", -0.0 * keys).search(np.ones((3, 20), np.float32), k=50, effort=10)
    np.testing.assert_array_equal(hit.ids, np.tile(np.arange(50), (3, 1)))


def same_index(a, b, queries):
    """Equal summaries, and equal results where pages decide."""
    pages_a, pages_b = a._state.pages, b._state.pages
    assert pages_a.n_pages == pages_b.n_pages == a.n_keys // pages_a.scheme.page_size
    np.testing.assert_array_equal(pages_a.rows[:, : pages_a.n_pages], pages_b.rows[:, : pages_b.n_pages])
    if a.lift:
        np.testing.assert_array_equal(pages_a.bonus[:, : pages_a.n_pages], pages_b.bonus[:, : pages_b.n_pages])
    for x, y in zip(a.search(queries, 8, effort=3), b.search(queries, 8, effort=3), strict=True):
        np.testing.assert_array_equal(x, y)


@every_score
@given(data=st.data())
@examples(40)
def test_any_history_gives_the_index_of_what_is_left(score, data):
    scene = attention_like(n_keys=400, n_queries=8, n_later=2, dim=16)
    options = {"page_size": 8, "score": score, "n_reps": 2, "lift": data.draw(st.sampled_from([None, 0.25]))}
    keys = scene.keys[:, : data.draw(st.integers(1, 100))]
    index = build_index("page", keys, **options)
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, 300))
            new = scene.keys[:, at : at + data.draw(st.integers(0, 60))]
            index.append(new)
            keys = np.concatenate([keys, new], axis=1)
        else:
            n_keys = data.draw(st.integers(1, keys.shape[1]))
            index.truncate(n_keys)
            keys = keys[:, :n_keys]
    same_index(index, build_index("page", keys, **options), scene.later)


def test_a_running_search_keeps_its_pages(scene):
    """Cut off, then filled with other keys: the rows that an older search reads must not change under it."""
    index = build_index("page", scene.keys[:, :800])
    index.append(scene.keys[:, 800:1600])
    before = index._state.pages
    kept = before.rows[:, : before.n_pages].copy()
    index.truncate(400)
    index.append(scene.keys[:, 2000:2600])
    index.truncate(990)
    index.append(scene.keys[:, :600])
    np.testing.assert_array_equal(before.rows[:, : before.n_pages], kept)


def test_keys_one_by_one_do_not_copy_the_summaries_each_time(scene):
    index = build_index("page", scene.keys[:, :1000])
    homes = set()
    for at in range(1000, 2000):
        index.append(scene.keys[:, at : at + 1])
        homes.add(index._state.pages.rows.ctypes.data)
    assert len(homes) < 20
    assert index.nbytes < 1.1 * build_index("page", scene.keys[:, :2000]).nbytes


@every_score
@pytest.mark.parametrize("n_keys", [5, 15, 16, 1000])
@pytest.mark.parametrize("lift", [None, 0.125])
def test_a_file_holds_any_index(score, n_keys, lift, scene, tmp_path):
    index = build_index("page", scene.keys[:, :n_keys], score=score, n_reps=3, lift=lift)
    index.append(scene.keys[:, n_keys : n_keys + 7])
    index.save(tmp_path / "a")
    loaded = load_index(tmp_path / "a")
    same_index(index, loaded, scene.later)
    loaded.append(scene.keys[:, n_keys + 7 : n_keys + 50])
    loaded.truncate(n_keys + 30)
    index.append(scene.keys[:, n_keys + 7 : n_keys + 30])
    same_index(index, loaded, scene.later)


@pytest.mark.long
@every_score
@pytest.mark.parametrize("lift", [None, 0.125])
def test_an_index_takes_at_most_seven_per_cent_of_keys_and_values(score, lift, scene):
    keys = as_bfloat16(attention_like(n_keys=8000, dim=128).keys)
    index = build_index("page", keys, score=score, lift=lift)
    bonuses = 1.25 * 4 * keys.shape[0] * keys.shape[1] + 1024 if lift else 0
    assert index.nbytes <= 0.07 * 2 * keys.nbytes + bonuses


@every_score
def test_lifted_pages_are_found_by_the_bonus_of_their_keys(score, scene):
    """A key with a large bonus, in a page whose scores are small, is among the best."""
    plain = build_index("page", scene.keys, score=score)
    lifted = build_index("page", scene.keys, score=score, lift=0.04, seed=3)
    wanted = build_index("exact", scene.keys, lift=0.04, seed=3).search(scene.later, k=50)
    hit = lifted.search(scene.later, k=50, effort=60)
    assert recall(hit.ids, wanted.ids) > 0.8
    assert recall(plain.search(scene.later, k=50, effort=60).ids, wanted.ids) < recall(hit.ids, wanted.ids) - 0.2
    pages, keys = lifted._state.pages, lifted._state.keys
    np.testing.assert_array_equal(pages.bonus[:, 1], keys.bonus[:, 16:32].max(axis=1))
    match = wanted.ids[:, :, :, None] == hit.ids[:, :, None, :]
    h, t, i, j = np.nonzero(match)
    np.testing.assert_allclose(wanted.scores[h, t, i], hit.scores[h, t, j], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 7}, "page_size must be between 8 and 1024, got 7"),
        ({"page_size": 2000}, "page_size must be between 8 and 1024, got 2000"),
        ({"score": "max"}, "score must be one of 'mean', 'minmax', 'halfway', 'reps', got 'max'"),
        ({"n_reps": 0}, "n_reps must be between 1 and 4 .*got 0"),
        ({"n_reps": 5}, "n_reps must be between 1 and 4 .*got 5"),
        ({"pages": 5}, "unknown option 'pages'"),
    ],
)
def test_mistakes_are_named(options, message, scene):
    with pytest.raises(ValueError, match=message):
        build_index("page", scene.keys, **options)
