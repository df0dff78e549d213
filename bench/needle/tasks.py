"""Needle in a haystack, as in MInference's variant: a magic number of a city, exact match, no judge."""

from collections.abc import Callable, Sequence

from retrieval_attn.bench.quality.examples import Example, Turn, rng_of
from retrieval_attn.bench.ruler.tasks import Names, inserted, inserted_text
from retrieval_attn.bench.shared import facts

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
    n_tokens: int, depths: Sequence[float], sample: int, seed: int, text: str | None, plain: bool = False
) -> Callable[[int], Example]:
    """What `fit` asks for examples of growing size, in words: a needle, and a turn about it, for each depth.

    depths: in order, 0 puts a needle first, 1 last; of several needles each is about another city. text: the haystack;
    None takes generated prose. plain: the question and the needle without MInference's instructions and line breaks,
    for models that know no instructions. The same arguments give the same examples. Raises ValueError for more depths
    than there are cities.
    """
    if len(depths) > len(facts.CITIES):
        raise ValueError(
            f"a text holds at most {len(facts.CITIES)} needles, one of each city, got {len(depths)} depths"
        )
    rng = rng_of(seed, "needle", n_tokens, *(f"{depth:.6f}" for depth in depths), sample)
    cities = [facts.CITIES[i] for i in rng.permutation(len(facts.CITIES))[: len(depths)]]
    names = Names(rng)
    needles = [NEEDLE.format(city=city, number=names.draw("numbers")) for city in cities]
    essay = facts.Essay(text, rng)
    begin, ask = ("", "\n\nWhat is the special magic {city} number?") if plain else (BEGIN, ASK)

    def make(size: int) -> Example:
        sentences = facts.split_sentences(essay.words(size))
        places = [round(depth * len(sentences)) for depth in depths]
        if plain:
            body = inserted_text(sentences, [f"{needle}." for needle in needles], places)
        else:
            body = "".join(inserted(sentences, [f"\n{needle}\n" for needle in needles], places)).strip()
        turns = [
            Turn(
                ask.format(city=city),
                (number := needle.split(": ")[1],),
                "contains",
                MAX_NEW_TOKENS,
                golden=number,
                depth=depth,
            )
            for city, needle, depth in zip(cities, needles, depths, strict=True)
        ]
        return Example(
            "needle", needle_id(n_tokens, depths, sample), begin + body, tuple(turns), facts={"needles": needles}
        )

    return make


def needle_id(n_tokens: int, depths: Sequence[float], sample: int) -> str:
    """The example's id."""
    where = f"{depths[0]:.3f}" if len(depths) == 1 else f"{len(depths)} depths"
    return f"{n_tokens}-{where}-{sample}"
