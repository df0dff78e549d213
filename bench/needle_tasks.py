"""Needle in a haystack, as in MInference's variant: a magic number of a city, exact match, no judge."""

from collections.abc import Callable

from retrieval_attn.bench import facts
from retrieval_attn.bench.examples import Example, Turn, rng_of
from retrieval_attn.bench.ruler_tasks import inserted_text

NEEDLE = "The special magic {city} number is: {number}"
BEGIN = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be "
    "irrelevant).\n"
)
ASK = (
    "\n\nQuestion: What is the special magic {city} number? Don't give information outside the document or repeat your "
    "findings. Keep your response short and direct. Answer: "
)
MAX_NEW_TOKENS = 32


def needle_maker(
    n_tokens: int, depth: float, sample: int, seed: int, text: str | None, plain: bool = False
) -> Callable[[int], Example]:
    """What `fit` asks for examples of growing size, in words. depth: 0 puts the needle first, 1 last.

    text: the haystack; None takes generated prose. plain: the question and the needle without MInference's instructions
    and line breaks, for models that know no instructions. The same arguments give the same examples.
    """
    rng = rng_of(seed, "needle", n_tokens, f"{depth:.6f}", sample)
    city = facts.CITIES[int(rng.integers(len(facts.CITIES)))]
    number = str(rng.integers(10**6, 10**7))
    essay = facts.Essay(text, rng)
    needle = NEEDLE.format(city=city, number=number)
    begin, ask = ("", f"\n\nWhat is the special magic {city} number?") if plain else (BEGIN, ASK.format(city=city))

    def make(size: int) -> Example:
        sentences = facts.split_sentences(essay.words(size))
        at = round(depth * len(sentences))
        if plain:
            body = inserted_text(sentences, [f"{needle}."], [at])
        else:
            body = "".join([*sentences[:at], f"\n{needle}\n", *sentences[at:]]).strip()
        turn = Turn(ask, (number,), "contains", MAX_NEW_TOKENS, golden=number, depth=depth)
        return Example("needle", f"{n_tokens}-{depth:.3f}-{sample}", begin + body, (turn,), facts={"needle": needle})

    return make
