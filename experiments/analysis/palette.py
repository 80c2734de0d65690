"""One colour for each optimizer in every figure, told apart with any kind of colour vision."""

# Okabe and Ito's palette and, for the last ones, Tol's muted; yellow is left out: too pale on white.
COLOURS = {
    "ngplus": "#D55E00",
    "sgd": "#0072B2",
    "adam": "#009E73",
    "adagrad": "#CC79A7",
    "lars": "#E69F00",
    "kfac": "#56B4E9",
    "shampoo": "#000000",
    "seng": "#117733",
    "soap": "#882255",
    "muon": "#332288",
}
OTHER = "#777777"
DASHES = ("solid", "dashed", "dashdot", "dotted")


def colour_of(optimizer: str) -> str:
    """The colour of an optimizer; a suffix does not change it."""
    return COLOURS.get(optimizer.partition("-")[0], OTHER)


def dashes_of(optimizer: str, shown: list[str]) -> str:
    """The line style that tells an optimizer from the others of its colour among those `shown`."""
    alike = [name for name in sorted(shown) if colour_of(name) == colour_of(optimizer)]
    return DASHES[alike.index(optimizer) % len(DASHES)]
