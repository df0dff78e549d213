"""A layer of transformers' cache that serves full attention and a recurrence side by side (Falcon-H1, Zaya)."""

from typing import Any

from torch import Tensor

from retrieval_attn.config import RetrievalConfig
from retrieval_attn.hf.layer import RetrievalLayer
from retrieval_attn.hf.marks import copied
from retrieval_attn.hf.versions import LinearAttentionCacheLayerMixin, LinearAttentionLayer


class HybridLayer(RetrievalLayer, LinearAttentionCacheLayerMixin):
    """Keys and values are kept as in any of our layers; what the recurrence keeps, a stock layer of its own holds."""

    is_croppable = False

    def __init__(self, n_states: int, *args: Any) -> None:
        """n_states: that the recurrence keeps in this layer; the rest as for `RetrievalLayer`."""
        super().__init__(*args)
        self.recurrent = LinearAttentionLayer(number_of_states=n_states)

    # What transformers' cache asks of a layer with a recurrence.

    @property
    def number_of_states(self) -> int:
        return self.recurrent.number_of_states

    @property
    def conv_states(self) -> dict[int, Tensor | None]:
        return self.recurrent.conv_states

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        return self.recurrent.recurrent_states

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return self.recurrent.has_previous_state

    @property
    def record_past(self) -> bool:
        return self.recurrent.record_past

    def activate_past_recording(self) -> None:
        self.recurrent.activate_past_recording()

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.recurrent.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.recurrent.update_recurrent_state(*args, **kwargs)

    # What concerns both parts.

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.recurrent.reset()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the named rows."""
        super().batch_select_indices(indices)
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: state[indices.to(state.device)] for i, state in states.items() if state is not None})

    def fork(self, config: RetrievalConfig | None = None) -> "HybridLayer":
        """As of any of our layers; a state is copied."""
        twin = super().fork(config)
        assert isinstance(twin, HybridLayer)
        twin.recurrent = copied(self.recurrent)
        return twin
