"""``python -m experiments.data.embed``: make the embedded samples again, to the byte, from the full data."""

import argparse
from pathlib import Path

from experiments.data import fashion_mnist


def main() -> None:
    """Write the embedded sample of Fashion-MNIST and say whether it is the one that the code expects."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the full data lies")
    parser.add_argument("--out", type=Path, default=fashion_mnist.EMBEDDED, help="the file to write")
    arguments = parser.parse_args()
    fashion_mnist.prepare(arguments.data_dir)
    digest = fashion_mnist.write_embedded(fashion_mnist.draw_embedded(arguments.data_dir), arguments.out)
    expected = fashion_mnist.EMBEDDED_SHA256
    verdict = "as expected" if digest == expected else f"NOT the expected {expected}"
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes, SHA-256 {digest}, {verdict}")


if __name__ == "__main__":
    main()
