"""The words that samples are made of: closed lists, and names that are put together from syllables.

The order of every list is part of what a seed means: it must never change, and nothing may be added.
"""

import numpy as np


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


LISTS: dict[str, tuple[str, ...]] = {
    "city": _split(
        """Oslo Lima Cairo Tokyo Paris Rome Madrid Vienna Dublin Athens Lisbon Berlin Moscow Delhi Seoul Havana Nairobi
        Toronto Boston Chicago Sydney London Prague Warsaw Geneva Milan Naples Munich Hamburg Kyoto Bergen Quito"""
    ),
    "country": _split(
        """Norway Peru Egypt Japan France Italy Spain Austria Ireland Greece Portugal Germany Russia India Korea Cuba
        Kenya Canada Brazil Chile Mexico Sweden Finland Denmark Poland Hungary Turkey Morocco Iceland Nepal Vietnam
        Ghana"""
    ),
    "profession": _split(
        """baker potter farmer teacher doctor lawyer painter tailor carpenter plumber miner nurse pilot sailor soldier
        chemist surgeon dentist barber butcher weaver printer jeweller judge cook gardener librarian mason banker
        singer dancer clerk"""
    ),
    "colour": _split(
        """red blue green yellow black white brown grey pink purple crimson scarlet turquoise violet silver gold beige
        maroon navy teal magenta cyan lavender bronze copper coral lilac mauve tan rust sand peach"""
    ),
    "instrument": _split(
        """violin cello flute piano guitar trumpet drum harp banjo clarinet bassoon saxophone trombone tuba viola lute
        mandolin bagpipe harpsichord recorder cornet piccolo zither sitar tambourine xylophone marimba fiddle bugle
        triangle lyre harmonica"""
    ),
    "pet": _split(
        """cat dog rabbit hamster parrot canary goldfish tortoise ferret lizard snake frog mouse rat gecko pony donkey
        goat sheep pigeon duck goose falcon raven hedgehog fox badger beaver camel peacock spider turtle"""
    ),
    "material": _split(
        """linen wool glass clay paper brass marble cotton leather granite bamboo velvet cork slate rubber silk tin wax
        steel lead pewter plaster felt tweed"""
    ),
    "number": _split(
        """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen twenty thirty forty
        fifty sixty seventy eighty ninety"""
    ),
    "year": tuple(str(year) for year in range(1850, 1950)),
}
"""Closed lists by name. What a template may put after "a" begins with a consonant."""

GIVEN_NAMES = tuple(
    start + end
    for start in _split("An Be Ca Da El Fa Ga Ha Is Jo Ka Le Mi Na Or Pe Ra Sa Ta Ul Va Wi Ya Zo")
    for end in _split("bar cor dan del fin gan lia lo mar mir na nor ra ren ric sa ta tis va von")
)

SURNAMES = tuple(
    start + end
    for start in _split(
        """Bal Bor Cal Dor Fen Gar Hal Hol Jar Kel Kor Lan Lor Mal Mor Nal Nor Pel Pol Quin Ral Ros Sal Sor Tal Tol Val
        Vor Wel Zar"""
    )
    for end in _split(
        """ben bury by dale dan den der dine fast field ford gan hart holm kin lock low man mere more ney rick son
        stead ton vane ven win wick worth"""
    )
)

NUM_NAMES = len(GIVEN_NAMES) * len(SURNAMES)

THINGS = tuple(
    f"{name} {kind}"
    for name in SURNAMES
    for kind in _split(
        """lamp clock bridge mill tower garden engine ladder mirror compass kettle lantern organ press pump wheel bell
        chest cabinet loom anchor harp gate well oven scale lens crane drum sledge wagon barrel basin bench carpet
        curtain dome fountain furnace hammer"""
    )
)
"""Invented things, such as "Tolven lamp"."""

WORDS = _split(
    """able acid age air animal apple arch arm army art autumn back bag ball band base basket bath beach bean bear bed
    bell belt bird blade block blood board boat body bone book boot bottle bottom box boy branch bread breath brick
    bridge brother brush bucket building bulb butter button cake camera card care cart case cause chain chair chalk
    chance cheese chief child church circle clean clear cloth cloud coal coast coat coffee cold cook common copy cord
    corner cotton country course cover cow credit cream crime cross cup current curve danger dark daughter day death
    deep desk detail door doubt dream dress drink drive dry dust ear early earth east edge egg end event eye face fact
    fall family farm father fear field fight figure finger fire fish flag flame flat floor flower fold food foot force
    fork form frame friend front fruit full game gate gift girl glass glove goat grain grass ground group guide hair
    hall hammer hand harvest hat head heart heat heavy hill history hole home hook horse hospital hour house ice idea
    inch iron island join journey key knee knife lake land language law leaf left letter level light limit line lion
    liquid list long loss love low lunch machine map mark market match meal meat metal middle milk mind mine minute
    month moon morning mother motion mountain mouth music nail narrow nation neck needle nerve net new night noise
    north nose note number office oil open orange order page pain paint paper park part paste path peace pen pencil
    picture pig pin place plane plant plate play pocket point pool porch pot power price print queen quick quiet rail
    rain range ray reason record red rest rice river road rock roll roof room root rope rose round rule sail salt sand
    school sea seat seed shade shadow shape sharp shelf ship shirt shoe shop short silver sister size skin sky sleep
    slow smoke snow soap song sound south space spoon spring square stage star station steam steel stem step stone
    store storm street string sugar summer sun table tail taste test thread thumb ticket time tooth top town train tree
    truth valley view village voice wall watch water wave wheel wind window wine wing winter wire wood wool word work
    world year"""
)
"""Common short words, for samples that say nothing: most tokenizers have a token for most of them."""


def names(num: int, rng: np.random.Generator) -> list[str]:
    """Distinct names of persons, such as "Mira Tolven", in random order; fewer are the first of more."""
    chosen = rng.permutation(NUM_NAMES)[:num].tolist()
    return [f"{GIVEN_NAMES[k // len(SURNAMES)]} {SURNAMES[k % len(SURNAMES)]}" for k in chosen]


def word_of_each_list(rng: np.random.Generator) -> dict[str, str]:
    """One random word of each closed list, by the list's name: what the gaps of a template are filled with."""
    uniform = rng.random(len(LISTS)).tolist()
    return {name: words[int(u * len(words))] for (name, words), u in zip(LISTS.items(), uniform, strict=True)}
