"""Visual anagrams in latent space: equivariant autoencoders, UNets on their latents, and the sampler."""

__version__ = "0.1.0"
