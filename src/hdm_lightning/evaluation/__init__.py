"""Evaluation of a trained model or autoencoder (`hdm-evaluate`)."""
