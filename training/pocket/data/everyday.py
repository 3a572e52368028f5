"""The everyday tools: weather, time, reminders, messages, search, lights, money, translation and the like.

Owns their senses and wording. Names of functions and parameters are drawn afresh for every sample.
"""

from collections.abc import Callable

from training.pocket.data.pools import COLORS, Pools, words
from training.pocket.data.toolbox import Tool, city, everyday, flag, integer, one_decimal, param

CURRENCIES = ["USD", "EUR", "GBP", "JPY", "CHF", "SEK", "INR", "CNY", "BRL", "CAD", "AUD", "NOK"]
LANGUAGES = words(
    """French German Spanish Italian Polish Dutch Greek Turkish Hindi Swedish Korean Japanese"""
)


def weather(pools: Pools) -> Tool:
    keyed = [param(pools, "city", "city location place town", "string", "Name of the city", city)]
    forms = [
        "What is the weather in {city}?",
        "How is the weather in {city}?",
        "weather in {city}?",
        "Is it raining in {city}?",
        "What's the weather like in {city} today?",
        "Tell me the weather for {city}.",
    ]
    return everyday(
        pools,
        "get fetch check read",
        "weather forecast temperature",
        "Get the weather of a city",
        keyed,
        forms,
    )


def local_time(pools: Pools) -> Tool:
    keyed = [param(pools, "city", "city location place zone", "string", "The city", city)]
    forms = [
        "What time is it in {city}?",
        "Tell me the time in {city}.",
        "Current time in {city}?",
        "How late is it in {city}?",
    ]
    return everyday(
        pools, "get fetch tell find", "time clock", "Get the current time in a city", keyed, forms
    )


def reminder(pools: Pools) -> Tool:
    keyed = [
        param(pools, "text", "text message title note", "string", "What to remember", lambda p: p.sentence()),
        param(pools, "at", "time at hour when", "string", "The time, as HH:MM", lambda p: p.clock()),
    ]
    forms = [
        'Remind me at {at}: "{text}"',
        "Set a reminder for {at} with the text: {text}",
        'Set a reminder "{text}" at {at}.',
    ]
    return everyday(
        pools, "set create add make", "reminder alarm alert", "Create a reminder at a time", keyed, forms
    )


def timer(pools: Pools) -> Tool:
    keyed = [
        param(
            pools,
            "minutes",
            "minutes duration length",
            "integer",
            "Number of minutes",
            lambda p: p.rng.randint(1, 180),
        )
    ]
    forms = [
        "Set a timer for {minutes} minutes.",
        "Start a timer of {minutes} minutes",
        "timer {minutes} minutes please",
    ]
    return everyday(pools, "set start run create", "timer countdown", "Start a timer", keyed, forms)


def message(pools: Pools) -> Tool:
    keyed = [
        param(
            pools,
            "to",
            "recipient to person receiver contact",
            "string",
            "Who gets the message",
            lambda p: p.name(),
        ),
        param(
            pools,
            "text",
            "text body message content",
            "string",
            "Text of the message",
            lambda p: p.sentence(),
        ),
    ]
    forms = [
        'Send a message to {to}: "{text}"',
        "Write to {to}: {text}",
        'Tell {to} "{text}"',
        'Message {to} saying "{text}".',
    ]
    return everyday(
        pools, "send post write deliver", "message text sms", "Send a message to a person", keyed, forms
    )


def email(pools: Pools) -> Tool:
    keyed = [
        param(
            pools,
            "to",
            "address email to recipient",
            "string",
            "Address of the recipient",
            lambda p: p.email(),
        ),
        param(pools, "subject", "subject title topic", "string", "Subject line", lambda p: p.phrase()),
        param(
            pools,
            "urgent",
            "urgent important priority",
            "boolean",
            "Whether it is urgent",
            lambda p: True,
            False,
        ),
    ]
    forms = [
        'Send an email to {to} with subject "{subject}".',
        'Email {to}, subject "{subject}".',
        "Mail {to} with the subject {subject}",
    ]
    return everyday(pools, "send write compose", "email mail letter", "Send an email", keyed, forms)


def search(pools: Pools) -> Tool:
    keyed = [
        param(
            pools, "query", "query term text question", "string", "What to search for", lambda p: p.phrase()
        ),
        param(
            pools,
            "limit",
            "limit count max number",
            "integer",
            "Number of results",
            lambda p: p.rng.randint(1, 50),
            False,
        ),
    ]
    forms = [
        "Search for {query}",
        "Search the web for {query}",
        'Look up "{query}".',
        "Find pages about {query}",
        "Search: {query}",
    ]
    return everyday(
        pools, "search find lookup query", "web internet pages documents", "Search the web", keyed, forms
    )


def light(pools: Pools) -> Tool:
    keyed = [
        param(
            pools,
            "room",
            "room place area zone",
            "string",
            "The room",
            lambda p: p.any(
                ["kitchen", "bedroom", "bathroom", "hall", "garage", "garden", "office", "cellar", "attic"]
            ),
        ),
        param(pools, "on", "on state power enabled", "boolean", "True to turn it on", flag),
    ]
    forms = [
        "Turn {on:on/off} the light in the {room}.",
        "Switch the {room} light {on:on/off}",
        "Please turn {on:on/off} the {room} lamp.",
    ]
    return everyday(
        pools, "set switch control toggle", "light lamp lights", "Turn a light on or off", keyed, forms
    )


def money(pools: Pools) -> Tool:
    keyed = [
        param(
            pools,
            "amount",
            "amount value sum",
            "number",
            "Amount of money",
            lambda p: p.rng.choice((integer, one_decimal))(p),
        ),
        param(
            pools,
            "from",
            "from source base",
            "string",
            "Currency code to convert from",
            lambda p: p.any(CURRENCIES),
        ),
        param(
            pools,
            "to",
            "to target dest",
            "string",
            "Currency code to convert to",
            lambda p: p.any(CURRENCIES),
        ),
    ]
    forms = [
        "Convert {amount} {from} to {to}.",
        "How much is {amount} {from} in {to}?",
        "{amount} {from} in {to}?",
        "Exchange {amount} {from} into {to}",
    ]
    return everyday(
        pools,
        "convert exchange change",
        "currency money amount",
        "Convert money between currencies",
        keyed,
        forms,
    )


def translation(pools: Pools) -> Tool:
    keyed = [
        param(
            pools, "text", "text sentence phrase input", "string", "Text to translate", lambda p: p.sentence()
        ),
        param(
            pools,
            "to",
            "language target to",
            "string",
            "Language to translate to",
            lambda p: p.any(LANGUAGES),
        ),
    ]
    forms = ['Translate "{text}" to {to}.', "Translate into {to}: {text}", 'How do you say "{text}" in {to}?']
    return everyday(
        pools,
        "translate convert render",
        "text sentence phrase",
        "Translate text to a language",
        keyed,
        forms,
    )


def stock(pools: Pools) -> Tool:
    def ticker(p: Pools) -> str:
        return "".join(p.rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=p.rng.randint(3, 4)))

    keyed = [param(pools, "symbol", "symbol ticker stock", "string", "Ticker symbol", ticker)]
    forms = [
        "What is the price of {symbol} stock?",
        "How is {symbol} doing?",
        "Stock price of {symbol}?",
        "Get me the quote for {symbol}.",
    ]
    return everyday(
        pools, "get fetch read lookup", "price quote stock", "Get the price of a stock", keyed, forms
    )


def person(pools: Pools) -> Tool:
    keyed = [
        param(
            pools,
            "name",
            "name user person customer",
            "string",
            "Name of the person",
            lambda p: p.full_name(),
        )
    ]
    forms = [
        "Look up {name}.",
        "Find the record of {name}",
        "Who is {name}?",
        "Get the data of {name} please.",
    ]
    return everyday(
        pools,
        "find lookup get load",
        "user person customer contact",
        "Look up a person by name",
        keyed,
        forms,
    )


def sums(pools: Pools) -> Tool:
    keyed = [
        param(
            pools,
            "a",
            "a x first left",
            "number",
            "First number",
            lambda p: p.rng.choice((integer, one_decimal))(p),
        ),
        param(
            pools,
            "b",
            "b y second right",
            "number",
            "Second number",
            lambda p: p.rng.choice((integer, one_decimal))(p),
        ),
    ]
    forms = [
        "What is {a} + {b}?",
        "Add {a} and {b}.",
        "Compute {a} plus {b}.",
        "What is {a}+{b}?",
        "Sum of {a} and {b}?",
    ]
    return everyday(pools, "add sum plus calculate", "numbers values", "Add two numbers", keyed, forms)


def rooms(pools: Pools) -> Tool:
    keyed = [
        param(pools, "city", "city location town", "string", "City of the hotel", city),
        param(
            pools,
            "date",
            "date day start arrival",
            "string",
            "Day of arrival, YYYY-MM-DD",
            lambda p: p.date(),
        ),
        param(
            pools, "nights", "nights days stay", "integer", "Number of nights", lambda p: p.rng.randint(1, 21)
        ),
        param(
            pools,
            "breakfast",
            "breakfast meals food",
            "boolean",
            "Whether to include breakfast",
            lambda p: True,
            False,
        ),
    ]
    forms = [
        "Book a hotel in {city} from {date} for {nights} nights.",
        "I need a room in {city} on {date} for {nights} nights.",
        "Reserve {nights} nights in {city}, arriving {date}.",
    ]
    return everyday(pools, "book reserve order", "hotel room stay", "Book a hotel room", keyed, forms)


def paint(pools: Pools) -> Tool:
    keyed = [
        param(
            pools,
            "shape",
            "shape figure form",
            "string",
            "Shape to draw",
            lambda p: p.any(["circle", "square", "triangle", "star", "line", "cube"]),
        ),
        param(pools, "color", "color paint ink", "string", "Color of the shape", lambda p: p.any(COLORS)),
        param(pools, "size", "size width radius", "integer", "Size in pixels", integer),
    ]
    forms = [
        "Draw a {color} {shape} of size {size}.",
        "Please draw a {shape}, {color}, {size} pixels.",
        "I want a {color} {shape} with size {size}",
    ]
    return everyday(pools, "draw paint plot", "shape figure drawing", "Draw a shape", keyed, forms)


EVERYDAY: tuple[Callable[[Pools], Tool], ...] = (
    weather, weather, local_time, reminder, timer, message, email, search, light, money, translation,
    stock, person, sums, rooms, paint,
)  # fmt: skip
