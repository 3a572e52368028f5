"""Pools of words and invented names, each split into a training part and a held-out part.

Owns the split: a name belongs to the held-out part by a hash of its own letters, so training and evaluation
can never share one, whatever their seeds. Knows nothing of tasks or of the chat format.
"""

import random
import zlib
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """The words of a table written as text."""
    return text.split()


ONSETS = words(
    "b bl br c ch cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu "
    "r s sh sk sl sm sn sp st t th tr v w y z"
)
VOWELS = words("a e i o u a e i o ai ea ie oo ou")
CODAS = ["", "", "", "n", "r", "s", "l", "m", "t", "k", "nd", "rt", "st", "x", "ck", "ng"]

FIRST_NAMES = words("""Ada Alan Alice Amir Anna Arun Bea Ben Bob Carla Carlos Chen Clara Dan Dora Elif
Emma Eric Eva Felix Fiona Frank Gita Hana Hugo Ida Ines Ivan Jack Jane Jin Jonas Julia Kai Karl Kira
Lars Lea Leo Lily Liam Lucy Maria Mark Maya Mia Milo Mona Nadia Nina Noah Nora Olga Omar Oscar Paul Pia
Priya Rosa Ruth Sam Sara Sofia Sven Tara Theo Tim Tom Uma Vera Victor Wei Yara Yuki Zara Zoe Peter Laura
Simon David Sarah John Mary Anton Bruno Celia Edgar""")

REAL_CITIES = words("""Amsterdam Athens Auckland Bangkok Barcelona Beijing Berlin Bogota Boston Brussels
Budapest Cairo Chicago Copenhagen Dallas Delhi Denver Dublin Edinburgh Florence Geneva Hamburg Hanoi
Havana Helsinki Houston Istanbul Jakarta Kyiv Kyoto Lagos Lima Lisbon London Lyon Madrid Manila
Melbourne Miami Milan Montreal Moscow Mumbai Munich Nairobi Naples Oslo Osaka Paris Perth Porto Prague
Riga Rome Rotterdam Santiago Seattle Seoul Shanghai Singapore Sofia Stockholm Sydney Taipei Tallinn
Tehran Tokyo Toronto Vienna Vilnius Warsaw Zagreb Zurich""")

NOUNS = words("""account album alarm apple archive article asset badge bank banner basket battery
bicycle bike board boat book booking bottle box branch bridge budget building button cabin cable
calendar camera campaign candle car card cart case channel chapter chart city client clock cloud coin
comment company contact container contract country coupon course customer dashboard database delivery
desk device diary discount doctor document dog domain door draft drone engine event exam factory farm
feature file filter flag flight folder forest form garage garden gate gift glass goal grant graph group
guest guide hotel house image index invoice island issue item job journal key kitchen label ladder lamp
lane laptop lecture ledger lesson letter library license light list loan lock log machine map market
meeting member menu message meter mirror model module mountain movie museum network note notebook offer
office order outlet package page painting parcel park parser partner patient payment pen permit phone
photo plan planet plant player playlist plugin policy pool post printer profile project prompt proposal
puzzle query queue quiz radio ranking receipt recipe record region rental repair report request resource
review ribbon river robot role room route rule sample schedule school score script season sensor server
session sheet shelf ship shop signal skill song species stage station stock store story street student
survey switch table tag task teacher team template tenant theme thread ticket tile timer token tool
tower toy track trade train transfer tree trip truck tunnel user vehicle vendor video village visit
voucher wallet warehouse watch window worker workspace zone""")

VERBS = words("""add adjust allocate analyze apply approve archive arrange assign attach audit block
book build buy calculate cancel capture change check clean clear clone close collect compare compute
configure confirm connect convert copy count create deactivate delete deliver deploy describe detect
disable dispatch download draw edit enable estimate evaluate export extract fetch filter find fix format
generate get grade group hide import inspect install invite launch list load locate lock log look make
mark measure merge monitor move notify open order organize pause pick place plan play post prepare print
process publish pull push query queue rank rate read rebuild record refresh register release remove
rename render repair replace report request reserve reset resize resolve restart restore resume retrieve
review rotate run save scan schedule score search select sell send set share show sign sort start stop
store submit summarize sync tag test track train transfer translate trim unlock update upload validate
verify view watch write""")

PARAMETERS = words("""age agent alias amount angle area author batch bid body brand brightness capacity
category channel city code color comment cost count currency customer date day deadline depth
description destination direction discount distance duration email end fee floor format frequency gender
genre height hour id intensity keyword kind label language length level limit location margin material
message minutes mode month name note number offset origin owner pages password path percent person phone
place position power premium price priority quality quantity query radius range rate rating reason
recipient region repeat room rows score seats sender shape size source speed start state status step
street style subject tag target temperature text theme threshold timeout title topic total type unit
units url user value version volume weight width year zone""")

QUALIFIERS = words("""new old max min main start end first last user item target source total default
final base local home team order unit extra desired""")

COLORS = words(
    "red blue green yellow orange purple black white brown pink silver golden grey turquoise violet"
)
ADJECTIVES = words("""big small old new quiet loud bright dark warm cold heavy light long short round
flat soft hard empty full clean dusty wooden narrow wide gentle busy calm fresh simple""")
OBJECTS = words("""apples books pens coins marbles stamps cards eggs cookies oranges tickets balls
flowers shells stickers pencils candles bottles keys boxes chairs cups plates bricks""")
TOPIC_WORDS = words("""shoes guitar laptop bread chess garden sailing robots volcano history python
cooking tea travel music painting yoga football camera physics novels maps bees weather castles trains
piano soup desert island""")


def is_held_out(text: str) -> bool:
    """Whether a name belongs to the evaluation alone (one in ten)."""
    return zlib.crc32(text.lower().encode()) % 10 == 0


class Pools:
    """Draws words and names from one side of the split with one random generator."""

    def __init__(self, rng: random.Random, held_out: bool = False) -> None:
        self.rng = rng
        self.held_out = held_out

    def any(self, words: Sequence[str]) -> str:
        return self.rng.choice(words)

    def invented(self, syllables: int | None = None) -> str:
        """An invented lower-case word from this side of the split."""
        rng = self.rng
        while True:
            count = syllables or rng.choice((1, 2, 2, 2, 3))
            word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count)) + rng.choice(CODAS)
            if len(word) > 3 and is_held_out(word) == self.held_out:
                return word

    def name(self) -> str:
        """A person's first name, real or invented; the evaluation has invented ones only."""
        known = not self.held_out and self.rng.random() < 0.5
        return self.any(FIRST_NAMES) if known else self.invented().capitalize()

    def full_name(self) -> str:
        return f"{self.name()} {self.invented(2).capitalize()}"

    def city(self) -> str:
        """A city, real or invented, at times of two words; the evaluation has invented ones only."""
        roll = self.rng.random()
        if roll < 0.45 and not self.held_out:
            return self.any(REAL_CITIES)
        if roll < 0.9:
            return self.invented().capitalize()
        return f"{self.any(('New', 'Port', 'San', 'Old', 'Fort'))} {self.invented().capitalize()}"

    def digits(self, low: int, high: int) -> str:
        """A run of `low` to `high` decimal digits that does not start with 0."""
        length = self.rng.randint(low, high)
        return str(self.rng.randint(10 ** (length - 1), 10**length - 1))

    def code(self) -> str:
        """A code such as `KX-4821`, `blorf77`, `a9f3c2` or `tmp_4_zen`; never digits alone."""
        code = self._any_code()
        return self.code() if code.isdigit() else code

    def _any_code(self) -> str:
        rng = self.rng
        letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
        roll = rng.randrange(5)
        if roll == 0:
            return f"{''.join(rng.choices(letters, k=rng.randint(1, 3)))}-{self.digits(2, 5)}"
        if roll == 1:
            return f"{self.invented()}{self.digits(1, 3)}"
        if roll == 2:
            return "".join(rng.choices("abcdef0123456789", k=rng.randint(5, 8)))
        if roll == 3:
            return f"{self.invented()}_{self.digits(1, 2)}_{self.invented()}"
        return "".join(rng.choices(letters + "0123456789", k=rng.randint(4, 7)))

    def phrase(self) -> str:
        """A short lower-case phrase, such as one searches for."""
        words = [self.any(ADJECTIVES + COLORS), self.any(TOPIC_WORDS + NOUNS)]
        if self.rng.random() < 0.4:
            words.append(
                self.rng.choice(
                    ("for " + self.any(NOUNS) + "s", "in " + self.city(), "with " + self.invented())
                )
            )
        return " ".join(words[self.rng.random() < 0.3 :])

    def sentence(self) -> str:
        """A message somebody might send."""
        rng = self.rng
        return rng.choice(
            (
                f"I will be {rng.randint(5, 50)} minutes late",
                f"See you in {self.city()} on {self.weekday()}",
                f"The {self.any(NOUNS)} is ready",
                f"Please call {self.name()} about the {self.any(NOUNS)}",
                f"Happy birthday, {self.name()}!",
                f"Bring the {self.any(COLORS)} {self.any(NOUNS)}",
                f"{self.name()} needs {rng.randint(2, 90)} {self.any(OBJECTS)}",
                f"Meeting moved to {self.clock()}",
            )
        )

    def weekday(self) -> str:
        return self.any(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))

    def clock(self) -> str:
        return f"{self.rng.randint(0, 23):02d}:{self.rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"

    def date(self) -> str:
        return f"{self.rng.randint(2020, 2031)}-{self.rng.randint(1, 12):02d}-{self.rng.randint(1, 28):02d}"

    def email(self) -> str:
        return f"{self.invented()}@{self.invented()}.{self.any(('com', 'org', 'net', 'io'))}"
