"""The published files: methane as it is published, and every change of it that must not be taken."""

import gzip

import numpy as np
import pytest

from experiments.data_io.checksum import DataFileError
from experiments.tasks.schnet import qm9
from experiments.tasks.schnet.qm9_xyz import HARTREE, read_uncharacterized, read_xyz

METHANE = (
    "5\n"
    "gdb 1\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749\t-40.47893\t"
    "-40.476062\t-40.475117\t-40.498597\t6.469\t\n"
    "C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689\n"
    "H\t 0.002150416\t-0.0060313176\t 0.0019761204\t 0.133921\n"
    "H\t 1.0117308433\t 1.4637511618\t 0.0002765748\t 0.133922\n"
    "H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923\n"
    "H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923\n"
    "1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078\n"
    "C\tC\t\n"
    "InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4\n"
)
POSITIONS = [
    [-0.0126981359, 1.0858041578, 0.0080009958],
    [0.002150416, -0.0060313176, 0.0019761204],
    [1.0117308433, 1.4637511618, 0.0002765748],
    [-0.540815069, 1.4475266138, -0.8766437152],
    [-0.5238136345, 1.4379326443, 0.9063972942],
]
NAME = "dsgdb9nsd_000001.xyz"


def put(folder, content, name=NAME):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ALIKE = {
    "as published": METHANE,
    "of Windows": METHANE.replace("\n", "\r\n"),
    "of an old Macintosh": METHANE.replace("\n", "\r"),
    "with a byte-order mark": "\ufeff" + METHANE,
    "without a last line feed": METHANE[:-1],
    "with blank lines at the end": METHANE + "\n \n",
    "with Fortran's exponents": METHANE.replace("0.0002765748", "2.765748*^-4"),
    "with other exponents": METHANE.replace("0.0002765748", "2.765748E-4").replace("13.21", "+.1321e2"),
}


@pytest.mark.parametrize("way", ALIKE)
def test_methane_is_read_as_it_is_published(way, tmp_path):
    entry = read_xyz(put(tmp_path, ALIKE[way]))
    assert entry.numbers.tolist() == [6, 1, 1, 1, 1]
    assert entry.positions.tolist() == POSITIONS
    assert entry.target == -40.47893 * HARTREE


COUNT = r"5 atoms must be followed by 9 lines \(properties, 5 of atoms, frequencies, SMILES, InChI\), there are "
SIZE = r"must be a number of at most 3\.4e\+38 in size"
FAULTS = [
    ("\t35.3641", "", "line 2: 16 words, must be 17: gdb, the molecule's number and 15 properties"),
    ("\t35.3641", "\t35.3641\t1.", "line 2: 18 words, must be 17"),
    ("gdb 1", "gdb_1", "line 2: 16 words, must be 17"),
    ("gdb 1\t", "", "line 2: 15 words, must be 17"),
    ("gdb 1", "gdb_1 1", "line 2: begins with 'gdb_1 1', must begin with 'gdb 1'"),
    ("gdb 1", "gdb 7", "line 2: begins with 'gdb 7', must begin with 'gdb 1'"),
    ("-40.47893\t", "-40,47893\t", f"line 2: property 11 = '-40,47893': {SIZE}"),
    ("-40.47893\t", "-4_0.47893\t", f"line 2: property 11 = '-4_0.47893': {SIZE}"),
    ("-40.47893\t", "nan\t", f"line 2: property 11 = 'nan': {SIZE}"),
    ("13.21", "?", f"line 2: property 5 = '\\?': {SIZE}"),
    ("5\n", "4\n", r"line 1: 4 atoms must be followed by 8 lines .*, there are 9"),
    ("5\n", "6\n", r"line 1: 6 atoms must be followed by 10 lines .*, there are 9"),
    ("5\n", "5.0\n", "line 1: '5.0': must be the number of atoms"),
    ("5\n", "0\n", "line 1: '0': must be the number of atoms"),
    ("5\n", "\n5\n", "line 1: '': must be the number of atoms"),
    ("C\t-0.0126981359\t", "C\t", "line 3: 4 columns, must be 5: element, x, y, z, charge: 'C"),
    ("\t-0.535689", "\t-0.535689\t0.", "line 3: 6 columns, must be 5"),
    ("0.9063972942", "1e39", f"line 7: z = '1e39': {SIZE}"),
    ("0.9063972942", "inf", f"line 7: z = 'inf': {SIZE}"),
    ("0.002150416", "0.2150416D-02", f"line 4: x = '0.2150416D-02': {SIZE}"),
    ("-0.535689", "Mulliken", f"line 3: charge = 'Mulliken': {SIZE}"),
    ("C\t-0", "Cl\t-0", "line 3: element = 'Cl': must be one of H, C, N, O, F"),
    ("C\t-0", "c\t-0", "line 3: element = 'c': must be one of"),
    ("C\t-0", "\nC\t-0", f"line 1: {COUNT}10"),
    ("1341.307", "x", f"line 8: frequency = 'x': {SIZE}"),
    ("C\tC\t\n", "\n", "line 9: is blank, must hold SMILES"),
    ("InChI=1S/CH4/h1H4\tInChI", "x\ty", "line 10: 'x.*must begin with InChI="),
]


@pytest.mark.parametrize(("old", "new", "message"), FAULTS)
def test_another_form_is_refused_by_file_and_line(old, new, message, tmp_path):
    assert old in METHANE
    with pytest.raises(DataFileError, match=rf"dsgdb9nsd_000001\.xyz, {message}"):
        read_xyz(put(tmp_path, METHANE.replace(old, new, 1)))


def test_a_file_cut_anywhere_before_its_last_line_is_refused(tmp_path):
    last = METHANE.index("InChI=")
    for stop in [*range(last), last + 3]:
        with pytest.raises(DataFileError, match=r"dsgdb9nsd_000001\.xyz( is empty|, line )"):
            read_xyz(put(tmp_path, METHANE[:stop]))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (METHANE.replace("CH4/h1H4\tI", "Å\tI").encode("latin-1"), 10),
        (METHANE.encode("utf-16"), 1),
        (gzip.compress(METHANE.encode(), mtime=0), 1),
    ],
)
def test_bytes_that_are_not_utf8_are_named(content, line, tmp_path):
    with pytest.raises(DataFileError, match=rf"dsgdb9nsd_000001\.xyz, line {line}: not UTF-8: byte 0x"):
        read_xyz(put(tmp_path, content))


# --- a folder of them


@pytest.fixture
def folder(tmp_path):
    put(tmp_path / "qm9" / "xyz-files", METHANE)
    return tmp_path / "qm9" / "xyz-files"


def load(folder):
    return qm9.load(folder.parent.parent, "xyz").structures


def test_hidden_files_are_left_out(folder):
    put(folder, b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xff\xfe", f"._{NAME}")
    assert load(folder).target.tolist() == [-40.47893 * HARTREE]
    np.testing.assert_array_equal(load(folder).positions, np.float32(POSITIONS))


def test_what_is_no_file_is_named(folder):
    path = folder / "dsgdb9nsd_000009.xyz"
    path.mkdir()
    with pytest.raises(DataFileError, match=r"dsgdb9nsd_000009\.xyz is a folder; must be a file"):
        load(folder)
    path.rmdir()
    path.symlink_to(folder / "absent")
    with pytest.raises(DataFileError, match=r"dsgdb9nsd_000009\.xyz is a link to .*absent, where there is nothing"):
        load(folder)


def test_two_files_of_one_number_are_named(folder):
    put(folder, METHANE.replace("-0.0126", "-0.0136"), "other_1.xyz")
    with pytest.raises(DataFileError, match=r"other_1\.xyz has the number of .*dsgdb9nsd_000001\.xyz; each molecule"):
        load(folder)


@pytest.mark.parametrize("name", ["methane.xyz", "dsgdb9nsd_.xyz", "dsgdb9nsd_².xyz"])
def test_a_name_without_a_number_is_refused(name, folder):
    put(folder, METHANE, name)
    with pytest.raises(DataFileError, match=r"must be named like dsgdb9nsd_000001\.xyz"):
        load(folder)


# --- the list of those that failed

HEADING = "\n\nList of molecules among the 133885\ndifferent SMILES\n\n=====\n#   Index    GDB17 SMILES   D_IJ\n=====\n"


@pytest.mark.parametrize(
    "text",
    [
        HEADING + "      58   NC(=N)C#N  6.036217\n     185   N=C1NC=CO1  1.5884\n=====\n",
        "58\n185",
        "\ufeff58 x\r\n\r\n000185 x\r\n",
    ],
)
def test_the_list_of_molecules_to_leave_out_is_read(text, tmp_path):
    assert read_uncharacterized(put(tmp_path, text, "list")) == {58, 185}


def test_there_may_be_no_list(tmp_path):
    assert read_uncharacterized(tmp_path / "list") == set()


@pytest.mark.parametrize("word", ["1,", "gdb_1", "1.0", "dsgdb9nsd_000001.xyz", "0", "133886", "²"])
@pytest.mark.parametrize("before", ["", "58 x\n", HEADING])
def test_an_entry_of_another_form_is_refused(before, word, tmp_path):
    line = before.count("\n") + 1
    with pytest.raises(DataFileError, match=rf"list, line {line}: begins with '{word}', must begin with a molecule's"):
        read_uncharacterized(put(tmp_path, f"{before}  {word} x\n 60 x\n", "list"))


def test_no_text_stands_between_the_entries(tmp_path):
    with pytest.raises(DataFileError, match="list, line 2: begins with 'and'"):
        read_uncharacterized(put(tmp_path, "58\nand\n60\n", "list"))


@pytest.mark.parametrize("content", [b"58\nNC(=\xe9)\n", "58\n".encode("utf-16")])
def test_a_list_that_is_not_utf8_is_named(content, tmp_path):
    with pytest.raises(DataFileError, match=r"list, line [12]: not UTF-8: byte 0x"):
        read_uncharacterized(put(tmp_path, content, "list"))


def test_a_list_that_is_no_file_is_named(tmp_path):
    (tmp_path / "list").mkdir()
    with pytest.raises(DataFileError, match="list is a folder; must be a file"):
        read_uncharacterized(tmp_path / "list")
