"""A plugin of vLLM, which every process of it loads: asks the kernel for the tiles of Intel's AMX.

vLLM 0.32's attention for CPUs uses them in any process, but only oneDNN asks for them, at its first
product. A model without such a product before its first attention (AWQ's and GPTQ's have none) ends
with SIGILL on a CPU with AMX. Linux gives the tiles to a process that asks, until it executes
another program: https://docs.kernel.org/arch/x86/xstate.html
"""

import torch


def request() -> None:
    """Ask for them; on a CPU without them this does nothing."""
    torch.cpu._init_amx()  # noqa: SLF001 - there is no public name
