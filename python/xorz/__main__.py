"""`python -m xorz`: where the library and its header are, for build scripts; other words go to the `xorz` command."""

import argparse
import os
import sys
import sysconfig
from collections.abc import Sequence

from . import __version__, include_path, library_path
from .hub import push

_HELP = """usage: python -m xorz --library-path | --include-path | --version
       python -m xorz push SOURCE OWNER/NAME [--base BASE] [--private] [--revision REVISION] [--license LICENSE]
       python -m xorz COMMAND ...

  --library-path  the library for torch.ops.load_library, dlopen, and C programs
  --include-path  the folder of xorz.h, the header of its C ABI
  --version       the version of the library
  push            a tenant's folder, or a package, to the Hugging Face Hub, with a model card
  COMMAND         one of the xorz command: pack, unpack, verify, inspect, ... (see xorz --help)
"""


def main(arguments: Sequence[str]) -> int:
    """Print what was asked for, or become the `xorz` command; gives the exit code."""
    answers = {
        "--library-path": library_path,
        "--include-path": include_path,
        "--version": f"xorz {__version__}",
        "--help": _HELP.rstrip(),
        "-h": _HELP.rstrip(),
    }
    first = arguments[0] if arguments else "--help"
    if first in answers and len(arguments) < 2:
        print(answers[first])
        return 0
    if first == "push":
        return _push(arguments[1:])
    if first.startswith("-"):
        unknown = arguments[1] if first in answers else first
        print(f"xorz: unexpected argument {unknown!r}\n\n{_HELP}", end="", file=sys.stderr)
        return 2
    command = os.path.join(sysconfig.get_path("scripts"), "xorz")
    try:
        os.execv(command, [command, *arguments])
    except OSError as error:
        print(
            f"xorz: the xorz command cannot be run ({error.strerror}): {command}; install xorz into this Python "
            f"({sys.executable} -m pip install, or `make build` in its source tree)",
            file=sys.stderr,
        )
        return 1


def _push(arguments: Sequence[str]) -> int:
    words = argparse.ArgumentParser(
        prog="python -m xorz push", description="Upload a tenant to the Hugging Face Hub."
    )
    words.add_argument("source", help="a tenant's folder, or a package")
    words.add_argument("repository", metavar="OWNER/NAME", help="made if it is missing")
    words.add_argument(
        "--base", help="the base's Hub name or folder; a folder's adapter_config.json says it already"
    )
    words.add_argument("--private", action="store_true", default=None, help="of a repository that is made")
    words.add_argument("--revision", help="a branch; main by default")
    words.add_argument("--license", help="for the head of a model card that is made")
    asked = vars(words.parse_args(arguments))
    try:
        print(push(asked.pop("source"), asked.pop("repository"), **asked))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"xorz: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
