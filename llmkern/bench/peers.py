"""What other projects' Triton kernels need for the shapes of `llmkern profile --against-peers`.

Measured by executing their PTX for sm_80 (Triton 3.7.1) in an emulator that counts as
llmkern.emulator does; each result was checked against torch. Copied figures: this package does not
install the other projects and does not measure them again. A row is the lowest figure among the
kernels of SOURCES that compute it, where known with the kernel it belongs to.

warp: warp instructions for 32 elements of a row operation, else for one mma that the product needs
at least. bytes and mma: over the least there can be; None: not written down. Conflicts were 1.00
throughout. Kernels of norm backward leave the last sum of the weights' gradients to torch, which
is not in these figures.
"""

from typing import NamedTuple

DATE = "2026-11-21"
SOURCES = (
    "liger-kernel 0.8.5",
    "flash-attention at 0251105a, its Triton kernels",
    "Triton 3.7.1, tutorials 03 (GEMM) and 06 (attention)",
)


class Peer(NamedTuple):
    warp: float
    bytes: float | None = None
    mma: float | None = None
    kernel: str = ""


# By row of bench/against_peers.py.
PEERS = {
    "layer_norm 1024 fwd": Peer(24.9, 2.0),
    "layer_norm 4096 fwd": Peer(19.6),
    "layer_norm 1024 bwd": Peer(23.9, 1.13),
    "layer_norm 4096 bwd": Peer(20.7, 1.11),
    "rms_norm 1024 fwd": Peer(19.5, 1.5),
    "rms_norm 4096 fwd": Peer(15.6, 1.5),
    "rms_norm 1024 bwd": Peer(19.6, 1.07),
    "rms_norm 4096 bwd": Peer(17.7, 1.07),
    "add_rms_norm 1024 fwd": Peer(22.4, 1.25),
    "add_rms_norm 4096 fwd": Peer(17.8, 1.25),
    "add_rms_norm 1024 bwd": Peer(22.0, 1.05),
    "add_rms_norm 4096 bwd": Peer(20.1, 1.05),
    "add_layer_norm 1024 fwd": Peer(21.7, 1.5),
    "add_layer_norm 4096 fwd": Peer(20.2, 1.5),
    "add_layer_norm 1024 bwd": Peer(27.0, 1.53),
    "add_layer_norm 4096 bwd": Peer(23.9, 1.53),
    "add_layer_norm dropout 1024 fwd": Peer(67.0),
    "add_layer_norm dropout 4096 fwd": Peer(65.0),
    "attention D64 fwd": Peer(6.28, mma=1.0, kernel="tutorial 06"),
    "attention D128 fwd": Peer(4.34, mma=1.0, kernel="tutorial 06"),
    "attention causal D64 fwd": Peer(9.49, mma=1.25),
    "attention causal D128 fwd": Peer(6.56, mma=1.25),
    "attention D64 bwd": Peer(5.13, kernel="one CTA a head"),
    "attention D128 bwd": Peer(3.76, kernel="one CTA a head, 192 KB of shared memory"),
    "attention causal D64 bwd": Peer(8.52, mma=1.25),
    "attention causal D128 bwd": Peer(6.03, mma=1.25),
    "linear 128x128x32 512x512x512": Peer(2.80, mma=1.0),
    "linear 128x128x32 256x768x3072": Peer(2.30, mma=1.0),
    "linear 64x128x32 512x512x512": Peer(3.85, mma=1.0),
    "linear 64x128x32 256x768x3072": Peer(3.19, mma=1.0),
    "linear split 512x512x512": Peer(6.2, mma=1.0, kernel="atomic split K"),
    "linear split 256x768x3072": Peer(4.3, mma=1.0, kernel="atomic split K"),
    "linear tf32 512x512x512": Peer(2.67, mma=1.0),
    "linear tf32 256x768x3072": Peer(2.36, mma=1.0),
}
