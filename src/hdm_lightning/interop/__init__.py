"""Published checkpoints, diffusers folders and ComfyUI single files."""
