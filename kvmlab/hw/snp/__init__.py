"""AMD SEV-SNP: every rule, wherever it is written (entry.py: one RMP entry; pages.py: sizes and VMPLs)."""

from .entry import *  # noqa: F403
from .pages import *  # noqa: F403
