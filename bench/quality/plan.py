"""What a run of tasks consists of: so many examples of each task and length, in each mode."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from retrieval_attn.bench.quality.examples import Example, Prompts, fit
from retrieval_attn.bench.quality.options import Settings
from retrieval_attn.bench.quality.runner import Planned
from retrieval_attn.llm import LLM

# (task, tokens, sample) -> what `fit` asks for examples of growing size.
MakerOf = Callable[[str, int, int], Callable[[int], Example]]


def plan_tasks(
    settings: Settings, tasks: Sequence[str], maker_of: MakerOf, modes: Sequence[str], llm: LLM
) -> list[Planned]:
    """Every task at every length, the shortest first; at most `limit` examples of each.

    Raises ValueError if the model is too short for a context. Examples are made when their turn comes.
    """
    require_room(settings, llm.max_tokens)
    prompts = Prompts(llm)
    return [
        one
        for context in sorted(settings.contexts)
        for task in tasks
        for one in _of_task(settings, task, context, maker_of, modes, prompts, llm.max_tokens)
    ]


def require_room(settings: Settings, longest: int) -> None:
    """Raise ValueError if a context is longer than the model's longest."""
    if max(settings.contexts) > longest:
        raise ValueError(f"--context {max(settings.contexts)} is longer than the model, which takes {longest} tokens")


def _of_task(
    settings: Settings, task: str, context: int, maker_of: MakerOf, modes: Sequence[str], prompts: Prompts, longest: int
) -> Iterator[Planned]:
    for sample in range(settings.samples if settings.limit is None else min(settings.limit, settings.samples)):

        def make(sample: int = sample) -> Example:
            return fit(maker_of(task, context, sample), context, prompts, longest)

        for mode in modes:
            yield Planned(task, context, f"{task}-{context}-{sample}", mode, make)


def plan_examples(
    examples: Sequence[Example], context: int, modes: Sequence[str], cut: Callable[[Example], Example]
) -> list[Planned]:
    """Examples that exist already, such as those of a file; cut: makes one fit into `context` tokens, when its turn
    comes."""
    return [Planned(one.task, context, one.id, mode, partial(cut, one)) for one in examples for mode in modes]
