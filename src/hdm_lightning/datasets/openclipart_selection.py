"""Which drawings are taken, and in which order.

A harmless choice leaves out the sexual, the violent and the hateful: by words, and by drawings excluded on sight. The
order is random, or such that every folder gets its turn; it comes from hashes of the seed and a name, so that a
drawing that is left out does not move the others.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable

from hdm_lightning.datasets.openclipart_source import Record

EXCLUDED: dict[str, str] = {
    "animals/fantasy/mermaid_kurt_cagle_.svg": "bare body",
    "people/silhouette_female_1.svg": "bare body",
    "people/silhouette_female_2.svg": "bare body",
    "people/silhouette_male_1.svg": "bare body",
    "people/smilies/portrait_of_a_woman_guid_.svg": "bare body",
    "people/stylized_yoga_person_ger_04.svg": "bare body",
    "plants/human_humain_umano_sed_r.svg": "bare body",
    "recreation/religion/eris_nurbldoff_ksc_.svg": "bare body",
    "buildings/demolizione_costruzione_01.svg": "destruction",
    "people/smilies/crossbones_linda_kim_01.svg": "skull",
    "signs_and_symbols/crossbones_linda_kim_01.svg": "skull",
    "tools/insecticide_nicu_buculei_01.svg": "skull",
    "tools/insecticide_nicu_buculei_02.svg": "skull",
    "signs_and_symbols/flags/africa/swaziland.svg": "spears",
    "signs_and_symbols/flags/asia/saudi_arabia.svg": "sword",
    "signs_and_symbols/vancouver_city_badge_wes_01.svg": "axe",
    "unsorted/media_as_wmd_saint_.svg": "bomb",
    "unsorted/psycho_icecube_phentex_01.svg": "threat",
    "people/clothing/hats/pimp_hat_james_birkett_01.svg": "demeaning name",
    "unsorted/lauburu_aitor_avila_.svg": "could be taken for a sign of hate",
    "people/xbill_01.svg": "mocks a person",
    "people/my_lovely_baby_enrique_m_01.svg": "another owner's character",
    "recreation/toys/domo_kun_nicu_buculei_01.svg": "another owner's character",
    "recreation/toys/domo_kun_nicu_buculei_02.svg": "another owner's character",
}


# Beginnings of words in titles, descriptions, keywords and paths; a dot at the end stands for the word's end.
# Wide on purpose: a harmless drawing lost is cheap. Some are Italian or French, as part of the collection is.
_SEXUAL = (
    "sex naked nude nudit breast bikini lingerie panties pantyhose collant stripper babe bra. bordel erotic porn",
    "penis vagina condom kamasutra playboy pinup fetish underwear",
)
_VIOLENT = (
    "gun gunshot pistol rifle revolver weapon sword dagger knife katana bomb bullet grenade missile cannon tank. ammo",
    "munition blood sangue kill murder dead death corpse skull bone skelet hanging gallow guillotine execut torture",
    "army soldier militar hummer war. warrior warship fighter battle ak47 uzi shotgun spear axe explos terror",
    "violen suicide attack shoot assassin devil demon satan hell. zombie grave tomb coffin cemetery crucif vampire",
    "poison toxic veleno pirate whip noose handcuff jail prison crossbow archer",
)
_HATEFUL = (
    "nazi swastik svastik hitler mussolini stalin fascis faschi reich kkk klan confedera racis supremac apartheid",
    "slave hate sunwheel communis soviet sickle lenin mao. bush. saddam guevara anarch politic propagand",
)
_UNHEALTHY = ("cigar smok tobacco drug cannabis marijuana hemp weed heroin cocaine syringe drunk",)
_WORDS = " ".join((*_SEXUAL, *_VIOLENT, *_HATEFUL, *_UNHEALTHY)).replace(".", r"(?![a-z])").split()
_PATTERN = re.compile(rf"(?<![a-z])(?:{'|'.join(_WORDS)})", re.IGNORECASE)
_FOLDERS = ("signs_and_symbols/flags/historic", "signs_and_symbols/flags/miscellany")


def refusal(record: Record) -> str | None:
    """Return why a drawing is not certainly harmless, or None."""
    if record.path in EXCLUDED:
        return f"left out on sight: {EXCLUDED[record.path]}"
    if record.path.startswith(_FOLDERS):
        return "in a folder that is left out whole"
    text = " ".join((record.title, record.description, *record.keywords, record.path)).replace("_", " ")
    found = _PATTERN.search(text)
    return f"word {found.group(0).lower()!r}" if found else None


def at_random(records: Iterable[Record], seed: int) -> list[Record]:
    """Return the records shuffled, the same way for the same seed whatever their order was."""
    return sorted(records, key=lambda record: _draw_key(seed, record.path))


def folders_in_turn(records: Iterable[Record], seed: int) -> list[Record]:
    """Return the records in rounds: in each round one of every folder that has any left, folders at random.

    A beginning of this order holds as many drawings of small folders as of large ones, as long as they last.
    """
    folders: dict[str, list[Record]] = defaultdict(list)
    for record in at_random(records, seed):
        folders[record.folder].append(record)
    turns = (
        (turn, _draw_key(seed, f"{turn} {name}"), record)
        for name, group in folders.items()
        for turn, record in enumerate(group)
    )
    return [record for _, _, record in sorted(turns, key=lambda entry: entry[:2])]


def _draw_key(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
