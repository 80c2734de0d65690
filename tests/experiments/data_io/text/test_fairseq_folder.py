"""Folders of fairseq-preprocess: what is written is read again, and every fault is named with its place."""

import json
import logging
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text import fairseq_folder
from experiments.data_io.text.bpe import apply_codes, clean, learn_codes, tokenise
from experiments.data_io.text.fairseq_library import LanguagePairDataset, TranslationConfig, TranslationTask
from experiments.data_io.text.parallel_text import Pair
from experiments.data_io.text.text_corpus import CorpusSettings, corpus_folder, subword_folder
from tests.experiments.cases import sentences


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "folder"
    splits = {name: list(sentences.translations(size, seed=seed)) for seed, (name, size) in enumerate(SIZES.items())}
    fairseq_folder.write_folder(splits, path, {"source": "made up"}, codes="#version: 0.2\n")
    return path, splits


SIZES = {"train": 40, "valid": 7, "test": 5}


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "folder")
    return tmp_path / "folder"


def read(folder):
    return fairseq_folder.read_folder(folder, "make it again")


def test_fairseqs_own_task_reads_the_sentences_back(made):
    path, splits = made
    task = TranslationTask.setup_task(TranslationConfig(data=str(path), source_lang="de", target_lang="en"))
    task.cfg.train_subset, task.cfg.dataset_impl, task.cfg.required_seq_len_multiple = "train", "mmap", 1
    task.load_dataset("valid")
    dataset = task.datasets["valid"]
    assert isinstance(dataset, LanguagePairDataset)
    back = [
        (task.src_dict.string(dataset[i]["source"]), task.tgt_dict.string(dataset[i]["target"]))
        for i in range(len(dataset))
    ]
    known = [pair for pair in back if "<unk>" not in " ".join(pair)]
    assert known == [pair for pair, read_back in zip(splits["valid"], back, strict=True) if read_back in known]
    assert len(known) == SIZES["valid"]


def test_a_folder_is_described(made):
    path, splits = made
    found = read(path)
    assert found.sizes == SIZES
    assert found.empty == dict.fromkeys(SIZES, 0)
    assert found.longest["train"] == 1 + max(len(side.split()) for pair in splits["train"] for side in pair)
    assert found.about == {"source": "made up"}
    assert len(found.sha256) == 64


def test_writing_changes_no_logging(made):
    assert logging.getLogger("fairseq_cli.preprocess").handlers == []


def test_sentences_without_a_word_are_counted(tmp_path):
    pairs = [*sentences.translations(5), ("", "the dog ."), ("der Hund .", "")]
    fairseq_folder.write_folder(dict.fromkeys(SIZES, pairs), tmp_path / "folder", {}, codes="")
    assert read(tmp_path / "folder").empty == dict.fromkeys(SIZES, 2)


@pytest.mark.parametrize("name", ["dict.en.txt", "test.de-en.de.idx", "valid.de-en.en.bin"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataFileError, match=f"{name} missing: make it again"):
        read(folder)


@pytest.mark.parametrize("kept", [0, 10, -2])
def test_sentences_that_were_not_written_to_the_end_are_refused(folder, kept):
    path = folder / "train.de-en.en.bin"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataFileError, match=r"train\.de-en\.en\.bin .*not written to its end"):
        read(folder)


@pytest.mark.parametrize("kept", [0, 5, 20, 60])
def test_an_index_that_was_not_written_to_the_end_is_refused(folder, kept):
    path = folder / "train.de-en.en.idx"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataFileError, match=r"train\.de-en\.en\.(idx: cut short|bin has)"):
        read(folder)


def test_unequal_numbers_of_sentences_are_refused(folder):
    for kind in ("idx", "bin"):
        shutil.copy(folder / f"test.de-en.de.{kind}", folder / f"valid.de-en.de.{kind}")
    with pytest.raises(DataFileError, match="5 German and 7 English sentences: sentence 6 has no counterpart"):
        read(folder)


def test_a_dictionary_with_too_few_words_is_one_of_another_run(folder):
    path = folder / "dict.en.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(DataFileError, match=r"\.bin, sentence \d+: token \d+, but dict\.en\.txt ends at 8"):
        read(folder)


def test_a_dictionary_of_as_many_words_in_another_order_is_one_of_another_run(folder):
    path = folder / "dict.de.txt"
    words = [line.split() for line in path.read_text().splitlines()]
    assert words[1][1] != words[2][1]
    words[1], words[2] = words[2], words[1]
    path.write_text("".join(f"{word} {count}\n" for word, count in words))
    with pytest.raises(DataFileError, match=r"dict\.de\.txt, line 2: .* dictionary of another run"):
        read(folder)


@pytest.mark.parametrize("line", ["word", "word many", " 3", "word -1"])
def test_a_line_of_a_dictionary_that_is_no_word_and_count_is_named(folder, line):
    path = folder / "dict.de.txt"
    path.write_text("gut 3\n" + line + "\n")
    with pytest.raises(DataFileError, match=r"dict\.de\.txt, line 2: must be a word, a blank and its count"):
        read(folder)


@pytest.mark.parametrize("after", [0, 4])
def test_a_byte_order_mark_is_no_letter_of_a_dictionarys_first_word(folder, after):
    path = folder / "dict.en.txt"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[after] = "\ufeff" + lines[after]
    path.write_text("".join(lines), encoding="utf-8")
    if after:  # there it can only come from the text
        assert read(folder).sizes == SIZES
        return
    with pytest.raises(DataFileError, match=r"dict\.en\.txt, line 1: begins with a byte-order mark"):
        read(folder)


@pytest.mark.parametrize(("word", "place"), [("gut", "in line 1 already"), ("<unk>", "one of fairseq's own, <s>, ")])
def test_a_word_that_is_in_a_dictionary_twice_is_named_unless_it_says_so(word, place, tmp_path):
    path = tmp_path / "dict.de.txt"
    path.write_text(f"gut 3\nja 2\n{word} 1\n")
    with pytest.raises(
        DataFileError, match=rf"dict\.de\.txt, line 3: the word '{word}' is {place}.*; must be there once"
    ):
        fairseq_folder.read_dictionary(path)
    path.write_text(f"gut 3\nja 2\n{word} 1 #fairseq:overwrite\n")
    found = fairseq_folder.read_dictionary(path)
    assert (found.words, found.counts) == (["gut", "ja", word], [3, 2, 1])
    assert len(found) == len(fairseq_folder.Dictionary.load(str(path)))


# --- where sentences begin and end


HEAD = 9 + 8 + 1 + 8  # bytes of an index before the lengths


def edit_index(folder, change, split="train"):
    """Change the lengths and beginnings of a split's German sentences in place."""
    path = folder / f"{split}.de-en.de.idx"
    raw = bytearray(path.read_bytes())
    count = SIZES[split]
    lengths = np.frombuffer(raw, np.int32, count, HEAD)
    change(lengths, np.frombuffer(raw, np.int64, count, HEAD + 4 * count))
    path.write_bytes(raw)


def differing(lengths):
    """The first sentence whose length is not that of the next."""
    return int(np.flatnonzero(np.diff(lengths))[0])


def test_beginnings_that_are_not_where_the_sentence_before_ends_are_refused(folder):
    def zero(lengths, starts):
        starts[30:] = 0

    edit_index(folder, zero)
    with pytest.raises(DataFileError, match=r"train\.de-en\.de\.idx, sentence 31: begins at byte 0, must begin at \d"):
        read(folder)


@pytest.mark.parametrize("begin", [False, True])
def test_two_lengths_that_are_swapped_are_refused_by_sentence(begin, folder):
    """Where the beginnings are changed with them, the first of the two does not end in the end of a sentence."""
    place = []

    def swap(lengths, starts):
        k = differing(lengths)
        lengths[[k, k + 1]] = lengths[[k + 1, k]]
        if begin:
            starts[1:] = 2 * np.cumsum(lengths)[:-1]
        place.append(k + 1)

    edit_index(folder, swap, "valid")
    with pytest.raises(DataFileError) as caught:
        read(folder)
    k = place[0]
    expected = (
        rf"valid\.de-en\.de\.bin, sentence {k}: its last token is \d+, must be 2, the end"
        if begin
        else rf"valid\.de-en\.de\.idx, sentence {k + 1}: begins at byte \d+, must begin at \d+"
    )
    assert re.search(expected, str(caught.value))


def test_a_sentence_without_its_end_is_refused(folder):
    path = folder / "valid.de-en.de.bin"
    tokens = np.fromfile(path, np.uint16)
    removed = int(np.flatnonzero(tokens == 2)[2])
    np.delete(tokens, removed).tofile(path)

    def shorten(lengths, starts):
        lengths[2] -= 1
        starts[3:] -= 2

    edit_index(folder, shorten, "valid")
    with pytest.raises(
        DataFileError, match=r"valid\.de-en\.de\.bin, sentence 3: its last token is \d+, must be 2, the end"
    ):
        read(folder)


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_below_one_is_refused(length, folder):
    def change(lengths, starts):
        lengths[4] = length

    edit_index(folder, change)
    with pytest.raises(
        DataFileError, match=rf"train\.de-en\.de\.idx, sentence 5: length = {length}: must be 1 at least"
    ):
        read(folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_what_a_folder_says_of_itself_must_be_a_table(content, folder):
    (folder / "about.json").write_text(content)
    with pytest.raises(DataFileError, match=r"about\.json .*must be a table of JSON.*: make it again"):
        read(folder)


def test_a_joined_dictionary_counts_both_languages(folder, tmp_path):
    text = folder / "text"
    target = tmp_path / "joined"
    parser = fairseq_folder.options.get_preprocessing_parser()
    prefixes = [f"--{split}pref={text / split}" for split in SIZES]
    with fairseq_folder.restore_logging():
        fairseq_folder.preprocess.main(
            parser.parse_args(
                ["-s", "de", "-t", "en", "--joined-dictionary", f"--destdir={target}", "--padding-factor=1", *prefixes]
            )
        )
    assert read(target).sizes == SIZES


# --- from sentences to a folder


def test_cleaning_counts_what_it_leaves_out_and_why():
    long = " ".join(["ja"] * 176)
    kept, dropped = clean([("a b", "c d"), ("", "a"), ("a", " "), ("a b c d", "a b"), (long, long)])
    assert kept == [("a b", "c d")]
    assert dropped == {"empty": 2, "one side more than 1.5 times as long": 1, "longer than 175 tokens": 1}


def test_tokens_are_those_of_moses():
    assert tokenise([("Ja, z. B. hier!", "It's Mr. Smith's \"dog\".")]) == [
        ("Ja , z. B. hier !", "It &apos;s Mr. Smith &apos;s &quot; dog &quot; .")
    ]
    assert tokenise([("ÄB", "Ab")], lowercase=True) == [("äb", "ab")]


# What Moses' tokenizer.perl prints for these sentences, `-l de` and `-l en`.
BY_PERL = [
    ("Es steht auf Seite 3.", "Es steht auf Seite 3 .", "It is on page 3.", "It is on page 3 ."),
    ("Blumen usw. Und usw.", "Blumen usw. Und usw .", "So am I, vs. Mr. Smith vs.", "So am I , vs. Mr. Smith vs ."),
    ("Es kostet 5 Mio.", "Es kostet 5 Mio .", "No. 5, No. Five, No.", "No. 5 , No . Five , No ."),
    ("Sie lebt in den U.S.", "Sie lebt in den U.S .", "She lives in the U.S.", "She lives in the U.S ."),
    ("Am 3. Mai, und dann ...", "Am 3. Mai , und dann ...", "On May 3. he came ...", "On May 3. he came ..."),
    ('Er: "Nach Nr. 5."', "Er : &quot; Nach Nr. 5. &quot;", 'He: "No. 5."', "He : &quot; No. 5 . &quot;"),
    ("Er rief 'usw.'", "Er rief &apos; usw. &apos;", "He cried 'vs.'", "He cried &apos; vs . &apos;"),
    ("Nun ja..", "Nun ja ..", "Well..", "Well .."),
    ("Ende.", "Ende .", ".", "."),
]


@pytest.mark.parametrize(("de", "german", "en", "english"), BY_PERL)
def test_a_sentence_ends_as_in_the_perl_script(de, german, en, english):
    [(found_de, found_en)] = tokenise([(de, en)])
    assert (found_de.strip(), found_en.strip()) == (german, english)


def test_the_last_full_stop_of_recorded_corpora_stays_as_it_is(tmp_path):
    """Their checksums stand in the records of runs, which must be made again to the bit."""
    assert tokenise([("5 Mio.", "The U.S.")], split_last_full_stop=False) == [("5 Mio.", "The U.S.")]
    pairs = [Pair(f"page {number}", f"Es kostet {number} Mio.", "In the U.S.") for number in range(9)]
    folder = corpus_folder(pairs, CorpusSettings(merges=1, validation_size=1, test_size=1), tmp_path)
    text = (folder.path / "text" / "train.en").read_text(encoding="utf-8")
    assert text.replace("@@ ", "").splitlines() == ["In the U.S."] * 7


def test_subwords_are_learned_on_both_languages_and_join_to_the_tokens_again():
    pairs = list(sentences.translations(50))
    codes = learn_codes(pairs, 10)
    cut = apply_codes(pairs, codes)
    assert len(codes.splitlines()) == 11
    assert cut != pairs
    assert [tuple(side.replace("@@ ", "") for side in pair) for pair in cut] == pairs


def test_a_corpus_is_made_once_and_under_another_name_for_other_settings(tmp_path):
    settings = CorpusSettings(merges=20, validation_size=8, test_size=8)
    pairs = sentences.pairs(60)
    first = corpus_folder(pairs, settings, tmp_path)
    changed = (first.path / "dict.de.txt").stat().st_mtime_ns
    again = corpus_folder(pairs, settings, tmp_path)
    assert (again, (again.path / "dict.de.txt").stat().st_mtime_ns) == (first, changed)
    other = corpus_folder(pairs[1:], settings, tmp_path)
    assert other.path != first.path
    assert first.sizes["test"] == 8
    about = json.loads((first.path / "about.json").read_text())
    assert set(about["left out"]) == {"train", "valid", "test"}


def test_two_processes_that_want_a_corpus_at_once_both_get_it(tmp_path):
    settings = CorpusSettings(merges=20, validation_size=8, test_size=8)
    pairs = sentences.pairs(60)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        both = [processes.submit(corpus_folder, pairs, settings, tmp_path) for _ in range(2)]
        one, other = (each.result() for each in both)
    assert one == other
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [one.path.name]


def test_a_damaged_corpus_is_refused_with_what_to_do(tmp_path):
    settings = CorpusSettings(merges=20, validation_size=8, test_size=8)
    folder = corpus_folder(sentences.pairs(60), settings, tmp_path).path
    (folder / "train.de-en.de.bin").write_bytes(b"")
    with pytest.raises(DataFileError, match="is empty: the folder was not written to its end"):
        corpus_folder(sentences.pairs(60), settings, tmp_path)


def test_a_split_of_which_nothing_is_left_is_refused(tmp_path):
    good = list(sentences.translations(5))
    with pytest.raises(DataFileError, match="no sentence pair is left for the valid split"):
        subword_folder({"train": good, "valid": [("a b c d e", "f")], "test": good}, 10, tmp_path / "folder", {})
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("field", ["merges", "validation_size", "test_size", "train_size"])
def test_sizes_are_positive(field):
    with pytest.raises(ValueError, match=f"{field} = 0"):
        CorpusSettings(**{"merges": 1, "validation_size": 1, "test_size": 1, field: 0})
