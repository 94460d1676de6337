"""Anagrams: a denoiser over several views, the sampling loop, rendering."""
