"""The command that makes each figure and table again, as a person types it."""

TARGETS = {
    "resnet50-imagenet": "resnet50",
    "schnet-qm9": "qm9",
    "schnet-matproj": "matproj",
    "transformer-iwslt14": "iwslt14",
    "dlrm-criteo": "dlrm",
    "gpt-text": "gpt",
}
PAGE = "make report"
VERDICTS = "python -m experiments verdicts"
VERIFY = "python -m experiments verify-claim"
THEORY = "make reproduce-theory"
_ESTIMATE = (
    "python -m experiments estimate resnet50-imagenet --optimizer sgd --optimizer ngplus --batch 8 --steps 4 --cpu-time"
    " --flops 60e12"
)
_BENCHES = {
    "curvature": "make bench-curvature",
    "criteo-reader": "make bench-criteo",
    "estimate-resnet50-paper": f"{_ESTIMATE} --csv results/bench/estimate-resnet50-paper-cpu.csv",
    "estimate": "make bench-estimate",
    "schnet-loading": "make bench-schnet-loading",
    "steps-fairseq": "python -m experiments.bench.steps --model fairseq --optimizer ngplus-adam --no-memory",
}
_THEORY = {"figure1": "make reproduce-figure1", "costs": "python -m experiments.theory.costs"}


def train(task: str, scale: str) -> str:
    """Train the task's runs again, into ``build/results``.

    Args:
        task: the task's name.
        scale: a scale that it has a recipe for.

    Returns:
        A command line.
    """
    if task in TARGETS:
        return f"make reproduce-{TARGETS[task]} SCALE={scale}"
    return f"python -m experiments run {task} --scale {scale}"


def table(task: str, scale: str) -> str:
    """Make the table and curves again from the records.

    Args:
        task: the task's name.
        scale: a scale that it has a recipe for.

    Returns:
        A command line.
    """
    return f"python -m experiments table {task} --scale {scale} --results-dir results"


def tune(task: str, scale: str) -> str:
    """Search the settings again.

    Args:
        task: the task's name.
        scale: a scale that it has a recipe for.

    Returns:
        A command line.
    """
    if task in TARGETS:
        return f"make tune-{TARGETS[task]} SCALE={scale}"
    return f"python -m experiments tune {task} --scale {scale}"


def sensitivity(task: str, scale: str) -> str:
    """Run the grids of settings.

    Args:
        task: the task's name.
        scale: a scale that it has a recipe for.

    Returns:
        A command line.
    """
    return f"python -m experiments sensitivity {task} --scale {scale}"


def profiles(scale: str) -> str:
    """Make the performance profiles again from the records.

    Args:
        scale: a scale that it has a recipe for.

    Returns:
        A command line.
    """
    return f"python -m experiments profiles --scale {scale}"


def theory(part: str) -> str:
    """Run one part of the theory's checks.

    Args:
        part: a folder below ``results/theory``.

    Returns:
        A command line.
    """
    return _THEORY.get(part, THEORY)


def bench(stem: str) -> str:
    """Measure again what is in ``results/bench/<stem>.csv``.

    Args:
        stem: of the file.

    Returns:
        A command line.
    """
    return next((command for name, command in _BENCHES.items() if stem.startswith(name)), "make bench")
