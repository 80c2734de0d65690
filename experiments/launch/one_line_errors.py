"""What a person sees of a process that ends early, and what nobody can do anything about and is not shown."""

import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from experiments.errors import UserError

# Of other packages, about themselves: category, module that is warned about or "", and the beginning of the message.
_OTHERS = (
    (FutureWarning, "", "`torch.jit.script` is deprecated"),  # schnetpack and asdfghjkl
    (FutureWarning, "fairseq", "`torch.cuda.amp.GradScaler"),
    (UserWarning, "", "torch.cuda.amp.GradScaler is enabled, but CUDA is not available"),  # fairseq
    (UserWarning, "", "Support for mismatched key_padding_mask and attn_mask"),  # fairseq
    (DeprecationWarning, "", "`torch.jit.script` is deprecated"),
    (SyntaxWarning, "", "invalid escape sequence"),  # dirsync, which schnetpack needs
    (UserWarning, "", "Sparse invariant checks are implicitly disabled"),  # torch, of its AdaGrad
)


def report_errors_in_one_line(command: Callable[[], None]) -> None:
    """Call `command`; an error that the user can fix is one line on stderr and exit status 2.

    Warnings that other packages cause by themselves are not shown.

    Args:
        command: what is to be run.
    """
    try:
        with warnings.catch_warnings():
            for category, module, message in _OTHERS:
                warnings.filterwarnings("ignore", message, category, module)
            command()
    except (UserError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _end_interrupted()
    except SystemExit as ended:  # what Typer makes of an interrupt
        if ended.code == _INTERRUPTED:
            _end_interrupted()
        raise


_INTERRUPTED = 128 + signal.SIGINT


def _end_interrupted() -> NoReturn:
    print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(_INTERRUPTED)
