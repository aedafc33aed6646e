"""Conversion of published checkpoints, diffusers folders and ComfyUI single files to and from this project's XUT."""
