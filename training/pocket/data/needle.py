"""Long prompts with keys hidden in filler text, and questions that ask for one.

Owns the filler and the wording. Lengths are given in characters here; callers who want tokens measure
afterwards.
"""

from training.pocket.data.pools import ADJECTIVES, COLORS, FIRST_NAMES, NOUNS, OBJECTS, VERBS, Pools
from training.pocket.data.sample import Message, Sample, assistant, maybe_system, user, with_settings

KEY_KINDS = ("access code", "secret key", "password", "magic number", "pass phrase", "pin", "serial number")


def filler_sentence(pools: Pools) -> str:
    """One sentence of no importance."""
    any_ = pools.any
    noun, other, adjective = any_(NOUNS), any_(NOUNS), any_(ADJECTIVES)
    roll = pools.rng.randrange(8)
    if roll == 0:
        return f"The {adjective} {noun} stood near the {other}."
    if roll == 1:
        return f"{any_(FIRST_NAMES)} saw {pools.rng.randint(2, 99)} {any_(OBJECTS)} in the {noun}."
    if roll == 2:
        return f"Nobody wanted to {any_(VERBS)} the {any_(COLORS)} {noun}."
    if roll == 3:
        return f"On {pools.weekday()} the {noun} was {adjective} and the {other} was {any_(ADJECTIVES)}."
    if roll == 4:
        return f"They {any_(VERBS)} every {noun} before they {any_(VERBS)} the {other}."
    if roll == 5:
        return f"It is said that {any_(FIRST_NAMES)} will {any_(VERBS)} the {noun} at {pools.clock()}."
    if roll == 6:
        return f"A {any_(COLORS)} {noun} is better than a {adjective} {other}."
    return f"In {pools.city()} there was a {adjective} {noun}."


def filler(pools: Pools, characters: int) -> list[str]:
    sentences: list[str] = []
    size = 0
    while size < characters:
        sentences.append(filler_sentence(pools))
        size += len(sentences[-1]) + 1
    return sentences


def key_fact(pools: Pools) -> tuple[str, str]:
    """What the key opens, and the key."""
    owners = (f"the {pools.any(COLORS)} {pools.any(NOUNS)}", pools.name(), pools.invented().capitalize())
    thing = f"{pools.any(KEY_KINDS)} of {pools.any(owners)}"
    value = pools.digits(4, 7) if pools.rng.random() < 0.5 else pools.code()
    return thing, value


def question(pools: Pools, thing: str) -> str:
    return pools.any(
        ("What is the {}?", "what is the {}?", "Tell me the {}.", "Which is the {}?", "Find the {}.")
    ).format(thing)


def answer_to(thing: str, value: str) -> Message:
    return assistant(f"The {thing} is {value}.", f"The text says: The {thing} is {value}.")


def needle_sample(
    pools: Pools, characters: int, num_keys: int | None = None, num_questions: int = 1
) -> Sample:
    """Filler of about `characters`, one to three keys somewhere in it, and one or more questions."""
    rng = pools.rng
    sample = with_settings(Sample("needle", []), rng, 0.6)
    keys = dict(key_fact(pools) for _ in range(num_keys or max(num_questions, rng.choice((1, 1, 2, 3)))))
    sentences = filler(pools, characters)
    for thing, value in keys.items():
        form = pools.any(
            ("The {} is {}.", "The {} is {}.", "Remember: the {} is {}.", "Note that the {} is {}.")
        )
        sentences.insert(rng.randint(0, len(sentences)), form.format(thing, value))
    text = pools.any((" ", " ", "\n")).join(sentences)
    asked = rng.sample(list(keys), min(num_questions, len(keys)))
    intro = pools.any(("Read this text.\n\n", "Here is a text:\n", "", "Text: "))
    messages = [*maybe_system(pools, 0.15)]
    ask = question(pools, asked[0])
    if rng.random() < 0.25:
        messages.append(user(f"{ask}\n\n{intro}{text}"))
    else:
        messages.append(user(f"{intro}{text}\n\n{ask}"))
    messages.append(answer_to(asked[0], keys[asked[0]]))
    for thing in asked[1:]:
        messages += [user(question(pools, thing)), answer_to(thing, keys[thing])]
    sample.messages = messages
    if num_questions > 1:
        sample.thinking, sample.clear_thinking = rng.random() < 0.5, False
    sample.expected = {"check": "contains", "value": keys[asked[-1]]}
    return sample
