"""Figure 1, the theorems and the errata: pictures inside the page, and the errata's table."""

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from experiments.analysis.report import rerun_commands
from experiments.analysis.report.blocks import Block, Line, Links, Picture, Section, make_table
from experiments.analysis.report.results_folder import ResultsFolder

# A title, and what is to be seen.
PICTURES = {
    "figure1/figure1": (
        "Figure 1 redone",
        "Rows of three matrices: the GFIM, the first block of the EFIM, and their difference. Divided by n the two "
        "look alike; as printed they differ by a factor of n = 200.",
    ),
    "figure1/matrices": (
        "Difference of the two matrices over the number of samples",
        "With L/n the relative difference falls as the square root of (m+1)/N; with L as printed it stays near 200.",
    ),
    "figure1/layers": (
        "Approximations of the EFIM on trained layers",
        "Panels of points, a row a layer: relative error and cosine with the exact direction, for NG+, K-FAC, "
        "Shampoo and the plain gradient.",
    ),
    "convergence/convergence": (
        "Mean squared gradient beside the bounds of Theorem 3",
        "Eight panels over steps: the measured mean stays below the corrected bound, and rises above the printed one "
        "in most panels.",
    ),
    "convergence/slope": (
        "A slope on which the printed rate fails",
        "Over the number of steps, the measured mean lies between the corrected bound above it and the printed one "
        "far below it.",
    ),
    "costs/costs": (
        "Counted costs as shares of forward and backward",
        "Four panels of bars on a logarithmic axis, four models each: NG+ beside its released construction, K-FAC "
        "and Shampoo.",
    ),
    "regret/regret": (
        "Regret beside the bounds of Theorem 5",
        "Panels over rounds: the regret of NG+, gradient descent and the online Newton step beside the corrected and "
        "the printed bound.",
    ),
}


def section(results: ResultsFolder) -> Section:
    """A part for each folder, then the errata.

    Args:
        results: the results folder.

    Returns:
        The section.
    """
    parts = [_part(results, folder) for folder in sorted((results.root / "theory").glob("*/")) if folder.is_dir()]
    return Section(id="theory", title="Theory", blocks=_errata(results), parts=parts)


def _errata(results: ResultsFolder) -> list[Block]:
    errata = results.csv("theory/errata.csv")
    rerun = (rerun_commands.THEORY,)
    if errata is None:
        return [Line(text="The errata were not checked here.", rerun=rerun)]
    caption = "Formulas as printed and as corrected; 0 is right"
    return [make_table(errata, caption, rerun)]


def _part(results: ResultsFolder, folder: Path) -> Section:
    rerun = (rerun_commands.theory(folder.name),)
    blocks: list[Block] = []
    for path in sorted(folder.glob("*.png")):
        name = f"{folder.name}/{path.stem}"
        try:
            blocks.append(picture(path, name, rerun))
        except (OSError, Image.DecompressionBombError):
            results.warn(f"theory/{name}.png: is no image that can be read")
    files = [(path.name, quote(f"../theory/{folder.name}/{path.name}")) for path in sorted(folder.glob("*.csv"))]
    if files:
        blocks.append(Links(text="The figures' numbers", files=files))
    return Section(
        id=f"theory-{folder.name}",
        title=folder.name.capitalize().replace("Figure1", "Figure 1"),
        blocks=blocks or [Line(text="Nothing was recorded here.", rerun=rerun)],
    )


def picture(path: Path, name: str, rerun: tuple[str, ...]) -> Picture:
    """A picture as lossless WebP: a third of the PNG's size.

    Args:
        path: a PNG file.
        name: folder and stem, a key of `PICTURES`.
        rerun: the commands that make it again.

    Returns:
        The picture with its caption and its description in words.

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(path) as image:
        inside = BytesIO()
        image.convert("RGB").save(inside, "WEBP", lossless=True, method=6)
        width, height = image.size
    title, alternative = PICTURES.get(name, (name, f"A figure of the theory's checks: {name}."))
    return Picture(
        caption=title,
        source=f"data:image/webp;base64,{b64encode(inside.getvalue()).decode()}",
        alternative=alternative,
        width=width,
        height=height,
        rerun=rerun,
    )
