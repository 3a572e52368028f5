"""Tables of plain public-domain facts, each with the ways to ask for it and the sentence that answers.

Owns the knowledge of Pocket. Every fact is trained; what the evaluation holds out is the wording of the
question.
"""

import random
from dataclasses import dataclass

from training.pocket.data.pools import words

CAPITALS_TEXT = """Afghanistan=Kabul;Albania=Tirana;Algeria=Algiers;Angola=Luanda;Argentina=Buenos Aires;
Armenia=Yerevan;
Australia=Canberra;Austria=Vienna;Azerbaijan=Baku;Bahrain=Manama;Bangladesh=Dhaka;Belarus=Minsk;
Belgium=Brussels;
Bhutan=Thimphu;Bolivia=Sucre;Botswana=Gaborone;Brazil=Brasilia;Bulgaria=Sofia;Cambodia=Phnom Penh;
Cameroon=Yaounde;
Canada=Ottawa;Chad=N'Djamena;Chile=Santiago;China=Beijing;Colombia=Bogota;Costa Rica=San Jose;
Croatia=Zagreb;Cuba=Havana;
Cyprus=Nicosia;Denmark=Copenhagen;Ecuador=Quito;Egypt=Cairo;El Salvador=San Salvador;Eritrea=Asmara;
Estonia=Tallinn;
Ethiopia=Addis Ababa;Fiji=Suva;Finland=Helsinki;France=Paris;Gabon=Libreville;Georgia=Tbilisi;
Germany=Berlin;Ghana=Accra;
Greece=Athens;Guatemala=Guatemala City;Guinea=Conakry;Guyana=Georgetown;Haiti=Port-au-Prince;
Honduras=Tegucigalpa;
Hungary=Budapest;Iceland=Reykjavik;India=New Delhi;Indonesia=Jakarta;Iran=Tehran;Iraq=Baghdad;Ireland=Dublin;
Israel=Jerusalem;Italy=Rome;Jamaica=Kingston;Japan=Tokyo;Jordan=Amman;Kazakhstan=Astana;Kenya=Nairobi;
Kuwait=Kuwait City;
Laos=Vientiane;Latvia=Riga;Lebanon=Beirut;Liberia=Monrovia;Libya=Tripoli;Lithuania=Vilnius;
Luxembourg=Luxembourg;
Madagascar=Antananarivo;Malawi=Lilongwe;Malaysia=Kuala Lumpur;Mali=Bamako;Malta=Valletta;Mexico=Mexico City;
Moldova=Chisinau;Monaco=Monaco;Mongolia=Ulaanbaatar;Montenegro=Podgorica;Morocco=Rabat;Mozambique=Maputo;
Namibia=Windhoek;
Nepal=Kathmandu;the Netherlands=Amsterdam;New Zealand=Wellington;Nicaragua=Managua;Niger=Niamey;Nigeria=Abuja;
North Korea=Pyongyang;Norway=Oslo;Oman=Muscat;Pakistan=Islamabad;Panama=Panama City;Paraguay=Asuncion;
Peru=Lima;
the Philippines=Manila;Poland=Warsaw;Portugal=Lisbon;Qatar=Doha;Romania=Bucharest;Russia=Moscow;Rwanda=Kigali;
Saudi Arabia=Riyadh;Senegal=Dakar;Serbia=Belgrade;Sierra Leone=Freetown;Singapore=Singapore;
Slovakia=Bratislava;
Slovenia=Ljubljana;Somalia=Mogadishu;South Africa=Pretoria;South Korea=Seoul;Spain=Madrid;
Sri Lanka=Colombo;Sudan=Khartoum;
Sweden=Stockholm;Switzerland=Bern;Syria=Damascus;Taiwan=Taipei;Tajikistan=Dushanbe;Tanzania=Dodoma;
Thailand=Bangkok;
Togo=Lome;Tunisia=Tunis;Turkey=Ankara;Turkmenistan=Ashgabat;Uganda=Kampala;Ukraine=Kyiv;
the United Arab Emirates=Abu Dhabi;the United Kingdom=London;the United States=Washington;Uruguay=Montevideo;
Uzbekistan=Tashkent;Venezuela=Caracas;Vietnam=Hanoi;Yemen=Sanaa;Zambia=Lusaka;Zimbabwe=Harare"""

ELEMENTS = words("""hydrogen H helium He lithium Li beryllium Be boron B carbon C nitrogen N oxygen O
fluorine F neon Ne sodium Na magnesium Mg aluminium Al silicon Si phosphorus P sulfur S chlorine Cl
argon Ar potassium K calcium Ca scandium Sc titanium Ti vanadium V chromium Cr manganese Mn iron Fe
cobalt Co nickel Ni copper Cu zinc Zn gallium Ga germanium Ge arsenic As selenium Se bromine Br krypton
Kr rubidium Rb strontium Sr yttrium Y zirconium Zr niobium Nb molybdenum Mo technetium Tc ruthenium Ru
rhodium Rh palladium Pd silver Ag cadmium Cd indium In tin Sn antimony Sb tellurium Te iodine I xenon Xe
caesium Cs barium Ba""")

OPPOSITES = """hot cold|big small|up down|left right|open closed|day night|fast slow|hard soft|happy sad
|light dark
|full empty|early late|high low|old new|rich poor|strong weak|true false|wet dry|young old|clean dirty
|near far
|thick thin|wide narrow|loud quiet|first last|buy sell|push pull|win lose|begin end|inside outside"""

SPANISH = """water agua|bread pan|house casa|dog perro|cat gato|sun sol|moon luna|book libro|red rojo
|blue azul|green verde
|milk leche|friend amigo|hand mano|day dia|night noche|city ciudad|river rio|tree arbol|fish pez"""
FRENCH = """water eau|bread pain|house maison|dog chien|cat chat|sun soleil|moon lune|book livre|red rouge
|blue bleu
|green vert|milk lait|friend ami|hand main|day jour|night nuit|city ville|tree arbre|fish poisson|king roi"""
GERMAN = """water Wasser|bread Brot|house Haus|dog Hund|cat Katze|sun Sonne|moon Mond|book Buch|red rot
|blue blau
|green gruen|milk Milch|friend Freund|hand Hand|day Tag|night Nacht|city Stadt|tree Baum|fish Fisch
|king Koenig"""

CURRENCIES = """Japan yen|the United States dollar|the United Kingdom pound|Switzerland franc|India rupee
|China yuan
|Russia ruble|Mexico peso|Sweden krona|Norway krone|Denmark krone|Poland zloty|Hungary forint|Turkey lira
|Brazil real
|South Africa rand|South Korea won|Israel shekel|Thailand baht|Ukraine hryvnia|Germany euro|France euro
|Italy euro
|Spain euro|Vietnam dong"""

YOUNG = """dog puppy|cat kitten|cow calf|sheep lamb|horse foal|pig piglet|goat kid|lion cub|hen chick
|duck duckling|deer fawn
|frog tadpole|swan cygnet|kangaroo joey"""

INVENTORS = """the telephone|Alexander Graham Bell;the light bulb|Thomas Edison;dynamite|Alfred Nobel;
the theory of relativity|Albert Einstein;the law of gravity|Isaac Newton;penicillin|Alexander Fleming;
radium|Marie Curie;the printing press|Johannes Gutenberg;the theory of evolution|Charles Darwin;
the World Wide Web|Tim Berners-Lee;the Python language|Guido van Rossum;Linux|Linus Torvalds"""
AUTHORS = """Hamlet|William Shakespeare;Romeo and Juliet|William Shakespeare;Don Quixote|Miguel de Cervantes;
War and Peace|Leo Tolstoy;Faust|Johann Wolfgang von Goethe;The Odyssey|Homer;Moby Dick|Herman Melville;
Pride and Prejudice|Jane Austen;Oliver Twist|Charles Dickens;Frankenstein|Mary Shelley;Dracula|Bram Stoker;
Treasure Island|Robert Louis Stevenson;The Divine Comedy|Dante Alighieri;Les Miserables|Victor Hugo"""

SINGLES = """How many days are in a week?|A week has 7 days.|7
How many months are in a year?|A year has 12 months.|12
How many hours are in a day?|A day has 24 hours.|24
How many minutes are in an hour?|An hour has 60 minutes.|60
How many seconds are in a minute?|A minute has 60 seconds.|60
How many days are in a year?|A year has 365 days.|365
How many legs does a spider have?|A spider has 8 legs.|8
How many legs does an insect have?|An insect has 6 legs.|6
How many sides does a triangle have?|A triangle has 3 sides.|3
How many sides does a hexagon have?|A hexagon has 6 sides.|6
How many sides does an octagon have?|An octagon has 8 sides.|8
How many sides does a square have?|A square has 4 sides.|4
How many planets are in the solar system?|The solar system has 8 planets.|8
How many continents are there?|There are 7 continents.|7
How many letters are in the English alphabet?|The English alphabet has 26 letters.|26
How many bits are in a byte?|A byte has 8 bits.|8
What is the largest planet?|The largest planet is Jupiter.|Jupiter
What is the smallest planet?|The smallest planet is Mercury.|Mercury
Which planet is closest to the sun?|Mercury is closest to the sun.|Mercury
Which planet is known as the red planet?|Mars is known as the red planet.|Mars
Which planet has the brightest rings?|Saturn has the brightest rings.|Saturn
What is the largest ocean?|The largest ocean is the Pacific.|Pacific
What is the highest mountain?|The highest mountain is Mount Everest.|Everest
What is the longest river?|The longest river is the Nile.|Nile
What is the largest desert of hot sand?|The largest desert of hot sand is the Sahara.|Sahara
What is the largest animal?|The largest animal is the blue whale.|blue whale
What is the fastest land animal?|The fastest land animal is the cheetah.|cheetah
What is the tallest animal?|The tallest animal is the giraffe.|giraffe
What is the chemical formula of water?|The chemical formula of water is H2O.|H2O
What is the chemical formula of salt?|The chemical formula of salt is NaCl.|NaCl
What is the chemical formula of carbon dioxide?|The chemical formula of carbon dioxide is CO2.|CO2
At how many degrees Celsius does water boil?|Water boils at 100 degrees Celsius.|100
At how many degrees Celsius does water freeze?|Water freezes at 0 degrees Celsius.|0
What color is the sky on a clear day?|The sky is blue on a clear day.|blue
What color is grass?|Grass is green.|green
What color do you get from mixing blue and yellow?|Blue and yellow give green.|green
What color do you get from mixing red and white?|Red and white give pink.|pink
What color do you get from mixing red and yellow?|Red and yellow give orange.|orange
What do bees make?|Bees make honey.|honey
What is the hardest natural material?|The hardest natural material is diamond.|diamond
Who painted the Mona Lisa?|Leonardo da Vinci painted the Mona Lisa.|Leonardo da Vinci
Who was the first person on the moon?|Neil Armstrong was the first person on the moon.|Neil Armstrong
Who was the first person in space?|Yuri Gagarin was the first person in space.|Yuri Gagarin
What is the square root of 81?|The square root of 81 is 9.|9
What is the square root of 144?|The square root of 144 is 12.|12
In which year did the first moon landing take place?|The first moon landing took place in 1969.|1969
What gas do plants take in?|Plants take in carbon dioxide.|carbon dioxide
What gas do we need to breathe?|We need oxygen to breathe.|oxygen
What is the largest continent?|The largest continent is Asia.|Asia
What is the smallest continent?|The smallest continent is Australia.|Australia
On which continent is Egypt?|Egypt is in Africa.|Africa
On which continent is Brazil?|Brazil is in South America.|South America
What language is spoken in Brazil?|Portuguese is spoken in Brazil.|Portuguese
What language is spoken in Austria?|German is spoken in Austria.|German
What language is spoken in Mexico?|Spanish is spoken in Mexico.|Spanish"""

LEAD_INS = (
    "",
    "",
    "",
    "",
    "",
    "Please tell me: ",
    "Quick question: ",
    "Do you know? ",
    "Hey, ",
    "Tell me, ",
    "Question: ",
)
TAILS = ("", "", "", "", "", " Thanks!", " Please answer.", " Keep it short.", " Answer in one sentence.")


@dataclass(frozen=True)
class Fact:
    """One fact: its questions, the full answer, and the word that the answer must contain."""

    questions: tuple[str, ...]
    answer: str
    key: str
    subject: str


def pairs(text: str, rows: str = "|", between: str = " ") -> list[tuple[str, str]]:
    cells = [row.strip().rsplit(between, 1) for row in text.replace("\n", "").split(rows)]
    return [(a, b) for a, b in cells]


def capital_facts() -> list[Fact]:
    facts = []
    for country, city in pairs(CAPITALS_TEXT, ";", "="):
        asks = (
            f"What is the capital of {country}?",
            f"what is the capital of {country}",
            f"What's the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Tell me the capital of {country}.",
            f"capital of {country}?",
        )
        facts.append(Fact(asks, f"The capital of {country} is {city}.", city, country))
    return facts


def element_facts() -> list[Fact]:
    facts = []
    for index in range(0, len(ELEMENTS), 2):
        name, symbol, number = ELEMENTS[index], ELEMENTS[index + 1], str(index // 2 + 1)
        by_name = (
            f"What is the chemical symbol of {name}?",
            f"What is the symbol for {name}?",
            f"Which symbol does {name} have?",
            f"chemical symbol of {name}?",
        )
        by_number = (
            f"What is the atomic number of {name}?",
            f"Which atomic number does {name} have?",
            f"Tell me the atomic number of {name}.",
        )
        facts.append(Fact(by_name, f"The chemical symbol of {name} is {symbol}.", symbol, name))
        facts.append(Fact(by_number, f"The atomic number of {name} is {number}.", number, name))
    return facts


def word_facts() -> list[Fact]:
    facts = []
    asks: tuple[str, ...]
    for word, other in pairs(OPPOSITES):
        asks = (
            f"What is the opposite of {word}?",
            f"opposite of {word}?",
            f'Give me the opposite of "{word}".',
        )
        facts.append(Fact(asks, f"The opposite of {word} is {other}.", other, word))
    for language, table in (("Spanish", SPANISH), ("French", FRENCH), ("German", GERMAN)):
        for word, other in pairs(table):
            asks = (
                f"How do you say {word} in {language}?",
                f"What is {word} in {language}?",
                f'What is the {language} word for "{word}"?',
                f"Translate {word} to {language}.",
            )
            facts.append(Fact(asks, f"The {language} word for {word} is {other}.", other, word))
    for animal, young in pairs(YOUNG):
        asks = (f"What is a young {animal} called?", f"What do you call a baby {animal}?")
        facts.append(Fact(asks, f"A young {animal} is called a {young}.", young, animal))
    return facts


def people_facts() -> list[Fact]:
    facts = []
    asks: tuple[str, ...]
    for country, money in pairs(CURRENCIES):
        asks = (f"What is the currency of {country}?", f"Which currency is used in {country}?")
        facts.append(Fact(asks, f"The currency of {country} is the {money}.", money, country))
    for thing, person in pairs(INVENTORS, ";", "|"):
        asks = (f"Who is known for {thing}?", f"Which person is known for {thing}?")
        facts.append(Fact(asks, f"{person} is known for {thing}.", person, thing))
    for work, person in pairs(AUTHORS, ";", "|"):
        asks = (f"Who wrote {work}?", f'Who is the author of "{work}"?', f"Name the author of {work}.")
        facts.append(Fact(asks, f"{person} wrote {work}.", person, work))
    return facts


def single_facts() -> list[Fact]:
    rows = (line.split("|") for line in SINGLES.splitlines())
    return [
        Fact((ask, ask.replace("?", ""), ask[0].lower() + ask[1:]), answer, key, "this")
        for ask, answer, key in rows
    ]


FACTS: list[Fact] = capital_facts() + element_facts() + word_facts() + people_facts() + single_facts()


def ask(fact: Fact, rng: random.Random) -> str:
    """A question for the fact in one of its wordings, with or without small talk around it."""
    return rng.choice(LEAD_INS) + rng.choice(fact.questions) + rng.choice(TAILS)
