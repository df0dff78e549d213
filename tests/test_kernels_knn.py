import pytest
import torch

from retrieval_attn.kernels import best_keys, knn


@pytest.mark.parametrize("most", [1 << 26, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("S", "k"), [(1, 1), (5, 9), (300, 7), (1000, 64)])
def test_finds_the_best_of_all_keys_best_first(monkeypatch, most, dtype, S, k):
    monkeypatch.setattr(knn, "MOST_SCORES", most)
    monkeypatch.setattr(knn, "QUERIES", 13)
    queries, keys = torch.randn(6, 20, 16, dtype=dtype), torch.randn(2, S, 16, dtype=dtype)
    found = best_keys(queries, keys, k)
    scores = queries.view(2, 60, 16).float() @ keys.float().mT
    assert found.shape == (2, 60, min(k, S))
    assert torch.equal(scores.gather(2, found.long()), scores.topk(min(k, S), dim=2).values)


@pytest.mark.parametrize(
    ("queries", "keys", "k", "message"),
    [
        ((3, 4, 8), (2, 5, 8), 1, "H a multiple of G"),
        ((4, 4, 8), (2, 5, 7), 1, r"got \(4, 4, 8\) and \(2, 5, 7\)"),
        ((4, 8), (2, 5, 8), 1, "must be"),
        ((4, 4, 8), (2, 5, 8), 0, "k must be at least 1, got 0"),
    ],
)
def test_names_what_does_not_fit(queries, keys, k, message):
    with pytest.raises(ValueError, match=message):
        best_keys(torch.zeros(queries), torch.zeros(keys), k)
