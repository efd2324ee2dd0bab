"""Which code this is: its version and, where that can be known, its commit."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tinyldm

ROOT = Path(__file__).resolve().parent.parent


@cache
def version() -> str:
    """"0.1.0 (1a2b3c4d5e)"; with "+" behind the commit where files differ from it; "0.1.0" where no commit is known."""
    commit = _checked_out() or _installed()
    return f"{tinyldm.__version__} ({commit})" if commit else tinyldm.__version__


def _checked_out() -> str:
    """The commit of a clone that the code runs in."""
    if not (ROOT / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        words = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
        return subprocess.run(words, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return ""


def _installed() -> str:
    """The commit that pip noted when it installed the package from a repository (PEP 610)."""
    with suppress(PackageNotFoundError, ValueError, KeyError, TypeError):
        return json.loads(distribution("tinyldm").read_text("direct_url.json"))["vcs_info"]["commit_id"][:10]
    return ""
