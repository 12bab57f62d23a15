"""The words and numbers that synthetic conversations are about, and which of them are held out."""

import functools
import hashlib

import numpy as np

HELD_OUT = 0.15  # of the values, kept for evaluation

# Words of code, one token each for nano, and names, places and things, mostly of several.
_WORDS = """
action add alias apple arg array ascii atlas back bank base beach bell bench bird bit blue boat
bob book bottle box branch bread bridge brush bucket buf buffer bug button byte cache cake call
camera candle card carla carpet castle cat cell chair chalk char check child circle class clock
close cloud code coder color column con cond config copy corn cotton count cow cur cup current
daisy data date day debug default desk dict diamond diego dir doc dog door down dream drum dust
eagle ear earth east elena else emma end engine enum error eva event exit ext falcon farm fast
fence field file find finn fish fix flag flower fog forest fork form format fox frame frank from
fruit full func future garden gate ghost gist glass gold grape grass green greta hand handle
handler hans harbor hat hay head header heart hello hen hill hint home honey horse host hugo ice
inda index info ink inner input int iris iron island item iter ivory ivan jack jade jar jazz jen
join julia jungle karl ken key kite knife lab label ladder lake lamp lara last lean leaf left
lemon len letter level lib light like lily limit line link lion list load local lock log long
loop lost low lucy lunch mail main maple map march maria mark mask mat match max meadow melon
memo meta metal mia milk mint mirror mod mode module moon moss mouse mountain music name needle
nest net new next nina node north note nova null num oak oasis object ocean off offset oil olga
olive onion open opal option orange order oscar oslo out own owl oxford pack paint palm panda
paper param paris part pass patch path paul peach pear pearl pen pencil pepper petra piano pilot
pink pipe pixel plane planet plum pol pond pony pool pop port pos pot prague prefix print proc
prop proto purple queen quiz rabbit radio rain range raw ray react read red ref reg repr request
res rest ribbon rice ring river road robin rock rome root rose round row ruby run salt sam sand
sara scan school sea seed self send serve set shell ship shoe side sign silk silver size sky
snow sock socket sofa son sonja space spark spec spider split spoon spring square stack star
start stat state stone storm str stream string sub sugar suite sum sun swan sys table tag tail
tar task tea tempo ten tent test text thread tiger time timer tina token tom tool tower toy
train tree try tulip tuple turn type update url user uta val value van vase vector venus vera
version view viola wall water wave west whale wheat willow win wind window wine winter with wolf
wood word work wrap yard year zebra zero zinc zip zoe zone
"""
WORDS = tuple(_WORDS.split())
# Of words that nobody knows: a model that has only a few hundred to copy learns them by heart.
INVENTED = 0.5  # of training's words
_ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sc sh sk sl sm"
_ONSETS = (*_ONSETS.split(), "sn", "sp", "st", "str", "t", "th", "tr", "v", "w", "x", "y", "z", "")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou", "y")
_CODAS = ("", "", "", "b", "ck", "d", "ft", "g", "k", "l", "ld", "m", "n", "nd", "ng", "nt", "p")
_CODAS = (*_CODAS, "r", "rk", "rt", "s", "sh", "sk", "st", "t", "x")


@functools.cache
def is_held_out(value: str) -> bool:
    """Whether a value is kept for evaluation; by a hash of its spelling, so that it stays so."""
    digest = hashlib.sha256(value.encode()).digest()
    return int.from_bytes(digest[:4]) < HELD_OUT * 2**32


class Lexicon:
    """Draws values of one side: of training, or of what is held out. None is drawn twice.

    A held-out word is never a training value. It may be a part of one: a token that is said nowhere
    in training is not said later either. A held-out compound is another combination of parts.

    Args:
      more: further words for training.
    """

    def __init__(self, rng: np.random.Generator, held_out: bool, more: tuple[str, ...] = ()):
        self._rng, self._held_out = rng, held_out
        words = WORDS if held_out else (*WORDS, *more)
        self._words = [word for word in words if is_held_out(word) == held_out]
        self._parts = list(words)
        self._drawn: set[str] = set()

    def word(self) -> str:
        """A single word; for training every other one is invented."""
        return self._new(lambda: self._one_of(self._words), anything=True)

    def value(self) -> str:
        """A word, two words, a word with a number, or a number, as text."""
        kind = self._rng.random()
        if kind < 0.6:
            return self.word()
        if kind < 0.8:
            parts = self._parts
            return self._new(lambda: f"{self._one_of(parts)}_{self._one_of(parts)}")
        if kind < 0.92:
            return self._new(lambda: f"{self._one_of(self._parts)}{self._rng.integers(100)}")
        return self._new(lambda: str(self._rng.integers(10, 10000)))

    def number(self) -> int:
        """A number below 1,000; small ones more often."""
        return int(self._new(lambda: str(self._rng.integers(self._pick((20, 100, 1000)))), True))

    def _one_of(self, words):
        if self._held_out or self._rng.random() >= INVENTED:
            return self._pick(words)
        syllables = int(self._rng.integers(1, 3))
        word = "".join(map(self._pick, (_ONSETS, _VOWELS, _CODAS) * syllables))
        return self._one_of(words) if is_held_out(word) else word

    def _pick(self, options):
        return options[int(self._rng.integers(len(options)))]

    def _new(self, make, anything=False):
        """A value of the right side; of few values one may come again (`anything`)."""
        for attempt in range(1000):
            value = make()
            again = value in self._drawn and not (anything and attempt > 20)
            if is_held_out(value) == self._held_out and not again:
                self._drawn.add(value)
                return value
        raise RuntimeError("a lexicon ran out of values")
