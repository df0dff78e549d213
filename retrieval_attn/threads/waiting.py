"""How threads wait for the next parallel loop: asleep, unless the user has said how.

A token takes hundreds of short loops, in turn on the threads of PyTorch and on those of numba. Threads of OpenMP spin
for a while after each, in case that another follows, and so keep the cores from those whose turn it is, and from all
other processes.
"""

import logging
import os
import sys

log = logging.getLogger("retrieval_attn")

# Whoever set one of these has said how threads wait.
USERS_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

# The module with which each library's OpenMP is loaded. That of numba comes with its first parallel loop.
LIBRARIES = {"torch": "torch", "numba's pool of threads": "numba.np.ufunc.omppool", "faiss": "faiss"}


def let_threads_sleep() -> None:
    """Set OMP_WAIT_POLICY, which each library's OpenMP reads once, when it is loaded: PyTorch's when torch is imported,
    numba's and faiss's with the first index. There is no call that changes how threads of one loaded before wait.

    `from retrieval_attn import load` and `import *` do this too, and child processes inherit it."""
    if any(name in os.environ for name in USERS_OWN):
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    early = [name for name, module in LIBRARIES.items() if module in sys.modules]
    if early:
        log.warning(
            "retrieval_attn.load was imported after %s, whose threads spin between loops, which makes tokens "
            "much slower where other work keeps a core busy; import retrieval_attn.load first or set "
            "OMP_WAIT_POLICY=PASSIVE",
            " and ".join(early),
        )
