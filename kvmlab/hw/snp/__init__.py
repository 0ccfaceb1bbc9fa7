"""AMD SEV-SNP: every rule, wherever it is written (snp_entry.py: one RMP entry; snp_pages.py: sizes and VMPLs)."""

from .entry import *  # noqa: F403
from .pages import *  # noqa: F403
