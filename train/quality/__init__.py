"""Quality of generated images: images drawn for the validation set, their features, and distances to its images."""
