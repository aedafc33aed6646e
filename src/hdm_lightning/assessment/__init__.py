"""A trained model measured as a whole (`hdm-evaluate`): each part, its settings, and what is written."""
