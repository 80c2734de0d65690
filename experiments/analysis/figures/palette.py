"""One colour for each optimizer in every figure, told apart with any kind of colour vision."""

# Okabe and Ito's palette and, for the last ones, Tol's muted; yellow is left out: too pale on white.
COLOURS = {
    "ngplus": "#D55E00",
    "sgd": "#0072B2",
    "adam": "#009E73",
    "adamw": "#999933",
    "adagrad": "#CC79A7",
    "lars": "#E69F00",
    "kfac": "#56B4E9",
    "shampoo": "#000000",
    "seng": "#117733",
    "soap": "#882255",
    "muon": "#332288",
}
OTHER = "#777777"
# Lighter where the colour would sink into a dark ground.
ON_DARK = {
    "sgd": "#4AA8E0",
    "adam": "#1FBF91",
    "shampoo": "#F0F0F0",
    "seng": "#7CC66B",
    "soap": "#E0567A",
    "muon": "#A79BFF",
}
DASHES = ("solid", "dashed", "dashdot", "dotted")


def pick_colour(optimizer: str) -> str:
    """The colour of an optimizer; a suffix does not change it.

    Args:
        optimizer: its name, with or without a suffix.

    Returns:
        ``#rrggbb``.
    """
    return COLOURS.get(optimizer.partition("-")[0], OTHER)


def lighten_colour(optimizer: str) -> str:
    """The same for a dark ground.

    Args:
        optimizer: its name, with or without a suffix.

    Returns:
        ``#rrggbb``.
    """
    return ON_DARK.get(optimizer.partition("-")[0], pick_colour(optimizer))


def pick_dashes(optimizer: str, shown: list[str]) -> str:
    """The line style that tells an optimizer from the others of its colour among those `shown`.

    Args:
        optimizer: its name.
        shown: all that are in the figure.

    Returns:
        Matplotlib's name of the line style.
    """
    alike = [name for name in sorted(shown) if pick_colour(name) == pick_colour(optimizer)]
    return DASHES[alike.index(optimizer) % len(DASHES)]
