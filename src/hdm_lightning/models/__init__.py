"""The networks: XUT, its blocks, positions and routing, and the discriminator (pure torch)."""
