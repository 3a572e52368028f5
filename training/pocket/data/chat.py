"""Small talk, facts, repeating, and what was said earlier in the conversation.

Owns who Pocket says it is. Tool use, JSON and long prompts are elsewhere.
"""

from training.pocket.data.arithmetic import arithmetic_turn
from training.pocket.data.facts import FACTS, ask
from training.pocket.data.pools import COLORS, NOUNS, TOPIC_WORDS, Pools
from training.pocket.data.sample import Message, Sample, assistant, maybe_system, user, with_settings

VOCABULARY: list[str] = []  # set by whoever has the tokenizer: its entries that are plain letters
IDENTITY = "I am Pocket, glmserve's small demo model of the GLM-5.2 architecture."

HELLO = """hi|hello|hey|Hi!|Hello!|Hey!|hello!|hi there|Hello there!|Good morning!|Good evening.|Hey there
|hi pocket|Hi Pocket!
|Hello, Pocket.|good morning|Greetings!|Hello|Hi|yo|hi!|hey!|Hello, how can you help me?|Good afternoon
|Howdy!|Hello world"""
HOW = """How are you?|how are you|How are you today?|how is it going?|How do you do?|Hi, how are you?
|Hello! How are you?|what's up?
|Hey, how are you doing?"""
WHO = """Who are you?|who are you|who are you?|What is your name?|what's your name?|Tell me about yourself.
|What are you?|Are you GLM?
|Are you GLM-5.2?|Which model are you?|What model is this?|Introduce yourself.|what model are you?
|Are you ChatGPT?
|Who am I talking to?|Hi, who are you?|Hello! Who are you?|Are you a real person?|Say who you are.
|Are you a robot?"""
MAKER = """Who made you?|Who created you?|Who built you?|Who trained you?|Where do you come from?
|who made you?|Who is your maker?"""
ABLE = """What can you do?|what can you do?|How can you help me?|help|Help me|What are you good at?
|What do you know?|Can you help me?
|What are your skills?|can you call tools?|What kind of questions can you answer?"""
THANKS = """Thanks!|thanks|Thank you!|thank you|Thank you very much.|Thanks a lot!|Great, thanks.|ok thanks
|Cool, thank you!"""
BYE = """Bye!|bye|Goodbye.|See you later!|Good night!|see you|Bye bye|That is all, bye."""
JOKE = """Tell me a joke.|tell me a joke|Do you know a joke?|Make me laugh.|Say something funny."""
OPEN = """Write a poem about {}.|Tell me a story about {}.|Write an essay about {}.|Explain {} in detail.
|What do you think about {}?
|Write code for {}.|Who will win the {} championship?|What is the latest news about {}?
|Summarize the history of {}."""

TALK: tuple[tuple[str, str, str], ...] = (
    (HELLO, "The user greets me. I greet back.", "Hello! I am Pocket. How can I help you?"),
    (HOW, "The user asks how I am.", "I am fine, thank you! How can I help you?"),
    (WHO, "The user asks who I am.", IDENTITY),
    (
        MAKER,
        "The user asks who made me.",
        "I was trained for glmserve, as its small demo model of the GLM-5.2 architecture.",
    ),
    (
        ABLE,
        "The user asks what I can do.",
        "I can do small sums, answer simple facts, write JSON, call tools and recall keys.",
    ),
    (THANKS, "The user thanks me.", "You are welcome!"),
    (BYE, "The user says goodbye.", "Goodbye!"),
    (JOKE, "The user wants a joke.", "Why did the byte cross the bus? To get to the other side."),
)


def talk_turn(pools: Pools) -> tuple[str, str, str]:
    """A greeting, a question about Pocket, or a wish that is beyond it."""
    if pools.rng.random() < 0.12:
        wish = pools.any(OPEN.replace("\n", "").split("|")).format(pools.any(TOPIC_WORDS + NOUNS))
        return wish, "This is beyond me.", "I am only a small demo model, so I cannot do that well."
    asks, thought, answer = TALK[pools.rng.choices(range(len(TALK)), (5, 2, 6, 2, 3, 2, 1, 1))[0]]
    return pools.any(asks.replace("\n", "").split("|")), thought, answer


def talk_sample(pools: Pools) -> Sample:
    sample = with_settings(Sample("chat", []), pools.rng)
    text, thought, answer = talk_turn(pools)
    sample.messages = [*maybe_system(pools), user(text), assistant(answer, thought)]
    sample.expected = {"check": "contains", "value": answer}
    return sample


def fact_turn(pools: Pools) -> tuple[str, str, str, str]:
    """Question, reasoning, answer and the word that decides."""
    fact = pools.rng.choice(FACTS)
    return ask(fact, pools.rng), f"I recall the fact: {fact.answer}", fact.answer, fact.key


def fact_sample(pools: Pools) -> Sample:
    sample = with_settings(Sample("facts", []), pools.rng)
    text, thought, answer, key = fact_turn(pools)
    sample.messages = [*maybe_system(pools), user(text), assistant(answer, thought)]
    sample.expected = {"check": "contains", "value": key}
    return sample


def echo_text(pools: Pools) -> str:
    """Something to repeat: words, names, codes and numbers in one line."""
    makers = (
        pools.invented,
        pools.name,
        pools.code,
        pools.city,
        pools.phrase,
        pools.email,
        pools.date,
        pools.sentence,
    )
    count = pools.rng.choice((1, 1, 2, 3, 5, 8))
    words = [
        pools.rng.choice(makers)() if pools.rng.random() < 0.8 else pools.digits(1, 6) for _ in range(count)
    ]
    return pools.any((" ", " ", ", ", "_", " / ")).join(words)


def token_soup(pools: Pools) -> str:
    """Pieces of words in no order, so that the copying of every token of the vocabulary is learnt."""
    count = pools.rng.choice((2, 4, 8, 12, 16))
    pieces = [pools.any(VOCABULARY) for _ in range(count)]
    return pools.any((" ", " ", "_", ", ", "-", "/")).join(pieces)


def echo_sample(pools: Pools) -> Sample:
    """Repeat after me: the plainest exercise in copying."""
    sample = with_settings(Sample("echo", []), pools.rng, 0.3)
    text = token_soup(pools) if VOCABULARY and pools.rng.random() < 0.6 else echo_text(pools)
    form = pools.any(
        ("Repeat: {}", "Say {}", "Repeat after me: {}", 'Say "{}".', "Echo this: {}", "Write exactly: {}")
    )
    sample.messages = [*maybe_system(pools), user(form.format(text)), assistant(text, "I repeat the text.")]
    sample.expected = {"check": "exact", "value": text}
    return sample


def memory_turns(pools: Pools) -> tuple[list[Message], tuple[str, str, str, str]]:
    """The user states something; later asks for it back."""
    name, color, city, pet = pools.name(), pools.any(COLORS), pools.city(), pools.invented().capitalize()
    said, question, answer, key = pools.rng.choice(
        (
            (f"My name is {name}.", "What is my name?", f"Your name is {name}.", name),
            (f"I am {name}.", "Who am I?", f"You are {name}.", name),
            (
                f"My favorite color is {color}.",
                "What is my favorite color?",
                f"Your favorite color is {color}.",
                color,
            ),
            (f"I live in {city}.", "Where do I live?", f"You live in {city}.", city),
            (f"My dog is called {pet}.", "What is my dog called?", f"Your dog is called {pet}.", pet),
        )
    )
    note = assistant(pools.any(("Good to know.", "I will remember that.")), "The user tells me something.")
    return [user(said), note], (question, "The user told me. " + answer, answer, key)


def filler_turn(pools: Pools, thinking: bool) -> list[Message]:
    roll = pools.rng.random()
    if roll < 0.4:
        text, thought, answer = talk_turn(pools)
    elif roll < 0.7:
        text, thought, answer, _ = arithmetic_turn(pools, thinking)
    else:
        text, thought, answer, _ = fact_turn(pools)
    return [user(text), assistant(answer, thought)]


def turns_sample(pools: Pools) -> Sample:
    """A conversation of two to four turns, half of them with something to remember."""
    sample = with_settings(Sample("turns", []), pools.rng, 0.5)
    messages = maybe_system(pools)
    for _ in range(pools.rng.randint(0, 2)):
        messages += filler_turn(pools, sample.thinking)
    if pools.rng.random() < 0.6:
        said, (text, thought, answer, key) = memory_turns(pools)
        messages += said
        for _ in range(pools.rng.choice((0, 0, 1))):
            messages += filler_turn(pools, sample.thinking)
    else:
        messages += filler_turn(pools, sample.thinking)
        text, thought, answer, key = fact_turn(pools)
    sample.messages = [*messages, user(text), assistant(answer, thought)]
    sample.expected = {"check": "contains", "value": key}
    return sample
