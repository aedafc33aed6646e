"""The published diffusers folder: the network in one subfolder under ``model.`` names, the autoencoder in vae/."""

from __future__ import annotations

from pathlib import Path

from hdm_lightning.errors import UserError
from hdm_lightning.interop import published
from hdm_lightning.interop.release import Release, release_from_tensors
from hdm_lightning.interop.tensor_files import read_sharded, write_tensors
from hdm_lightning.interop.vae_folder import WEIGHTS, read_vae_folder, write_vae_folder
from hdm_lightning.whole_files import write_json

NETWORK, VAE, PREFIX = "unet", "vae", "model."


def read_diffusers(folder: Path) -> Release:
    """The release in a diffusers folder, or in its network's subfolder alone.

    The network's shape is read off its tensors, whichever subfolder they are in.

    Raises:
        UserError: no subfolder holds an XUT, or its tensors are missing, unexpected or mis-shaped.
    """
    for place in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        tensors = read_sharded(place, WEIGHTS)
        if tensors is None or published.find_prefix(tensors) is None:
            continue
        try:
            found = release_from_tensors(tensors)
        except ValueError as error:
            raise UserError(str(error), where=str(place)) from error
        vae = read_vae_folder(folder / VAE)
        if not vae.tensors:
            return found
        return Release(found.network, vae.tensors, vae.config, vae.mean, vae.std, left_out=found.left_out)
    raise UserError(
        f"neither the folder nor a subfolder has a {WEIGHTS} file with an XUT in it",
        where=str(folder),
        hint="give the folder that holds the network, a run's final/ folder, or a single file",
    )


def write_diffusers(folder: Path, release: Release) -> None:
    """Write network and autoencoder as a diffusers folder.

    Raises:
        ValueError: the wiring is not the published one, or there is an autoencoder without a configuration.
    """
    config = published.config_to_json(release.network.config)
    if release.vae and release.vae_config is None:
        raise ValueError("vae_config is None beside an autoencoder; expected its config.json")
    tensors = {PREFIX + n: t for n, t in published.export_state_dict(release.network).items()}
    write_tensors(folder / NETWORK / f"{WEIGHTS}.safetensors", tensors)
    write_json(folder / NETWORK / "config.json", config)
    if release.vae and release.vae_config is not None:
        write_vae_folder(folder / VAE, release.vae, release.vae_config, release.vae_mean, release.vae_std)
