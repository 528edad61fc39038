"""The objective: pure functions for diffusion, timesteps, noise, losses and weightings, and their user."""
