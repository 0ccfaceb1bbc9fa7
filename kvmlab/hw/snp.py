"""AMD SEV-SNP: every rule, wherever it is written (snp_entry.py: one RMP entry; snp_pages.py: sizes and VMPLs)."""

from .snp_entry import *  # noqa: F403
from .snp_pages import *  # noqa: F403
