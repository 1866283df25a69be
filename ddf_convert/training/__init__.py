"""Fine-tuning: images, order, checkpoints and logs, and the engine that puts them together."""
