import pytest
import torch

from tests.bench.kernel_peers.packages import install
from tlk.bench.case import Case, load_cases
from tlk.bench.kernel_peers import COMPILED, PEERS, UNCOMPARED, peers_of
from tlk.bench.kernel_peers.peer import PEER_ERRORS, Peer, plain, reason, want
from tlk.errors import UnsupportedError

CASES = [case for cases in load_cases().values() for case in cases]


def test_a_package_that_is_not_there():
    with pytest.raises(UnsupportedError, match=r"^no-such is not installed$"):
        Peer("p", plain(len), "no-such", "no_such_module").require()
    Peer("p", plain(len), "torch").require()
    Peer("p", plain(len)).require()


def test_a_package_that_is_there(monkeypatch):
    install(monkeypatch, "flashinfer")
    peer = Peer("p", plain(len), "flashinfer-python", "flashinfer")
    peer.require()
    assert Peer("p", plain(len), "torch").version() == torch.__version__
    assert Peer("p", plain(len)).version() is None
    assert Peer("p", plain(len), "no-such").version() is None


def test_reasons_are_one_short_line():
    assert reason(RuntimeError("no\n  kernel")) == "RuntimeError: no kernel"
    assert reason(UnsupportedError("only for fp8")) == "only for fp8"
    long = reason(RuntimeError("a" * 300 + "end"))
    assert len(long) < 260 and long.endswith("end") and " … " in long


def test_what_a_peer_wants():
    want(True, "anything")
    with pytest.raises(UnsupportedError, match="only for bfloat16"):
        want(False, "bfloat16")


def test_errors_of_packages_are_caught_and_interrupts_are_not():
    assert not issubclass(KeyboardInterrupt, PEER_ERRORS) and not issubclass(
        SystemExit, PEER_ERRORS
    )
    assert issubclass(torch.OutOfMemoryError, PEER_ERRORS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_of_peers_are_unique(case):
    names = [peer.name for peer in peers_of(case)]
    assert len(names) == len(set(names))


def test_every_op_that_is_named_has_cases():
    ops = {case.op for case in CASES}
    assert COMPILED | UNCOMPARED | set(PEERS) <= ops


def test_which_peers():
    def case(op, **options):
        return Case(op, "s", tuple, len, len, len, peers={"torch": len}, options=options)

    def names(*args, **kwargs):
        return [peer.name for peer in peers_of(case(*args, **kwargs))]

    assert names("rms_norm") == ["flashinfer", "liger", "torch", "inductor"]
    assert names("unheard of") == ["torch"]
    (decode, *_), (prefill, *_) = (
        peers_of(case("paged_attention", decode=d)) for d in (True, False)
    )
    assert decode.name == prefill.name == "flashinfer" and decode.prepare is not prefill.prepare
    assert not any(peer.compared for peer in peers_of(case("sample")))
    assert all(peer.compared for peer in peers_of(case("rms_norm")))
