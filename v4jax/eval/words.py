"""Words that tasks are made of."""


def _words(text):
    return tuple(text.split())


ADJECTIVES = _words(
    """amber ancient autumn bitter bold brave bright brisk broken calm careful clever clumsy coastal
copper crimson curious damp daring distant dusty eager early elegant faded fearless foggy fragile
frozen gentle gilded golden grateful hidden hollow humble icy ivory jolly keen lively lonely lucky
marble mellow misty modest narrow nimble noble northern olive patient placid polished proud purple
quaint quiet rapid rugged rustic sandy scarlet serene shallow silent silver sleepy slender solemn
sparkling stormy sturdy subtle sunny swift tender thirsty timid tranquil upright velvet violet vivid
wandering weary wicked wild windy winter wise wooden young zealous"""
)
NOUNS = _words(
    """acorn anchor anvil apron arrow badger balcony barrel basket beacon bell blanket bottle bridge
bucket button cabin candle canyon carpet castle chapel cherry chimney cider clock cobbler compass
cottage cradle curtain dagger desert dolphin drum eagle elbow engine falcon feather fiddle flute
forest fountain garden glacier goblet grove hammer harbour harvest helmet hermit hill island jacket
jewel kettle kitten ladder lantern lemon library lighthouse lizard mantle market meadow mirror
monastery monkey mountain needle oak orchard otter oyster paddle palace parrot pebble pepper pilgrim
pillow planet pocket pottery prairie quarry quilt rabbit ribbon river saddle sailor satchel scarf
shepherd shovel sparrow spindle stable statue teapot temple thimble thunder tower trumpet tunnel
turtle umbrella valley village violin walnut weaver whistle widow willow window wizard"""
)
VERBS = _words(
    """admired borrowed carried collected counted covered described examined followed forgot found
gathered guarded inherited kept lent lifted mended missed moved noticed offered painted polished
praised prepared remembered repaired returned sketched sold studied traded visited watched
weighed"""
)
PLACES = _words(
    """Aldmoor Brackwell Carrowby Dunmere Eastholt Fenwick Garnock Hallowdale Inverlee Jarrowby
Kestrel Langmoor Merrowick Northolm Oakhurst Penrallt Quillham Rothmere Saltby Thornwick Ulverley
Vennmoor Westering Yarrowby Zennor"""
)
PEOPLE = _words(
    """Ada Anselm Beatrix Bruno Cecily Conrad Delia Edgar Elspeth Felix Flora Gideon Greta Hester
Hugo Imogen Ivo Jasper Judith Kaspar Leonie Lorcan Mabel Magnus Nadia Nestor Octavia Orson Petra
Quentin Rosalind Rufus Sabine Silas Tamsin Tobias Una Viola Walter Winifred Xenia Yorick
Zelda"""
)
TIMES = (
    *("In the morning", "Late that evening", "Before the rain", "After the fair", "One winter"),
    *("In those days", "During the festival", "At noon", "By candlelight", "Some years later"),
    *("On the third day", "As the fog lifted", "Without a word", "To everyone's surprise"),
)
# Words of one token each, in nano's tokenizer; it was trained to remember one by another.
CODE_WORDS = _words(
    """address argument array body bound buffer bytes cache call check class client code command
count data date default depth digest error event file filename flag format frame function group
handler header host import index input instance item key length level limit line list lock locale
match message method mode module name number object offset option order output package parent parser
path pattern port position process prefix queue range reader record request response result root
rule scope section server session signal size socket source stack start state string suffix symbol
table target task test text thread time token type url value version width window word
writer"""
)
