"""Intel TDX: every rule, wherever it is written.

words.py: leaves, completion codes, operands, levels; td.py: a TD's life; entry.py, sept.py: the secure EPT; locks.py;
pamt.py; tlb.py: epochs; lines.py: memory by KeyID.  checks.py: what each leaf asks, in which order.
structures.py, platform.py, call.py, module.py: one module to play with.
"""

from .call import *  # noqa: F403
from .checks import *  # noqa: F403
from .entry import *  # noqa: F403
from .lines import *  # noqa: F403
from .locks import *  # noqa: F403
from .module import *  # noqa: F403
from .pamt import *  # noqa: F403
from .platform import *  # noqa: F403
from .sept import *  # noqa: F403
from .structures import *  # noqa: F403
from .td import *  # noqa: F403
from .tlb import *  # noqa: F403
from .words import *  # noqa: F403
