"""What the server of :mod:`tests.support.processes` imports before it forks; it starts no thread.

torch imports Dynamo when the first optimizer is made, and Dynamo imports Triton, whose interpreter
must be chosen before: here it is, for nothing compiles without a GPU. Where there is one, a process
imports both itself.
"""

# ruff: noqa: F401

import os
from contextlib import suppress
from functools import cache

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as a run on a CPU does, before torch
# Asked of the driver's library: a process that has begun CUDA cannot fork one that uses it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch
import torch.distributed.run
import torch.utils.tensorboard

with suppress(ModuleNotFoundError):  # a GPU machine's image may hold only what kernels need
    import partialfc.commands.evaluate
    import partialfc.commands.train
    import partialfc.training.run
    import tests.support.models

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import torch._dynamo

    with suppress(ImportError):
        from triton.runtime import interpreter

        _replaced = cache(interpreter._patch_lang)

        def _device_function(self, *arguments, **named):
            """What InterpretedFunction does, which looks through triton.language at every call.

            What it replaces there stays replaced, and looking is two fifths of a kernel's time.
            """
            _replaced(self.fn)
            return self.rewrite()(*arguments, **named)

        interpreter.InterpretedFunction.__call__ = _device_function

    with suppress(ImportError):
        import nvidia.dali.fn
