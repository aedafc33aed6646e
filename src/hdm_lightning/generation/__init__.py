"""From prompts to pictures: loads a trained model with its encoders and runs the samplers."""
