import signal
import threading

import pytest

from tlk.llm.interrupts import held_interrupts


def press():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_waits_until_it_is_let_through():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as interrupts:
        press()
        done.append("the step")
        interrupts.let_through()
        done.append("another step")
    assert done == ["the step"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_not_lost_at_the_end():
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        press()


def test_a_second_ctrl_c_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        press()
        press()
        done.append("hung")
    assert not done


def test_nothing_happens_without_it():
    with held_interrupts() as interrupts:
        interrupts.let_through()


def test_a_handler_of_the_program_stays():
    seen = []
    own = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with held_interrupts():
            press()
    finally:
        signal.signal(signal.SIGINT, own)
    assert seen == [1]


def test_other_threads_may_use_it():
    with_errors = []

    def work():
        try:
            with held_interrupts() as interrupts:
                interrupts.let_through()
        except ValueError as error:
            with_errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not with_errors
