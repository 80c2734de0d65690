from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from experiments.dataclass_io import SettingsError, read_settings, to_table


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: ClassVar = "circle"
    radius: float


@dataclass(frozen=True, kw_only=True)
class Square:
    kind: ClassVar = "square"
    side: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    x: int = 0


@dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Circle | Square
    count: int
    weight: float = 1.0
    filled: bool = False
    colour: Literal["red", "blue"] = "red"
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    title: str | None = None
    limit: float | Literal["none"] | None = None
    origin: Origin = Origin()

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count = {self.count}: must be at least 1")


WHOLE = {
    "shape": {"kind": "square", "side": 2},
    "count": 3,
    "weight": 2,
    "filled": True,
    "colour": "blue",
    "sizes": [1, 2, 3],
    "pair": [0.5, 1],
    "title": "a",
    "limit": "none",
    "origin": {"x": 4},
}


def test_a_table_of_every_type_is_read():
    assert read_settings(Drawing, WHOLE, "f") == Drawing(
        shape=Square(side=2.0),
        count=3,
        weight=2.0,
        filled=True,
        colour="blue",
        sizes=(1, 2, 3),
        pair=(0.5, 1.0),
        title="a",
        limit="none",
        origin=Origin(x=4),
    )


def test_reading_what_plain_wrote_gives_the_same():
    drawing = read_settings(Drawing, {"shape": {"kind": "circle", "radius": 1.5}, "count": 1}, "f")
    assert to_table(drawing)["shape"] == {"kind": "circle", "radius": 1.5}
    assert read_settings(Drawing, to_table(drawing), "f") == drawing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 1}, "file: size = 1: unknown key; must be one of colour, count, filled"),
        ({"count": None}, "file: count = None: must be an integer"),
        ({"count": True}, "file: count = True: must be an integer"),
        ({"count": 2.0}, "file: count = 2.0: must be an integer"),
        ({"weight": "heavy"}, "file: weight = 'heavy': must be a number"),
        ({"weight": True}, "file: weight = True: must be a number"),
        ({"filled": 1}, "file: filled = 1: must be true or false"),
        ({"colour": "green"}, "file: colour = 'green': must be one of blue, red"),
        ({"sizes": 3}, "file: sizes = 3: must be a list of any number of values"),
        ({"sizes": ["a"]}, "file: sizes = 'a': must be an integer"),
        ({"pair": [1]}, "file: pair = [1]: must be a list of 2 values"),
        ({"title": 3}, "file: title = 3: must be a string"),
        ({"limit": "some"}, "file: limit = 'some': must be a number, or must be one of none"),
        ({"shape": 3}, "file: shape = 3: must be a table"),
        ({"shape": {"side": 3}}, "file: shape: kind is missing; must be one of circle, square"),
        ({"shape": {"kind": "cube"}}, "file: shape: kind = 'cube': must be one of circle, square"),
        ({"shape": {"kind": "circle", "side": 3}}, "file: shape: side = 3: unknown key; must be one of radius"),
        ({"shape": {"kind": "circle"}}, "file: shape: radius is missing"),
        ({"origin": {"y": 3}}, "file: origin: y = 3: unknown key; must be one of x"),
        ({"count": 0}, "file: count = 0: must be at least 1"),
    ],
)
def test_an_error_names_the_place_the_key_the_value_and_what_is_allowed(change, message):
    with pytest.raises(SettingsError) as error:
        read_settings(Drawing, WHOLE | change, "file")
    assert str(error.value).startswith(message)


def test_a_missing_key_is_named():
    with pytest.raises(SettingsError, match="file: count is missing"):
        read_settings(Drawing, {"shape": {"kind": "circle", "radius": 1}}, "file")
