"""Everything that runs a frozen network: encoders, and the job that fills the latent cache."""
