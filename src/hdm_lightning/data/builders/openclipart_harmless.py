"""Keeps a choice of drawings free of the sexual, the violent and the hateful: by words, and by drawings seen."""

import re

from hdm_lightning.data.builders.openclipart_excluded import EXCLUDED
from hdm_lightning.data.builders.openclipart_records import Record

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
