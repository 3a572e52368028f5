"""Arithmetic tasks with the work written out digit by digit, as the reasoning of the answer.

Owns the wording of questions and the written procedure for sums, differences, products and short word
problems.
"""

from collections.abc import Callable

from training.pocket.data.pools import OBJECTS, Pools
from training.pocket.data.sample import Sample, assistant, maybe_system, user, with_settings

PLACES = ("Ones", "Tens", "Hundreds", "Thousands", "Ten thousands")


def add_steps(a: int, b: int) -> str:
    """The written sum of two non-negative numbers, from the ones upwards."""
    steps, carry, place = [], 0, 0
    x, y = a, b
    while x or y or not place:
        p, q = x % 10, y % 10
        total = p + q + carry
        carried = f" + {carry}" if carry else ""
        rest = x // 10 or y // 10
        put = f", write {total % 10} carry 1" if total > 9 and rest else ""
        steps.append(f"{PLACES[place]}: {p} + {q}{carried} = {total}{put}.")
        carry = total // 10
        x, y, place = x // 10, y // 10, place + 1
    return f"{' '.join(steps)} So {a} + {b} = {a + b}."


def compare_steps(a: int, b: int) -> str:
    """Which of two non-negative numbers is larger, from the first digit that differs."""
    sign = "<" if a < b else ">" if a > b else "="
    long_a, long_b = len(str(a)), len(str(b))
    if long_a != long_b:
        return f"{a} has {long_a} digits and {b} has {long_b}. So {a} {sign} {b}."
    steps = []
    for place, (p, q) in enumerate(zip(str(a), str(b), strict=True)):
        step = "<" if p < q else ">" if p > q else "="
        steps.append(f"{PLACES[long_a - 1 - place]}: {p} {step} {q}.")
        if p != q:
            break
    return f"{' '.join(steps)} So {a} {sign} {b}."


def subtract_steps(a: int, b: int) -> str:
    """The written difference after a comparison; a smaller first number is turned round."""
    compared = compare_steps(a, b)
    if a < b:
        return f"{compared} Turn it round. {borrow_steps(b, a)} So {a} - {b} = {a - b}."
    return f"{compared} {borrow_steps(a, b)}"


def borrow_steps(a: int, b: int) -> str:
    """The written difference of a number and one that is not larger."""
    steps, borrow, place = [], 0, 0
    x, y = a, b
    while x or y or not place:
        p, q = x % 10, y % 10
        borrowed = f" - {borrow}" if borrow else ""
        low = p - q - borrow
        if low < 0:
            steps.append(f"{PLACES[place]}: 1{p} - {q}{borrowed} = {low + 10}, borrow 1.")
        else:
            steps.append(f"{PLACES[place]}: {p} - {q}{borrowed} = {low}.")
        borrow = int(low < 0)
        x, y, place = x // 10, y // 10, place + 1
    return f"{' '.join(steps)} So {a} - {b} = {a - b}."


def multiply_steps(a: int, b: int) -> str:
    """A product with a one-digit second factor, part by part, then the parts summed."""
    if a < 10:
        return f"{a} * {b} = {a * b}."
    parts = [int(d) * 10 ** (len(str(a)) - 1 - i) for i, d in enumerate(str(a))]
    parts = [part for part in parts if part]
    text = ", ".join(f"{part} * {b} = {part * b}" for part in parts) + "."
    total = parts[0] * b
    for part in parts[1:]:
        text += f" {add_steps(total, part * b)}"
        total += part * b
    return f"{text} So {a} * {b} = {a * b}."


OPERATIONS: dict[str, Callable[[int, int], str]] = {"+": add_steps, "-": subtract_steps, "*": multiply_steps}
WORDS = {"+": ("plus", "+"), "-": ("minus", "-"), "*": ("times", "*", "x")}


def value_of(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def operands(pools: Pools, op: str, simple: bool) -> tuple[int, int]:
    rng = pools.rng
    if op == "*":
        return (rng.randint(0, 12), rng.randint(0, 9)) if simple else (rng.randint(2, 130), rng.randint(2, 9))
    top = rng.choice((9, 20, 99, 99)) if simple else rng.choice((20, 99, 999, 999, 999))
    a, b = rng.randint(0, top), rng.randint(0, rng.choice((9, top, top)))
    return (b, a) if op == "-" and a < b and rng.random() < (0.9 if simple else 0.3) else (a, b)


def wording(pools: Pools, a: int, op: str, b: int) -> str:
    """A question for one operation."""
    word = pools.any(WORDS[op])
    space = "" if pools.rng.random() < 0.35 and word in "+-*x" else " "
    expression = f"{a}{space}{word}{space}{b}"
    forms = [
        f"What is {expression}?",
        f"what is {expression}?",
        f"What's {expression}?",
        f"Calculate {expression}.",
        f"Compute {expression}",
        f"How much is {expression}?",
        f"{expression} = ?",
        f"{expression}=",
        f"{expression}",
        f"Hi! What is {expression}?",
        f"Can you tell me what {expression} is?",
        f"Please compute {expression}.",
        f"Solve: {expression}",
    ]
    if op == "+":
        forms += [f"Add {a} and {b}.", f"What is the sum of {a} and {b}?", f"sum of {a} and {b}?"]
    if op == "-":
        forms += [f"Subtract {b} from {a}.", f"What is the difference of {a} and {b}?"]
    if op == "*":
        forms += [f"Multiply {a} by {b}.", f"What is the product of {a} and {b}?"]
    return pools.any(forms)


def one_operation(pools: Pools, simple: bool) -> tuple[str, str, str, int]:
    """Question, reasoning, answer and value for one operation."""
    op = pools.any(("+", "+", "+", "-", "-", "*"))
    a, b = operands(pools, op, simple)
    return (
        wording(pools, a, op, b),
        OPERATIONS[op](a, b),
        f"{a} {op} {b} = {value_of(a, op, b)}.",
        value_of(a, op, b),
    )


def two_operations(pools: Pools) -> tuple[str, str, str, int]:
    """A chain `a op b op c`, multiplication first where it is there."""
    rng = pools.rng
    a, b, c = rng.randint(2, 299), rng.randint(2, 199), rng.randint(2, 99)
    first, second = rng.choice(("+", "-")), rng.choice(("+", "-"))
    if rng.random() < 0.3:
        b, c = rng.randint(2, 12), rng.randint(2, 9)
        a = rng.randint(b * c, 299)
        middle, total = b * c, value_of(a, first, b * c)
        work = f"First {b} * {c} = {middle}. Then {a} {first} {middle}. {OPERATIONS[first](a, middle)}"
        text = f"{a} {first} {b} * {c}"
    else:
        a, b = max(a, b), min(a, b)
        middle = value_of(a, first, b)
        c = min(c, middle) if second == "-" else c
        total = value_of(middle, second, c)
        then = f"Then {middle} {second} {c}. {OPERATIONS[second](middle, c)}"
        work = f"First {a} {first} {b}. {OPERATIONS[first](a, b)} {then}"
        text = f"{a} {first} {b} {second} {c}"
    ask = pools.any(
        ("What is {}?", "Calculate {}.", "{} = ?", "How much is {}?", "Work out {}", "Compute {}.")
    ).format(text)
    return ask, f"{work} So {text} = {total}.", f"{text} = {total}.", total


def story(pools: Pools) -> tuple[str, str, str, int]:
    """A short word problem of one or two steps."""
    rng = pools.rng
    who, things = pools.name(), pools.any(OBJECTS)
    have, more = rng.randint(5, 250), rng.randint(2, 150)
    gain = pools.any(("buys", "gets", "finds", "wins"))
    loss = pools.any(("gives away", "loses", "sells", "uses"))
    roll = rng.randrange(4)
    if roll == 0:
        text, total, work = f"{gain} {more} more", have + more, add_steps(have, more)
        work = f"{have} + {more}. {work}"
    elif roll == 1:
        have, more = max(have, more), min(have, more)
        text, total = f"{loss} {more}", have - more
        work = f"{have} - {more}. {subtract_steps(have, more)}"
    elif roll == 2:
        each, groups = rng.randint(2, 60), rng.randint(2, 9)
        answer = f"{who} has {groups * each} {things}."
        ask = f"{who} has {groups} boxes with {each} {things} each. How many {things} does {who} have?"
        return ask, f"{each} * {groups}. {multiply_steps(each, groups)}", answer, groups * each
    else:
        middle = have + more
        less = rng.randint(1, middle)
        text, total = f"{gain} {more} more and then {loss} {less}", middle - less
        then = f"Then {middle} - {less}. {subtract_steps(middle, less)}"
        work = f"First {have} + {more}. {add_steps(have, more)} {then}"
    question = pools.any(
        (f"How many {things} does {who} have now?", f"How many {things} are left?", "How many now?")
    )
    return f"{who} has {have} {things} and {text}. {question}", work, f"{who} has {total} {things}.", total


def comparison(pools: Pools) -> tuple[str, str, str, int]:
    """Which of two numbers is larger or smaller."""
    top = pools.any(("99", "999"))
    a, b = pools.rng.randint(0, int(top)), pools.rng.randint(0, int(top))
    b += a == b
    larger = pools.rng.random() < 0.6
    word = pools.any(("larger", "bigger", "greater") if larger else ("smaller", "less"))
    value = max(a, b) if larger else min(a, b)
    work = f"{compare_steps(a, b)} {value} is {word}."
    return f"Which is {word}, {a} or {b}?", work, f"{value} is {word}.", value


def arithmetic_turn(pools: Pools, thinking: bool) -> tuple[str, str, str, int]:
    """One question; with thinking off only what can be answered at sight."""
    roll = pools.rng.random()
    if not thinking:
        return one_operation(pools, simple=True) if roll < 0.9 else comparison(pools)
    if roll < 0.6:
        return one_operation(pools, simple=roll < 0.1)
    if roll < 0.77:
        return two_operations(pools)
    return story(pools) if roll < 0.94 else comparison(pools)


def drill_sample(pools: Pools) -> Sample:
    """A sum at sight, without thinking: most are differences, half of those below zero. Training only."""
    rng = pools.rng
    sample = with_settings(Sample("arithmetic", []), rng, 0.0)
    op = rng.choices("+-*", (3, 6, 1))[0]
    a, b = operands(pools, op, simple=True)
    if op == "-" and rng.random() < 0.5:
        a, b = min(a, b), max(a, b)
    answer = f"{a} {op} {b} = {value_of(a, op, b)}."
    sample.messages = [*maybe_system(pools, 0.2), user(wording(pools, a, op, b)), assistant(answer)]
    sample.expected = {"check": "number", "value": value_of(a, op, b)}
    return sample


def arithmetic_sample(pools: Pools) -> Sample:
    """A single question of arithmetic."""
    sample = with_settings(Sample("arithmetic", []), pools.rng, 0.75)
    ask, work, answer, value = arithmetic_turn(pools, sample.thinking)
    sample.messages = [*maybe_system(pools, 0.2), user(ask), assistant(answer, work)]
    sample.expected = {"check": "number", "value": value}
    return sample
