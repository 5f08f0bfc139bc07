"""Functions in threads of their own that take turns, so that each computes as if it were alone."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

__all__ = ["in_turns"]

# It gets a function that lets the others have a turn each, and returns after that.
Function = Callable[[Callable[[], None]], None]


def in_turns(functions: Sequence[Function], failed: Callable[[], None]) -> list[BaseException]:
    """Call each function in a thread of its own; one runs at a time, until it hands over or ends.

    What is global, such as the state of random number generators, is whatever the one before has
    left: a function has to hand over where it does not depend on that.

    Args:
        functions: The functions.
        failed: Called after each that raises an exception, so that it can ask the others to end.

    Returns:
        The exceptions, the first one first, once all have ended.
    """
    turns, changed = deque(range(len(functions))), threading.Condition()
    errors: list[BaseException] = []

    def wait(number: int) -> None:
        changed.notify_all()
        changed.wait_for(lambda: turns[0] == number)

    def call(number: int, function: Function) -> None:
        def hand_over() -> None:
            with changed:
                turns.rotate(-1)
                wait(number)

        with changed:
            wait(number)
        try:
            function(hand_over)
        except BaseException as error:
            errors.append(error)
            failed()
        finally:
            with changed:
                turns.popleft()
                changed.notify_all()

    threads = [threading.Thread(target=call, args=each) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
