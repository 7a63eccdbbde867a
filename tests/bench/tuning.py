"""Keys and configurations for the tests of the tuner."""

import torch

from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import Key, Projection

CPU, BF16 = torch.device("cpu"), torch.bfloat16
LAYER = Projection(64, 128, norm=True, gated=True)


def key(op="matmul", running=1, dims=None, layer=LAYER):
    return Key(op, BF16, dims or CALLS[op].dims(layer), running, layer)


def config(kernel, **meta):
    return {"backend": "triton", "kernel": kernel, "meta": meta}


GEMV = config("gemv", BLOCK_N=16, PER_SM=1, MOST_TILES=9, num_warps=1)
FMA = config("fma", BLOCK_M=1, BLOCK_N=4, BLOCK_K=64, num_warps=4)
TILE = config("tile", BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, GROUP_M=8)
