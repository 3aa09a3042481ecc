"""Which embedded images `builtin:few-emoji` has: simple shapes that look alike, so that little training shows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

# Kind to the emoji's Unicode names. Kinds are classes.
KINDS: dict[str, tuple[str, ...]] = {
    "faces": (
        *("grinning face", "beaming face with smiling eyes", "grinning face with big eyes", "grinning squinting face"),
        *("grinning face with smiling eyes", "winking face", "smiling face with smiling eyes", "relieved face"),
        *("smiling face with heart-eyes", "smiling face with sunglasses", "neutral face", "expressionless face"),
        *("pensive face", "confused face", "kissing face", "kissing face with smiling eyes", "face with tongue"),
        *("kissing face with closed eyes", "winking face with tongue", "squinting face with tongue", "worried face"),
        *("disappointed face", "frowning face with open mouth", "anguished face", "grimacing face", "hushed face"),
        *("face with open mouth", "slightly frowning face", "slightly smiling face", "face with rolling eyes"),
        *("frowning face", "smiling face", "persevering face", "astonished face", "flushed face"),
    ),
    "hearts": (
        *("red heart", "orange heart", "yellow heart", "green heart", "blue heart", "light blue heart", "purple heart"),
        *("black heart", "grey heart", "white heart", "brown heart", "pink heart", "growing heart", "broken heart"),
    ),
    "fruit": (
        *("tomato", "tangerine", "lemon", "red apple", "green apple", "pear", "peach", "strawberry", "cherries"),
        *("watermelon", "banana", "pineapple", "grapes", "melon", "mango", "kiwi fruit", "avocado", "olive"),
    ),
    "clocks": (
        *("one o’clock", "two o’clock", "three o’clock", "four o’clock", "five o’clock", "six o’clock"),
        *("seven o’clock", "eight o’clock", "nine o’clock", "ten o’clock", "eleven o’clock", "twelve o’clock"),
    ),
    "flags": (
        *("flag France", "flag Italy", "flag Germany", "flag Belgium", "flag Ireland", "flag Romania", "flag Austria"),
        *("flag Netherlands", "flag Russia", "flag Hungary", "flag Bulgaria", "flag Estonia", "flag Lithuania"),
        *("flag Poland", "flag Ukraine", "flag Japan", "flag Denmark", "flag Sweden", "flag Norway", "flag Finland"),
        *("flag Switzerland", "flag Nigeria", "flag Peru", "flag Colombia", "flag Yemen", "flag Mali"),
    ),
}


def few_emoji(table: pa.Table) -> pa.Table:
    """Return the rows of the embedded table that are of a kind, with the kind's number as their label."""
    numbers = {name: number for number, names in enumerate(KINDS.values()) for name in names}
    chosen = table.filter(pc.is_in(table["name"], pa.array(list(numbers))))
    labels = pa.array([numbers[name] for name in chosen["name"].to_pylist()], pa.int64())
    return chosen.set_column(chosen.schema.get_field_index("label"), "label", labels)
