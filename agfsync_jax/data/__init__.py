"""What lies on disk and how it reaches the device: records, images, tokenizers, loader."""
