"""Prompts of several kinds, each like no other: a cached prefix would be no load."""

ENGLISH = [
    *("the", "of", "and", "to", "in", "that", "was", "it", "for", "with", "his", "on", "be", "at", "which"),
    *(
        "have",
        "from",
        "this",
        "are",
        "not",
        "but",
        "had",
        "they",
        "you",
        "all",
        "water",
        "mountain",
        "question",
    ),
    *("answer", "remember", "important", "between", "different", "government", "history", "development"),
    *(
        "because",
        "through",
        "children",
        "another",
        "together",
        "something",
        "evening",
        "language",
        "carefully",
    ),
]
CHINESE = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出"
    "就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民"
)
CODE = (
    "def {a}({b}, {c}=None):\n    if {b} is None:\n        return {c}[{n}]\n"
    "    for {a}_i in range(len({b})):\n"
    "        {c} += {b}[{a}_i] * {n}\n    return {{'{a}': {c}, \"{b}\": {n}.5}}\n\n"
)


def words(draw, count):
    return " ".join(draw.choice(ENGLISH) for _ in range(count))


def text_of(kind, draw):
    """Return a prompt that begins like no other: a cached prefix would be no load."""
    head = f"{draw.randrange(1 << 40):x} "
    if kind == "english":
        return head + words(draw, 160)
    if kind == "chinese":
        return head + "".join(draw.choice(CHINESE) for _ in range(240))
    names = {"a": draw.choice(ENGLISH), "b": draw.choice(ENGLISH), "c": draw.choice(ENGLISH)}
    return head + "".join(CODE.format(**names, n=draw.randrange(1000)) for _ in range(5))
