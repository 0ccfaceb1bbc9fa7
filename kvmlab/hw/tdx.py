"""Intel TDX: every rule, wherever it is written.

tdx_words.py: leaves, completion codes, operands, levels; tdx_entry.py, tdx_sept.py: the secure EPT; tdx_locks.py;
tdx_pamt.py; tdx_tlb.py: epochs; tdx_td.py: a TD's life; tdx_lines.py: memory by KeyID; tdx_module.py: one module.
"""

from .tdx_entry import *  # noqa: F403
from .tdx_lines import *  # noqa: F403
from .tdx_locks import *  # noqa: F403
from .tdx_module import *  # noqa: F403
from .tdx_pamt import *  # noqa: F403
from .tdx_parts import *  # noqa: F403
from .tdx_platform import *  # noqa: F403
from .tdx_sept import *  # noqa: F403
from .tdx_td import *  # noqa: F403
from .tdx_tlb import *  # noqa: F403
from .tdx_words import *  # noqa: F403
