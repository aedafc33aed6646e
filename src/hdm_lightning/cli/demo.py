"""`hdm-demo`: the whole path from shards to scored images, at small scale."""

import sys
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from hdm_lightning.cli.hydra_app import run_hydra
from hdm_lightning.training.former_keys import present_keys


def main() -> None:
    """Entry point."""
    sys.exit(run_hydra(demo, "demo"))


def demo(config: DictConfig) -> None:
    """Compose the two training runs and run the parts that are not done yet."""
    from hdm_lightning.cli.demo_parts import demo_processes, run_demo  # noqa: PLC0415 (torch takes seconds)

    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    folder = Path(plain["run_dir"]).absolute()
    common = [f"seed={config.seed}", f"trainer.devices={demo_processes()}"]
    autoencoder = _composed("train_vae", [*common, *plain["train_vae"], f"run_dir={folder / 'autoencoder'}"])
    vae = [f"vae.name={folder / 'autoencoder' / 'final'}"]
    model = _composed("train", [*common, *vae, *plain["train"], f"run_dir={folder / 'model'}"])
    status = run_demo(folder, plain, autoencoder, model)
    if status:
        sys.exit(status)


def _composed(name: str, overrides: list[str]) -> DictConfig:
    return compose(name, overrides=present_keys(overrides, name))


if __name__ == "__main__":
    main()
