"""Attention over the far keys from what one search found: the estimators of the runtime, one signature for all."""

from dataclasses import dataclass

from torch import Tensor

from retrieval_attn.bench.vectors.sources import Vectors
from retrieval_attn.far.estimators import estimate_attention
from retrieval_attn.index import Index, SearchResult
from retrieval_attn.kernels import TailSummary


@dataclass(frozen=True)
class Estimator:
    """name: as the runtime knows it. shared: a key found for one head serves its whole group.

    lifted: it needs hits of an index built with `lift`, one more than are used.
    """

    name: str
    shared: bool = False

    @property
    def lifted(self) -> bool:
        return self.name == "lift"

    def attend(
        self,
        query: Tensor,
        vectors: Vectors,
        hits: SearchResult,
        scale: float,
        tail: TailSummary | None,
        index: Index | None,
    ) -> Tensor:
        """Output (H, Dv) for query (H, 1, D) float32 and the hits of its search; index: the lifted one, for "lift"."""
        lift = index.lift if self.lifted and index is not None else None
        found = estimate_attention(
            query[None],
            vectors.keys,
            vectors.values,
            hits,
            scale,
            estimator=self.name,
            tail=tail,
            lift=lift,
            share_group=self.shared,
        )
        return found.state.out[0, :, 0]


# By column. Those named "-group" are what the runtime does by default; the others attend to top_k keys per head.
ESTIMATORS = {
    "topk": Estimator("topk"),
    "lift": Estimator("lift"),
    "tail": Estimator("tail"),
    "topk-group": Estimator("topk", shared=True),
    "tail-group": Estimator("tail", shared=True),
}
