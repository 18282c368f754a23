"""Make trained neural networks smaller and faster by removing the neurons that stay silent."""
