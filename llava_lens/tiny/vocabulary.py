"""The words of the small world: what scenes hold, what is said and asked about them. Plain data, no imports."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
PLURALS = {
    "circle": "circles", "square": "squares", "triangle": "triangles",
    "star": "stars", "heart": "hearts", "cross": "crosses",
}  # fmt: skip
COLORS = {
    "red": (214, 32, 38),
    "orange": (255, 138, 0),
    "yellow": (250, 222, 32),
    "green": (36, 152, 58),
    "cyan": (48, 206, 214),
    "blue": (34, 74, 206),
    "purple": (124, 36, 160),
    "pink": (255, 132, 186),
}
PLACES = (
    ("top-left", "top", "top-right"),
    ("left", "center", "right"),
    ("bottom-left", "bottom", "bottom-right"),
)
NUMBERS = ("zero", "one", "two", "three", "four")
YES, NO = "yes", "no"

FUNCTION_WORDS = (
    "a", "above", "an", "and", "answer", "any", "are", "assistant", "at", "below", "big", "black", "both", "brown",
    "can", "color", "contains", "describe", "different", "do", "does", "each", "every", "first", "gray", "has",
    "have", "how", "i", "image", "in", "is", "it", "large", "last", "left-of", "many", "more", "most", "next", "none",
    "not", "number", "object", "objects", "of", "on", "one", "only", "or", "other", "picture", "question", "right-of",
    "same", "scene", "see", "shape", "small", "than", "that", "the", "there", "they", "this", "to", "two", "user",
    "what", "where", "which", "white", "with", "you", "between", "near", "far", "background", "behind", "but", "for",
    "from", "here", "its", "just", "less", "like", "look", ".", ",", "?", ":", "!", "'", "-",
)  # fmt: skip

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")


def words() -> list[str]:
    """Every word in the order of its id, the special ones first."""
    places = [place for row in PLACES for place in row]
    content = [*SHAPES, *PLURALS.values(), *COLORS, *places, *NUMBERS, YES, NO]
    return list(dict.fromkeys([*SPECIAL, *content, *FUNCTION_WORDS]))
