"""Config, image processor, quantizer and model: exactly the files that a Hub repository carries."""
