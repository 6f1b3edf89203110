"""Whether an error says that memory was not enough, which libraries say in words of their own."""
from __future__ import annotations

MEMORY_ERRORS = (MemoryError, RuntimeError, SystemError, ImportError)
"""Types of the errors that may say so."""
WORDS = ('out of memory', "can't allocate memory",  # torch, on a device and on the CPU
         'CUBLAS_STATUS_ALLOC_FAILED', 'CUDNN_STATUS_ALLOC_FAILED',  # CUDA's libraries
         'unable to find an engine', 'Unable to find a valid cuDNN algorithm',  # no memory for what cuDNN works in
         'Cannot allocate memory',  # the system
         'Failed to allocate memory', 'bad_alloc',  # SimpleITK
         "can't start new thread", 'failed to map segment',  # Python: no room for a stack, or for a library
         'could not create a primitive', 'could not execute a primitive')  # oneDNN, of which no other cause was seen


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, or what it came of, is Python's MemoryError or says so by one of `WORDS`."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(words in str(cause) for words in WORDS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
