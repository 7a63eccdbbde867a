"""What the kernels are measured against, by op: other packages' kernels, and plain torch, compiled too."""

from tlk.bench.case import Case
from tlk.bench.kernel_peers import flashinfer_peers, liger_peers, quantized_peers, torch_peers
from tlk.bench.kernel_peers.peer import Peer, plain

PEERS: dict[str, tuple[Peer, ...]] = {
    "flash_attention": (*flashinfer_peers.FLASH_ATTENTION, *torch_peers.FLASH_ATTENTION),
    "rms_norm": (flashinfer_peers.RMS_NORM, liger_peers.RMS_NORM),
    "add_rms_norm": (flashinfer_peers.ADD_RMS_NORM, liger_peers.ADD_RMS_NORM),
    "layer_norm": (liger_peers.LAYER_NORM,),
    "silu_and_mul": (flashinfer_peers.SILU_AND_MUL, liger_peers.SILU_AND_MUL),
    "gelu_and_mul": (flashinfer_peers.GELU_AND_MUL,),
    "rope_and_write_kv_": (liger_peers.ROPE,),
    "sample": flashinfer_peers.SAMPLE,
    "dequant_mm": quantized_peers.DEQUANT_MM,
    "scaled_mm": quantized_peers.SCALED_MM,
}
# Their results are a matter of chance, or of which of equal logits comes first.
UNCOMPARED = {"sample", "likeliest_", "top_logprobs"}
# Whose plain torch Inductor makes kernels of, rather than calls of cuBLAS and sorts.
COMPILED = {
    *("rms_norm", "add_rms_norm", "layer_norm", "silu_and_mul", "gelu_and_mul", "relu_squared"),
    *("matmul", "norm_linear", "gated_linear", "likeliest_", "apply_penalties_"),
    "quantize_act",
}
# Of plain torch, which rounds between its ops.
TOLERANCE = 0.03


def peers_of(case: Case) -> tuple[Peer, ...]:
    """The peers of `case`: of other packages, its own, and its plain torch compiled."""
    compared = case.op not in UNCOMPARED
    own = [
        Peer(name, plain(run), compared=compared, tolerance=TOLERANCE)
        for name, run in case.peers.items()
    ]
    if case.op in COMPILED:
        own += (
            [torch_peers.inductor(case.peers["torch"], compared)] if "torch" in case.peers else []
        )
    return (*PEERS.get(case.op, _paged(case)), *own)


def _paged(case: Case) -> tuple[Peer, ...]:
    if case.op != "paged_attention":
        return ()
    decode = case.options.get("decode")
    return (flashinfer_peers.DECODE if decode else flashinfer_peers.PAGED_PREFILL,)
