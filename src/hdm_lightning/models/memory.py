"""Bytes that one sample's forward pass keeps for the backward pass, in eager mode.

Shapes: S tokens of a block, D width, M hidden width of the SwiGLU, H heads, L text tokens.
"""

from __future__ import annotations

from hdm_lightning.models.config import XUTConfig
from hdm_lightning.models.counts import Workload

# Saved sequences of S·D elements. A norm keeps its input, the normed input and the modulated one; an attention
# q, k, v, the rotated q and k, what it mixes and what it hands to the gate.
_NORM = 3
_ATTENTION = 3 + 2 + 1 + 1
# The SwiGLU keeps both halves of its packed product, silu of the first, their product, and what goes to the gate.
_FEED_FORWARD_HIDDEN = 4
_FEED_FORWARD_OUT = 1


def activation_bytes(
    config: XUTConfig,
    work: Workload,
    *,
    element_bytes: int = 2,
    checkpointing: bool = False,
    shared_positions: bool = False,
) -> int:
    """Activation memory of one sample in training; compiled graphs keep less.

    Args:
        config: the network.
        work: its tokens.
        element_bytes: of an activation: 2 under bf16 autocast, 4 in float32.
        checkpointing: whether each block's activations are recomputed, so that only its input is kept, and the
            whole of one block at a time.
        shared_positions: whether all samples have the same positions and no routing, so that the rotation angles
            are kept once for the batch (not counted) instead of once a sample.

    Returns:
        Bytes that grow with the batch. Weights, their half-precision copies, gradients and optimizer state are
        not in it.
    """
    outside = _block_bytes(config, work.full, element_bytes, False, shared_positions)
    inside = _block_bytes(config, work.routed, element_bytes, False, shared_positions)
    reading = _block_bytes(config, work.routed, element_bytes, True, shared_positions)
    full_blocks = config.blocks_before + config.blocks_after
    plain_blocks = config.depth * (config.encoder_blocks + config.decoder_blocks - 1)
    ends = _ends_bytes(config, work, element_bytes)
    if not checkpointing:
        return full_blocks * outside + plain_blocks * inside + config.depth * reading + ends
    inputs = (full_blocks * work.full + (plain_blocks + config.depth) * work.routed) * config.width * element_bytes
    largest = max(reading, outside if full_blocks else 0)
    return inputs + largest + ends


def _block_bytes(config: XUTConfig, tokens: int, element_bytes: int, reads_memory: bool, shared_positions: bool) -> int:
    """What one block keeps, its input included."""
    attentions = 2 if reads_memory else 1
    sequences = attentions * (_NORM + _ATTENTION) + _NORM + _FEED_FORWARD_OUT
    elements = tokens * (sequences * config.width + _FEED_FORWARD_HIDDEN * config.mlp_width)
    log_sums = attentions * 4 * tokens * config.heads
    # D/2 angles a token: a complex64, or a float32 beside a cosine and a sine of half the size.
    angles = 0 if shared_positions else attentions * 4 * tokens * config.width
    return elements * element_bytes + log_sums + angles


def _ends_bytes(config: XUTConfig, work: Workload, element_bytes: int) -> int:
    """Patches, context, the sequence that the output reads, and the shared modulation."""
    patch_values = config.channels * config.patch_size**2
    elements = work.image * patch_values + work.text * config.context_width + work.full * config.width
    modulation = 3 * (2 * 1 + 2 * 4 + 3) * config.width
    return (elements + modulation) * element_bytes
