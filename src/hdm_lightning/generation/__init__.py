"""From prompts to images: a trained model with its encoders as a diffusers pipeline, its folder and its output."""
