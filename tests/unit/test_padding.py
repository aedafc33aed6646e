"""Sizes that the autoencoder's factor does not divide: refused or padded by choice, and never cropped."""

import pytest
import torch
import torch.nn.functional as F

from hdm_lightning.encoders.autoencoder import cut_to, load_autoencoder, pad_to_multiple, padded_size
from hdm_lightning.metrics.autoencoder_quality import AutoencoderMeasures


@pytest.mark.parametrize(("size", "expected"), [((8, 8), (8, 8)), ((1, 9), (8, 16)), ((16, 15), (16, 16))])
def test_the_smallest_size_that_holds_a_picture(size, expected):
    assert padded_size(*size, 8) == expected


def test_the_edges_are_mirrored_and_the_picture_stays():
    image = torch.arange(5 * 6, dtype=torch.uint8).reshape(1, 1, 5, 6)
    padded = pad_to_multiple(image, 4, "pad")
    assert padded.dtype == torch.uint8 and padded.shape == (1, 1, 8, 8)
    assert torch.equal(cut_to(padded, 5, 6), image)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]
    assert padded[0, 0, :, 0].tolist() == [0, 6, 12, 18, 24, 18, 12, 6]


def test_a_side_too_short_for_a_mirror_is_repeated():
    padded = pad_to_multiple(torch.tensor([[[[1.0, 2.0]]]]), 4, "pad")
    assert padded.tolist() == [[[[1.0, 2.0, 2.0, 2.0]] * 4]]


def test_what_fits_is_left_alone_and_what_does_not_is_refused():
    image = torch.zeros(1, 3, 8, 12)
    assert pad_to_multiple(image, 4, "refuse") is image
    with pytest.raises(ValueError, match="got 12x8 pixels, expected multiples of 8; on_indivisible='pad'"):
        pad_to_multiple(image, 8, "refuse")


def test_an_autoencoder_gives_back_any_size(tiny_autoencoder):
    vae = load_autoencoder(str(tiny_autoencoder))
    image = torch.rand(2, 3, 30, 45, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with pytest.raises(ValueError, match="45x30"):
        vae.reconstruct(image)
    mirrored = F.pad(image, (0, 3, 0, 2), mode="reflect")
    expected = vae.decode(vae.encode(mirrored))[..., :30, :45]
    assert torch.equal(vae.reconstruct(image, on_indivisible="pad"), expected)
    assert torch.equal(vae.reconstruct(mirrored), vae.decode(vae.encode(mirrored)))


def test_measures_compare_what_the_picture_was():
    """An autoencoder that is perfect but for what was padded on."""

    def decode(latent):
        image = F.pixel_shuffle(latent, 2)
        image[..., 30:, :] = -image[..., 30:, :]
        return image

    def posterior(image):
        return F.pixel_unshuffle(image, 2), torch.zeros(())

    def measured(cut):
        measures = AutoencoderMeasures(
            lambda image: (posterior(image)[0], torch.zeros_like(posterior(image)[0])),
            decode,
            channels=12,
            factor=2,
            transforms={},
        )
        padded = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return measures.update(padded, cut=cut)["reconstruction/l1"]

    assert measured((30, 32)).max() == 0
    assert measured(None).min() > 0.01
