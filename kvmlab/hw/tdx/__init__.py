"""Intel TDX: every rule, wherever it is written.

tdx_words.py: leaves, completion codes, operands, levels; tdx_entry.py, tdx_sept.py: the secure EPT; tdx_locks.py;
tdx_pamt.py; tdx_tlb.py: epochs; tdx_td.py: a TD's life; tdx_lines.py: memory by KeyID; tdx_module.py: one module.
"""

from .entry import *  # noqa: F403
from .lines import *  # noqa: F403
from .locks import *  # noqa: F403
from .module import *  # noqa: F403
from .pamt import *  # noqa: F403
from .parts import *  # noqa: F403
from .platform import *  # noqa: F403
from .sept import *  # noqa: F403
from .td import *  # noqa: F403
from .tlb import *  # noqa: F403
from .words import *  # noqa: F403
