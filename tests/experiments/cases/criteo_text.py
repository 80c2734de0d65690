"""Miniature logs in exactly Criteo's format: label, 13 integers, 26 categories of eight hexadecimal digits, tabs."""

import numpy as np

KINDS = (3, 40, 10**6)


def make_lines(count, *, seed=0):
    """Lines as lists of fields; some fields are empty, some integers negative."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        integers = [_gap(generator, str(generator.integers(-3, 5000))) for _ in range(13)]
        categories = [_gap(generator, f"{_value(generator, j):08x}") for j in range(26)]
        lines.append([str(generator.integers(2)), *integers, *categories])
    return lines


def _value(generator, j):
    return int(generator.integers(KINDS[j % 3])) * 2_654_435_761 % 2**32


def _gap(generator, field):
    return "" if generator.random() < 0.15 else field


def text_of(lines):
    return "".join("\t".join(fields) + "\n" for fields in lines).encode()


def put_log(data_dir, text):
    source = data_dir / "criteo" / "train.txt"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(text)
    return source
