"""Device memory of training by part, and the largest micro-batch that fits.

Shapes: S tokens of a block, D width, M hidden width of the SwiGLU, H heads, L text tokens.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.operations import BLOCKS, Workload, network_parts
from hdm_lightning.profiling.planned_run import Recipe, StageRecipe

GIB = 2**30

COMPILED_SHARE = 0.75
"""Activations of compiled blocks relative to eager mode. For an XUT under autocast, AOTAutograd's min-cut partitioner
keeps 0.67 of what eager mode keeps for the backward pass (measured by the test suite). The peak of a step, which holds
more than that, was 25.4 GiB against 33.0 with xut_base on an H100, 3.4 of them weights and gradients: 0.74."""

# Saved sequences of S·D elements. A norm saves its input, the normed input and the modulated one; attention saves
# q, k, v, the rotated q and k, the mixed values and the gate's input; a SwiGLU saves the gate's input.
_NORM, _ATTENTION, _FEED_FORWARD = 3, 3 + 2 + 1 + 1, 1
# The SwiGLU also saves S·M elements each: both halves of its packed product, silu of the first, their product.
_FEED_FORWARD_HIDDEN = 4


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the peak of a step.

    Kept between micro-batches: `weights`, `optimizer` (its moments), `averages`, `half_copies` (half-precision weights
    of autocast; sharded: the part of the network gathered at once), `encoders`, `reserve`, and `gradients` if
    `gradients_stay`. In addition, the `inputs` of a micro-batch and the largest of three that do not coexist: its
    `activations`, the memory of the running encoders (`encoding`), and gradients that do not stay. If the encoders are
    `overlapped` with the network, they do coexist, together with the inputs of the next micro-batch.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    half_copies: int
    encoders: int
    reserve: int
    inputs: int
    activations: int
    encoding: int
    gradients_stay: bool
    overlapped: bool = False

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the micro-batch."""
        kept = self.weights + self.optimizer + self.averages + self.half_copies + self.encoders + self.reserve
        return kept + (self.gradients if self.gradients_stay else 0)

    @property
    def total(self) -> int:
        """Peak bytes."""
        network, encoders = self.inputs + self.activations, self.inputs + self.encoding
        if self.overlapped:
            return self.fixed + encoders + (network if self.gradients_stay else max(network, self.gradients))
        passing = max(network, encoders)
        return self.fixed + (passing if self.gradients_stay else max(passing, self.gradients))


def device_memory(recipe: Recipe, stage: StageRecipe, *, devices: int = 1, reserve_gib: float = 0.0) -> DeviceMemory:
    """Return the memory of one device in a stage.

    With several devices, as with accumulation, gradients stay (in exchange buffers); if the recipe is sharded, each
    device holds a part of weights, gradients, moments and averages. `reserve_gib` is memory not used by tensors.
    """
    samples, parameters, moments = stage.micro_batch_size, recipe.parameters, recipe.moments
    trained = recipe.trained
    copies = 2 * parameters if recipe.mixed else 0
    if recipe.sharded:
        parameters, trained, moments = (ceil(each / devices) for each in (parameters, trained, moments))
        copies = gathered_bytes(recipe)
    return DeviceMemory(
        weights=4 * parameters,
        gradients=4 * trained,
        optimizer=int(recipe.moment_bytes * moments),
        averages=4 * trained * recipe.averages,
        half_copies=copies,
        encoders=recipe.element_bytes * (recipe.text.parameters + recipe.autoencoder.parameters),
        reserve=int(reserve_gib * GIB),
        inputs=samples * _input_bytes(recipe, stage),
        activations=samples * sample_activation_bytes(recipe, stage),
        encoding=_encoding_bytes(recipe, stage),
        gradients_stay=devices > 1 or stage.batch_size > devices * samples,
        overlapped=recipe.overlapped,
    )


def gathered_bytes(recipe: Recipe) -> int:
    """Return the most bytes of a sharded network that a device gathers beyond its own part.

    These are two blocks (the next is gathered while one runs) and the conditioning in the activations' precision, and
    the embeddings and output in float32, as FSDP2 shards the network in training.
    """
    parts = network_parts(recipe.network)
    ends = ("patch_embedding", "text_projection", "output_projection")
    conditioning = sum(part.parameters for name, part in parts.items() if name not in (*BLOCKS, *ends))
    largest = max(part.largest_block for part in parts.values())
    whole = sum(parts[name].parameters for name in ends)
    return recipe.element_bytes * (2 * largest + conditioning) + 4 * whole


def activation_bytes(
    config: XUTConfig,
    work: Workload,
    *,
    element_bytes: int = 2,
    checkpointing: bool | Literal["selective"] = False,
    shared_positions: bool = False,
) -> int:
    """Return the bytes that one sample's forward pass saves for the backward pass in eager mode; compiled saves less.

    Excludes weights, their half-precision copies, gradients and optimizer state. It is a closed form rather than a
    rehearsal on CPU kernels, whose RMSNorm keeps a float32 copy of its input that a GPU's fused kernel does not.

    Args:
        config: network configuration.
        work: tokens of a sample.
        element_bytes: bytes of an activation: 2 under bf16 autocast, 4 in float32.
        checkpointing: whether each block's activations are recomputed, so that only its input is saved, plus all of
            one block at a time; `selective` also saves the output of every attention.
        shared_positions: whether all samples have the same positions and no routing, so that the rotation angles
            are saved once per batch (not counted) instead of once per sample.
    """

    def block(tokens: int, attentions: int) -> int:
        sequences = attentions * (_NORM + _ATTENTION) + _NORM + _FEED_FORWARD
        elements = tokens * (sequences * config.width + _FEED_FORWARD_HIDDEN * config.mlp_width)
        log_sums = attentions * 4 * tokens * config.heads
        # D/2 angles per token: a complex64, or a float32 beside a cosine and a sine of half the size.
        angles = 0 if shared_positions else attentions * 4 * tokens * config.width
        return elements * element_bytes + log_sums + angles

    outer, levels = config.blocks_before + config.blocks_after, config.depth
    plain = levels * (config.encoder_blocks + config.decoder_blocks - 1)
    attentions = 2 if config.reads_encoder else 1
    outside, inside, first = block(work.full, 1), block(work.routed, 1), block(work.routed, attentions)
    if config.skips == "concatenation":  # both sequences side by side
        first += 2 * work.routed * config.width * element_bytes
    # Patches, context, the input of the output layer, and the shared modulation.
    ends = work.image * config.channels * config.patch_size**2 + work.text * config.context_width
    ends += work.full * config.width + (1 + attentions) * (2 * 1 + 2 * 4 + 3) * config.width
    if not checkpointing:
        return outer * outside + plain * inside + levels * first + ends * element_bytes
    inputs = (outer * work.full + (plain + levels) * work.routed) * config.width
    kept = 0
    if checkpointing == "selective":
        queries = outer * work.full + (plain + attentions * levels) * work.routed
        kept = queries * (config.width * element_bytes + 4 * config.heads)
    return max(first, outside if outer else 0) + (inputs + ends) * element_bytes + kept


def sample_activation_bytes(recipe: Recipe, stage: StageRecipe) -> int:
    """Return the bytes that one more sample adds to the peak, at the start of the backward pass."""
    work, again = recipe.work(stage), stage.checkpointing
    kept = activation_bytes(recipe.network, work, element_bytes=recipe.element_bytes, checkpointing=again)
    if again:  # when a block is recomputed, the freed inputs of later ones make room for its gradients
        return kept
    if recipe.compiled:
        kept = int(COMPILED_SHARE * kept)
    # The gradients of a SwiGLU's two halves, minus what its backward pass has freed by then.
    return kept + work.full * 2 * recipe.network.mlp_width * recipe.element_bytes


def largest_micro_batch(
    recipe: Recipe, stage: StageRecipe, memory_gib: float, *, devices: int = 1, reserve_gib: float = 0.0
) -> int:
    """Return the largest micro-batch whose step fits into `memory_gib`; 0 if not even one sample does.

    The encoders may split it into smaller batches, see `fitting_encoder_batches`.
    """
    frugal = replace(recipe, text_max_tokens=1, autoencoder_max_pixels=1)

    def fits(samples: int) -> bool:
        needed = device_memory(
            frugal, replace(stage, micro_batch_size=samples), devices=devices, reserve_gib=reserve_gib
        )
        return needed.total <= memory_gib * GIB

    return _most(stage.batch_size, fits)


def fitting_encoder_batches(
    recipe: Recipe, stage: StageRecipe, memory_gib: float, *, devices: int = 1, reserve_gib: float = 0.0
) -> tuple[int, int]:
    """Return how many captions and images of a micro-batch to encode at once, within memory and the recipe's limits."""

    def fits(captions: int, images: int) -> bool:
        tokens, pixels = captions * stage.context_length, images * stage.resolution**2
        trial = replace(recipe, text_max_tokens=tokens, autoencoder_max_pixels=pixels)
        return device_memory(trial, stage, devices=devices, reserve_gib=reserve_gib).total <= memory_gib * GIB

    most_images = min(recipe.images_at_once(stage), stage.micro_batch_size)
    most_captions = min(recipe.captions_at_once(stage), stage.micro_batch_size)
    images = max(1, _most(most_images, lambda count: fits(1, count)))
    return max(1, _most(most_captions, lambda count: fits(count, images))), images


def usable_micro_batch(stage: StageRecipe, devices: int, largest: int) -> int:
    """Return the largest micro-batch up to ``largest`` that divides the stage's batch per device; 0 if none."""
    per_device = stage.batch_size // devices
    return next((size for size in range(min(largest, per_device), 0, -1) if per_device % size == 0), 0)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest count up to the limit that fits, assuming that all smaller ones do; 0 if none."""
    return bisect_left(range(1, limit + 1), True, key=lambda count: not fits(count))


def _input_bytes(recipe: Recipe, stage: StageRecipe) -> int:
    """Return the bytes of a sample's image (or moments), latent, noise, target, text states, context and positions."""
    latent = 4 * recipe.autoencoder.latent_values(stage.resolution, stage.resolution)
    context = (4 + stage.text_stored * recipe.element_bytes) * stage.context_length * recipe.text.width
    given = latent if stage.cached else 3 * stage.resolution**2  # both moments in half precision, or pixels
    return given + 4 * latent + context + 8 * recipe.work(stage).full


def _encoding_bytes(recipe: Recipe, stage: StageRecipe) -> int:
    """Return the peak bytes of either encoder, including the whole micro-batch of images as floats."""
    side, element, samples = stage.resolution, recipe.element_bytes, stage.micro_batch_size
    images = 0
    if not stage.cached:
        images += samples * 3 * side**2 * 4
        images += min(samples, recipe.images_at_once(stage)) * recipe.autoencoder.encode_peak_bytes(side, side, element)
    if stage.text_stored:
        return images
    captions = min(samples, recipe.captions_at_once(stage)) * recipe.text.peak_bytes(stage.context_length, element)
    return max(images, captions)
