"""Says what a scene shows, in several ways that all name every object, size, relation and the background."""

from hdm_lightning.data.builders.shapes_scenes import Scene
from hdm_lightning.data.builders.shapes_vocabulary import OPPOSITE, Combination

_LONG_FORM = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def captions(scene: Scene) -> list[str]:
    """Return the captions of a scene, the plainest first.

    Example: "a large red circle left of a small blue star on a yellow background".
    """
    names = [noun_phrase(o.combination) for o in scene.objects]
    ground = f"{_article(scene.background)} {scene.background} background"
    if len(names) == 1:
        return _of_one(scene.objects[0].combination, scene.background, ground)
    relations = [relation for _, relation, _ in scene.relations]
    return _of_two(names, relations[0], ground) if len(names) == 2 else _of_three(names, relations, ground)


def noun_phrase(combination: Combination) -> str:
    """Return "a large red circle"."""
    return f"a {combination.size} {combination.colour} {combination.shape}"


def _of_one(what: Combination, background: str, ground: str) -> list[str]:
    return [
        f"{noun_phrase(what)} on {ground}",
        f"{ground} with {noun_phrase(what)}",
        f"one {what.colour} {what.shape} on {background}, {what.size}",
        f"{_article(what.colour)} {what.colour} {what.shape} that is {what.size}, on {ground}",
    ]


def _of_two(names: list[str], relation: str, ground: str) -> list[str]:
    first, second = names
    return [
        f"{first} {relation} {second} on {ground}",
        f"{second} {OPPOSITE[relation]} {first} on {ground}",
        f"{first} {_LONG_FORM[relation]} {second}, on {ground}",
        f"on {ground}, {first} {relation} {second}",
        f"{ground} with two objects: {first} {_LONG_FORM[relation]} {second}",
    ]


def _of_three(names: list[str], relations: list[str], ground: str) -> list[str]:
    first, second, third = names
    sideways, upright = relations
    return [
        f"{first} {sideways} {second} and {upright} {third} on {ground}",
        f"{first} {upright} {third} and {_LONG_FORM[sideways]} {second}, on {ground}",
        f"on {ground}, {second} {OPPOSITE[sideways]} {first}, and {third} {OPPOSITE[upright]} {first}",
        f"{ground} with three objects: {first} {sideways} {second} and {upright} {third}",
    ]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
