"""Memory that a call needs."""

import tracemalloc


def peak_of(call):
    """Bytes that a call needs at once, when it has been compiled."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
