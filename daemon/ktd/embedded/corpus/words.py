"""Words to count and sort in: common ones, and made-up ones without end.

The words of the two splits are disjoint: a word belongs to the split that the hash of its lower-case form
says.
"""

from __future__ import annotations

from random import Random

from ktd.embedded.corpus.exchange import ALWAYS_TAUGHT, Split, is_held_out

COMMON = tuple(
    """
    apple pear plum cherry peach grape lemon lime orange banana mango melon kiwi fig date olive berry
    strawberry blueberry raspberry blackberry cranberry coconut pineapple apricot tomato potato carrot
    onion garlic pepper cabbage lettuce spinach celery broccoli pumpkin cucumber mushroom bean pea corn
    rice wheat barley bread butter cheese milk cream yogurt honey sugar salt coffee tea juice water wine
    beer soup salad pasta pizza burger noodle cake cookie candy chocolate vanilla cinnamon ginger cat
    dog horse cow sheep goat pig chicken duck goose turkey rabbit mouse rat hamster squirrel fox wolf
    bear lion tiger leopard cheetah elephant giraffe zebra camel monkey gorilla kangaroo koala panda
    otter beaver whale dolphin shark salmon trout tuna octopus crab lobster turtle snake lizard
    crocodile alligator frog toad eagle hawk owl parrot penguin pigeon sparrow robin swan peacock
    butterfly spider ant bee beetle mosquito dragon unicorn tree flower grass leaf root branch forest
    jungle desert mountain valley river lake ocean island beach cliff cave volcano glacier meadow garden
    field farm village town city country street bridge tower castle palace temple church school library
    museum theatre hospital station airport harbor market office factory kitchen bedroom bathroom window
    door roof wall floor ceiling stairs table chair sofa bed lamp mirror clock carpet curtain blanket
    pillow towel bottle glass plate bowl spoon fork knife cup kettle oven fridge book paper pencil pen
    ruler eraser notebook letter envelope stamp map globe picture camera phone computer keyboard screen
    printer radio television music guitar piano violin trumpet drum flute song dance paint brush color
    red blue green yellow purple brown black white silver golden pink gray crimson shirt skirt dress
    jacket coat sweater trousers shoe boot sock glove scarf hat cap belt pocket button zipper needle
    thread cotton wool silk leather car bus train truck bicycle motorcycle boat ship plane helicopter
    rocket engine wheel tire brake road highway tunnel ticket passport suitcase hotel camp tent holiday
    summer winter spring autumn morning evening night midnight noon today tomorrow yesterday week month
    year century second minute hour weather rain snow wind storm thunder lightning cloud sun moon star
    planet earth sky rainbow fog frost ice fire smoke ash stone rock sand mud clay metal iron steel
    copper gold bronze diamond ruby emerald crystal pearl mother father brother sister uncle aunt cousin
    nephew niece grandmother grandfather daughter son baby child friend neighbor teacher student doctor
    nurse lawyer farmer baker butcher carpenter plumber painter singer actor writer poet artist engineer
    scientist pilot sailor soldier police king queen prince princess knight wizard giant hero head face
    eye ear nose mouth tooth tongue neck shoulder arm elbow hand finger thumb chest stomach back leg
    knee foot ankle heart brain blood bone muscle skin hair big small large tiny huge long short tall
    wide narrow thick thin heavy light fast slow quick quiet loud hot cold warm cool wet dry clean dirty
    new old young fresh sweet sour bitter soft hard smooth rough sharp dull bright dark empty full open
    closed rich poor happy sad angry calm brave shy proud gentle kind honest clever wise foolish funny
    serious lazy busy tired hungry thirsty sick healthy strong weak simple difficult easy cheap
    expensive beautiful ugly pretty wonderful terrible strange famous popular modern ancient real false
    true right wrong left north south east west run walk jump swim fly climb ride drive sit stand sleep
    wake eat drink cook bake wash clean build break cut push pull throw catch kick hold carry bring send
    give take buy sell pay find lose keep hide show tell speak talk listen hear look watch read write
    draw count learn teach think know remember forget understand believe hope wish want need love hate
    like enjoy laugh smile cry shout whisper begin finish start stop wait hurry follow lead travel visit
    return arrive leave enter answer question number word sentence story language grammar alphabet vowel
    mississippi tennessee banana committee success balloon coffee bookkeeper assessment possess address
    letter parallel embarrass accommodate millennium necessary occurrence beginning programming
    reasoning intelligence transformer attention tensor matrix vector kernel memory expert router model
    token engine server network hippopotamus rhinoceros encyclopedia university opportunity
    responsibility international communication
    """.split()  # noqa: SIM905
)

_ONSETS = """
    b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr kn ph pl pr qu sc sh sk sl sm sn
    sp st str sw th tr tw wh wr
    """.split()  # noqa: SIM905
_VOWELS = """
    a a a e e e i i o o u u ai au ea ee ei ie oa oo ou y
    """.split()  # noqa: SIM905
_CODAS = """
    b ck d f ff g l ll m mp n nd ng nk nt p r rd rk rm rn rt s sk ss st sh t tch th tt x z
    """.split()  # noqa: SIM905
_ENDINGS = """
    er ing ed ly ness ful less ment tion able est y ies al ous ity ism ist
    """.split()  # noqa: SIM905


# Words of the templates, and common words with tokens that occur nowhere but there: what the model reads
# in every other question yet never spells would be a trap, so these are always taught (a test collects them).
SAID = frozenset(
    """
    abilities can citations color contain contents cook created don explain factorize find function
    garden goodbye greeting hour howdy know little love meaning mondays none october old one plus
    quotient root several shoulder smart station sub sum ten the there thirsty times understood week
    with
    """.split()  # noqa: SIM905
)


def draw_word(rng: Random, split: Split) -> str:
    """A lower-case word of the split: a common one, a made-up one, or now and then a jumble of letters."""
    while True:
        roll = rng.random()
        if roll < 0.45:
            word = rng.choice(COMMON)
        elif roll < 0.92:
            word = invent(rng)
        else:
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 10)))
        if is_held_out(word_key(word)) is (split is Split.HELD_OUT):
            return word


def invent(rng: Random) -> str:
    """A pronounceable word of 3 to 14 letters that probably means nothing."""
    while True:
        word = ""
        for _ in range(rng.choices((1, 2, 3), (25, 50, 25))[0]):
            word += rng.choice(_ONSETS) if rng.random() < 0.9 else ""
            word += rng.choice(_VOWELS)
            word += rng.choice(_CODAS) if rng.random() < 0.55 else ""
        if rng.random() < 0.25:
            word += rng.choice(_ENDINGS)
        if 3 <= len(word) <= 14:
            return word


def word_key(word: str) -> str:
    """The canonical key of a word, whatever its case."""
    kind = ALWAYS_TAUGHT if word.lower() in SAID else "word:"
    return kind + word.lower()
