"""Device memory of training, part by part, and the largest micro-batch that fits.

Shapes: S tokens of a block, D width, M hidden width of the SwiGLU.
"""

from dataclasses import dataclass, replace
from math import ceil

from hdm_lightning.models.counts import parameter_counts
from hdm_lightning.models.memory import activation_bytes
from hdm_lightning.planning.recipe import Recipe, StageRecipe

GIB = 2**30

COMPILED_SHARE = 0.75
"""Share of the eager activations that compiled blocks need. Of what eager mode saves of an XUT under autocast, the
min-cut partitioner of AOTAutograd saves 0.67 (measured by the test suite). A step's peak, which holds more than that,
was 25.4 GiB against 33.0 with xut_base on an H100, 3.4 of them weights and gradients: 0.74."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the fullest moment of a step.

    What stays from one micro-batch to the next: `weights`, `optimizer` (its moments), `averages`, `half_copies`
    (half-precision weights of autocast; sharded, what is gathered of the network at once), `encoders`, `reserve`,
    and `gradients` where `gradients_stay`. Beside it `inputs` of a micro-batch and the largest of three that do not
    meet: its `activations`, what the encoders need while they run (`encoding`), and gradients that do not stay.
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

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        kept = self.weights + self.optimizer + self.averages + self.half_copies + self.encoders + self.reserve
        return kept + (self.gradients if self.gradients_stay else 0)

    @property
    def total(self) -> int:
        """The peak."""
        passing = self.inputs + max(self.activations, self.encoding)
        return self.fixed + (passing if self.gradients_stay else max(passing, self.gradients))


def device_memory(
    recipe: Recipe,
    stage: StageRecipe,
    *,
    devices: int = 1,
    reserve_gib: float = 0.0,
) -> DeviceMemory:
    """Memory of one device in a stage.

    Args:
        recipe: network, encoders, averages and precision.
        stage: tokens, micro-batch and checkpointing.
        devices: how many share the batch; several keep their gradients in exchange buffers, as accumulation does,
            and have a part each of weights, gradients, moments and averages where the recipe is sharded.
        reserve_gib: memory that is not tensors.
    """
    samples, parameters, moments = stage.micro_batch_size, recipe.parameters, recipe.moments
    copies = 2 * parameters if recipe.mixed else 0
    if recipe.sharded:
        parameters, moments = ceil(parameters / devices), ceil(moments / devices)
        copies = gathered_bytes(recipe)
    return DeviceMemory(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=4 * moments,
        averages=4 * parameters * recipe.averages,
        half_copies=copies,
        encoders=recipe.element_bytes * (recipe.text.parameters + recipe.autoencoder.parameters),
        reserve=int(reserve_gib * GIB),
        inputs=samples * _input_bytes(recipe, stage),
        activations=samples * sample_activation_bytes(recipe, stage),
        encoding=_encoding_bytes(recipe, stage),
        gradients_stay=devices > 1 or stage.batch_size > devices * samples,
    )


def gathered_bytes(recipe: Recipe) -> int:
    """The most that a device holds of a sharded network beyond its part.

    Two blocks (the next is gathered while one runs) and the conditioning in the precision of the activations,
    embeddings and output in float32: see `training.strategies.parallelize.shard_network`.
    """
    counts, network = parameter_counts(recipe.network), recipe.network
    plain = counts.encoder // (network.depth * network.encoder_blocks)
    largest = counts.decoder // network.depth - (network.decoder_blocks - 1) * plain
    return recipe.element_bytes * (2 * largest + counts.conditioning) + 4 * (counts.embedding + counts.output)


def sample_activation_bytes(recipe: Recipe, stage: StageRecipe) -> int:
    """What one more sample adds to the fullest moment, the start of the backward pass."""
    kept = activation_bytes(
        recipe.network, recipe.work(stage), element_bytes=recipe.element_bytes, checkpointing=stage.checkpointing
    )
    if stage.checkpointing:  # by the time a block runs again, inputs of later ones have made room for its gradients
        return kept
    if recipe.compiled:
        kept = int(COMPILED_SHARE * kept)
    # The gradients of a SwiGLU's two halves, beyond what its backward pass has freed by then.
    return kept + recipe.work(stage).full * 2 * recipe.network.mlp_width * recipe.element_bytes


def largest_micro_batch(
    recipe: Recipe, stage: StageRecipe, memory_gib: float, *, devices: int = 1, reserve_gib: float = 0.0
) -> int:
    """The largest micro-batch whose step fits into so much memory; 0 if not even one sample does.

    The encoders may take their batch in smaller parts for it, see `fitting_encoder_batches`.
    """

    def fits(samples: int) -> bool:
        smaller = replace(stage, micro_batch_size=samples)
        frugal = replace(recipe, text_max_tokens=1, autoencoder_max_pixels=1)
        needed = device_memory(frugal, smaller, devices=devices, reserve_gib=reserve_gib)
        return needed.total <= memory_gib * GIB

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < stage.batch_size and fits(high):
        low, high = high, 2 * high
    high = min(high, stage.batch_size + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fitting_encoder_batches(
    recipe: Recipe, stage: StageRecipe, memory_gib: float, *, devices: int = 1, reserve_gib: float = 0.0
) -> tuple[int, int]:
    """Captions and images of a micro-batch to encode at once: the most that fit, at most what the recipe allows."""

    def fits(captions: int, pictures: int) -> bool:
        tokens, pixels = captions * stage.context_length, pictures * stage.resolution**2
        trial = replace(recipe, text_max_tokens=tokens, autoencoder_max_pixels=pixels)
        return device_memory(trial, stage, devices=devices, reserve_gib=reserve_gib).total <= memory_gib * GIB

    images = min(recipe.images_at_once(stage), stage.micro_batch_size)
    text = min(recipe.captions_at_once(stage), stage.micro_batch_size)
    while images > 1 and not fits(1, images):
        images -= 1
    while text > 1 and not fits(text, images):
        text -= 1
    return text, images


def usable_micro_batch(stage: StageRecipe, devices: int, largest: int) -> int:
    """The largest micro-batch of at most ``largest`` that divides the stage's batch on so many devices; 0 if none."""
    per_device = stage.batch_size // devices
    return next((size for size in range(min(largest, per_device), 0, -1) if per_device % size == 0), 0)


def _input_bytes(recipe: Recipe, stage: StageRecipe) -> int:
    """The image as bytes, its latent, noise and target, the context and the positions of one sample."""
    latent = 4 * recipe.autoencoder.latent_values(stage.resolution, stage.resolution)
    context = 4 * stage.context_length * recipe.text.width
    return 3 * stage.resolution**2 + 4 * latent + context + 8 * recipe.work(stage).full


def _encoding_bytes(recipe: Recipe, stage: StageRecipe) -> int:
    """The fullest moment of either encoder, with the whole micro-batch of images as numbers."""
    side, element, samples = stage.resolution, recipe.element_bytes, stage.micro_batch_size
    images = samples * 3 * side**2 * 4
    images += min(samples, recipe.images_at_once(stage)) * recipe.autoencoder.encode_peak_bytes(side, side, element)
    captions = min(samples, recipe.captions_at_once(stage)) * recipe.text.peak_bytes(stage.context_length, element)
    return max(images, captions)
